"""A plan for people.

Enters: a `PhasePlan`. Leaves: text. Left out: the figures (`plan`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from loopos.cli.answers import as_bytes, as_time
from loopos.cli.planning.cluster.hardware import Cluster
from loopos.cli.planning.cluster.plan import PhasePlan
from loopos.cli.planning.cluster.traffic import Transfer

_INDENT = f"\n{'':10}"


def described(plans: list[PhasePlan]) -> str:
    """All phases, one below the other."""
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
    roles = [f"{each.role}: {each.said}, {each.parameters.total:,}" for each in networks]
    found = {
        "cluster": _cluster(cluster),
        "model": f"{networks[0].model.name}, {total:,} parameters, {trained:,} train",
        "roles": _INDENT.join(roles) if len(roles) > 1 else "",
        "forward": f"{load.rows} rows of {load.row_tokens:,} tokens, {load.tokens:,} in all; "
        f"{load.accumulation} an optimizer step",
        "setting": setting.said(cluster),
        "memory": _memory(plan),
        "traffic": _traffic(plan.step, cluster, "an optimizer step"),
        "rollouts": _traffic(plan.iteration, cluster, f"an iteration of {load.steps} steps, beside them")
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
    lines = [f"about {as_bytes(need.peak)} of a GPU at the peak, of {as_bytes(plan.cluster.room)} that may be filled"]
    for name, parts in (("held", need.held), ("update", need.update), ("rollout", need.rollout)):
        if any(parts.values()):
            lines.append(f"{name}: {_sum(parts)}")
    if need.host:
        held = need.host * plan.cluster.gpus_a_node
        lines.append(f"in the host's memory: {as_bytes(held)} a node")
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
        return f"does not fit {more}; fits with{_INDENT}{' '.join(plan.words)}"
    if plan.gpus is not None:
        return f"does not fit on {gpus} with any setting {more}; fits on {_count_gpus(plan.gpus)} like these"
    return (
        f"does not fit on any number of such GPUs with any setting {more}; take GPUs with more memory, or fewer tokens "
        "a row"
    )


def _count_gpus(count: int) -> str:
    return f"{count} {'GPU' if count == 1 else 'GPUs'}"
