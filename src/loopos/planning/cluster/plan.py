"""The plan of a run on a cluster: whether it fits, what it sends, and the smallest setting that fits; as data and
text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from loopos.config.diagnostics import UserError
from loopos.config.figures import as_bytes, as_time
from loopos.config.sections import WHOLE_MATRICES
from loopos.planning.cluster.memory import Need, Transfer, iteration_transfers, need_of, step_transfers
from loopos.planning.cluster.setting import Cluster, RequestedSharding, Setting, cheaper_in_memory
from loopos.planning.cluster.work import Load

# No cluster larger than this many times the requested GPUs is considered.
_MOST_GROWTH = 1024


@dataclass(frozen=True)
class PhasePlan:
    """One phase under `setting`. `smallest`: the first setting that fits, cheapest first, with its config `overrides`
    (none if `setting` fits); None if none does, and then `gpus`: how many of these GPUs would fit the run, None if no
    number does.
    """

    load: Load
    cluster: Cluster
    setting: Setting
    need: Need
    step: list[Transfer]
    iteration: list[Transfer]
    smallest: Setting | None
    overrides: list[str]
    gpus: int | None

    @property
    def fits(self) -> bool:
        return self.need.peak <= self.cluster.room

    def to_dict(self) -> dict[str, object]:
        """All figures as one JSON object."""
        load, model = self.load, self.load.networks[0].model
        return {
            "phase": load.phase,
            "model": {
                "name": model.name,
                "parameters": sum(network.parameters.total for network in load.networks),
                "trained": sum(network.parameters.trained for network in load.networks),
                "roles": {network.role: network.parameters.total for network in load.networks},
            },
            "forward": {
                "rows": load.rows // self.setting.splits,
                "tokens": load.tokens // self.setting.splits,
                "passes_a_step": load.accumulation * self.setting.splits,
            },
            "setting": {
                "mode": self.setting.mode,
                "shard_size": self.setting.shard_size,
                "tensor_parallel": self.setting.tensor_parallel,
                "cpu_offload": self.setting.cpu_offload,
                "reshard_after_forward": self.setting.reshard_after_forward,
                "gradient_checkpointing": self.setting.checkpointing,
            },
            "fits": self.fits,
            "memory": {**self.need.to_dict(), "there": self.cluster.memory, "room": self.cluster.room},
            "traffic": {
                "step": [each.to_dict(self.cluster) for each in self.step],
                "iteration": [each.to_dict(self.cluster) for each in self.iteration],
                "steps_an_iteration": load.steps,
            },
            "smallest": self.overrides if self.smallest is not None else None,
            "gpus": self.gpus,
        }


def plan_of(load: Load, requested: RequestedSharding, cluster: Cluster) -> PhasePlan:
    """The plan of one phase. Raises `UserError` for a layout that the cluster or the model does not allow."""
    setting = setting_of(load, requested, cluster)
    need = need_of(load, setting)
    smallest = smallest_that_fits(load, setting, cluster)
    overrides: list[str] = []
    if smallest is not None:
        rows = load.rows if load.batch_is_rows else None
        overrides = smallest.overrides(setting, cluster, rows=rows, accumulation=load.accumulation)
    return PhasePlan(
        load,
        cluster,
        setting,
        need,
        step_transfers(load, setting, cluster),
        iteration_transfers(load, setting, cluster),
        smallest,
        overrides,
        enough_gpus(load, setting, cluster) if smallest is None else None,
    )


def setting_of(load: Load, requested: RequestedSharding, cluster: Cluster) -> Setting:
    """The requested setting; "auto" shards weights if those in training, with gradients and moments, take more than
    half of a GPU. Raises `UserError`.
    """
    plain = Setting(
        1, requested.tensor_parallel, False, requested.reshard_after_forward, load.training.gradient_checkpointing
    )
    if cluster.gpus % requested.tensor_parallel == 0:
        shard_size = requested.shard_size or plain.copies(cluster)
    else:
        shard_size = 1
    shared = replace(plain, shard_size=shard_size, cpu_offload=requested.cpu_offload)
    if requested.mode == "replicate":
        if requested.shard_size not in (None, 1):
            raise UserError(f"shard_size {requested.shard_size}: the mode is replicate; expected mode shard")
        chosen = replace(plain, cpu_offload=requested.cpu_offload)
    elif requested.mode == "shard":
        chosen = shared
    else:
        needed = sum(4 * each.parameters.total + 12 * each.parameters.trained for each in load.trained)
        whole = needed <= cluster.memory / 2 or load.training.optimizer in WHOLE_MATRICES
        chosen = plain if whole else shared
    if chosen.mode == "shard" and load.training.optimizer in WHOLE_MATRICES:
        raise UserError(
            f"training.optimizer: {load.training.optimizer} with mode shard; its rule needs whole matrices, but a "
            "sharded GPU has only some rows: use sgd, adam or adamw, or mode replicate"
        )
    chosen.check(cluster)
    return chosen


def smallest_that_fits(load: Load, setting: Setting, cluster: Cluster) -> Setting | None:
    """The first setting that fits, from the requested one to slower ones."""
    tried = cheaper_in_memory(setting, cluster, rows=load.rows, optimizer=load.training.optimizer)
    return next((each for each in tried if need_of(load, each).peak <= cluster.room), None)


def enough_gpus(load: Load, setting: Setting, cluster: Cluster) -> int | None:
    """The number of GPUs, by doubling the cluster, with which some setting fits; None if there is none."""
    growth = 2
    while growth <= _MOST_GROWTH:
        larger = replace(cluster, gpus=cluster.gpus * growth, gpus_a_node=cluster.gpus_a_node)
        if smallest_that_fits(load, setting, larger) is not None:
            return larger.gpus
        growth *= 2
    return None


_INDENT = f"\n{'':10}"


def described(plans: list[PhasePlan]) -> str:
    """All phases, one after the other."""
    titled = len(plans) > 1
    blocks = []
    for number, plan in enumerate(plans, start=1):
        title = [f"phase {number} of {len(plans)}: {plan.load.phase}"] if titled else []
        blocks.append("\n".join([*title, *(f"{name:<8}  {text}" for name, text in _lines(plan).items())]))
    return "\n\n".join(blocks)


def _lines(plan: PhasePlan) -> dict[str, str]:
    load, setting, cluster = plan.load, plan.setting, plan.cluster
    networks = load.networks
    total, trained = (sum(getattr(each.parameters, name) for each in networks) for name in ("total", "trained"))
    roles = [f"{each.role}: {each.summary}, {each.parameters.total:,}" for each in networks]
    found = {
        "cluster": _cluster(cluster),
        "model": f"{networks[0].model.name}, {total:,} parameters, {trained:,} train",
        "roles": _INDENT.join(roles) if len(roles) > 1 else "",
        "forward": f"{load.rows} rows of {load.row_tokens:,} tokens, {load.tokens:,} in all; "
        f"{load.accumulation} per optimizer step",
        "setting": setting.summary(cluster),
        "memory": _memory(plan),
        "traffic": _traffic(plan.step, cluster, "per optimizer step"),
        "rollouts": _traffic(plan.iteration, cluster, f"per iteration of {load.steps} steps, in addition")
        if load.writes_responses
        else "",
        "verdict": _verdict(plan),
    }
    return {name: text for name, text in found.items() if text}


def _cluster(cluster: Cluster) -> str:
    memory = as_bytes(cluster.memory)
    if cluster.gpus == 1:
        return f"1 GPU with {memory}"
    nodes = -(-cluster.gpus // cluster.gpus_a_node)
    return f"{cluster.gpus} GPUs with {memory} each, on {nodes} {'node' if nodes == 1 else 'nodes'}"


def _memory(plan: PhasePlan) -> str:
    need = plan.need
    lines = [f"about {as_bytes(need.peak)} of a GPU at the peak, of {as_bytes(plan.cluster.room)} usable"]
    for name, parts in (("persistent", need.persistent), ("update", need.update), ("rollout", need.rollout)):
        if any(parts.values()):
            lines.append(f"{name}: {_sum(parts)}")
    if need.host:
        host_bytes = need.host * plan.cluster.gpus_a_node
        lines.append(f"in the host's memory: {as_bytes(host_bytes)} per node")
    if len(need.roles) > 1:
        lines.append(f"by role: {_sum(need.roles)}")
    return _INDENT.join(lines)


def _sum(parts: Mapping[str, int]) -> str:
    return " + ".join(f"{name} {as_bytes(size)}" for name, size in parts.items() if size)


def _traffic(transfers: Iterable[Transfer], cluster: Cluster, when: str) -> str:
    found = list(transfers)
    if not found:
        return f"nothing, {when}"
    seconds = sum(each.seconds(cluster) for each in found)
    lines = [
        f"each GPU sends {as_bytes(sum(each.sent for each in found))} {when}: {_seconds(seconds)} if nothing hides it"
    ]
    lines += [
        f"{each.collective} of {as_bytes(each.size)}, {each.what}, among {each.group}: "
        f"{_seconds(each.seconds(cluster))}"
        for each in found
    ]
    return _INDENT.join(lines)


def _seconds(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else as_time(seconds)


def _verdict(plan: PhasePlan) -> str:
    if plan.fits:
        return "fits"
    gpus = _count_gpus(plan.cluster.gpus)
    more = f"(needs {as_bytes(plan.need.peak - plan.cluster.room)} more as configured)"
    if plan.smallest is not None:
        return f"does not fit {more}; fits with{_INDENT}{' '.join(plan.overrides)}"
    if plan.gpus is not None:
        return f"does not fit on {gpus} with any setting {more}; fits on {_count_gpus(plan.gpus)} like these"
    return (
        f"does not fit on any number of such GPUs with any setting {more}; use GPUs with more memory, or fewer tokens "
        "a row"
    )


def _count_gpus(count: int) -> str:
    return f"{count} {'GPU' if count == 1 else 'GPUs'}"
