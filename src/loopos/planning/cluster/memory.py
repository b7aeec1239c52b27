"""Memory of one GPU under a setting, by part and role; and the traffic of each GPU, with its time at given bandwidths.

Replicated, each GPU holds everything (`estimate.persistent_bytes`). Sharded by FSDP2 over S GPUs, it holds 1/S: a model
in training in fp32, which needs no master weights, a frozen role in the run's format; a layer is gathered in the run's
format while it runs, with the next one, and weights outside of layers for the whole pass. Tensor parallelism divides
the weights of the model's plan, and most activations. Not included: memory of NCCL and the allocator
(`FREE_FRACTION`), data, checkpoints. On a ring of S GPUs each GPU sends (S − 1)/S of the bytes of a collective in an
all-gather or reduce-scatter, twice that in an all-reduce (Patarasu & Yuan 2009). Not included: latency, overlap with
computation, counts and metrics. Letters: f bytes of a number in the run's format.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from loopos.config.diagnostics import UserError
from loopos.planning import estimate
from loopos.planning.cluster.setting import Cluster, Setting
from loopos.planning.cluster.work import Load, Network

_FP32 = 4


@dataclass(frozen=True)
class Need:
    """Bytes of one GPU. `persistent`: all the time; `update`: in addition in a forward and backward pass; `rollout`: in
    addition while responses are generated. `host`: bytes of the host's memory per GPU. `roles`: `persistent` (or
    `host`) by role.
    """

    persistent: dict[str, int]
    update: dict[str, int]
    rollout: dict[str, int]
    host: int
    roles: dict[str, int]

    @property
    def peak(self) -> int:
        """persistent + the larger of update and rollout."""
        return sum(self.persistent.values()) + max(sum(self.update.values()), sum(self.rollout.values()))

    def to_dict(self) -> dict[str, object]:
        """All figures as one JSON object."""
        parts = {"held": self.persistent, "update": self.update, "rollout": self.rollout}
        return {"peak": self.peak, **parts, "host": self.host, "roles": self.roles}


def number_bytes(load: Load) -> int:
    """f of weights: 2 in bf16, which a GPU uses for precision auto; with fp16 weights stay in fp32."""
    return 2 if load.training.precision in ("auto", "bf16") else _FP32


def activation_number_bytes(load: Load) -> int:
    """f of what a forward pass keeps."""
    return _FP32 if load.training.precision == "fp32" else 2


def need_of(load: Load, setting: Setting, *, longest: int = 0) -> Need:
    """The memory that one GPU needs. longest: tokens of a row whose attention probabilities are kept: 0 on a GPU, whose
    fused kernels keep none. Raises `UserError` for tensor parallelism of a model without a plan.
    """
    persistent, roles = Counter[str](), dict[str, int]()
    for network in load.networks:
        parts = persistent_of(network, load, setting)
        persistent.update(parts)
        roles[network.role] = sum(parts.values())
    update = _update(load, setting, longest)
    rollout = _rollout(load, setting)
    if setting.cpu_offload:
        return Need({}, update, rollout, sum(persistent.values()), roles)
    return Need(dict(persistent), update, rollout, 0, roles)


def persistent_of(network: Network, load: Load, setting: Setting) -> dict[str, int]:
    """Weights, master weights, gradients and optimizer's state of a role on one GPU."""
    half, training = number_bytes(load) == 2, load.training
    parameters = divided(network, setting.tensor_parallel)
    state = estimate.optimizer_bytes(training.optimizer, training.momentum, parameters)
    persistent = estimate.persistent_bytes(parameters, half_precision=half, optimizer_state=state)
    if setting.mode == "replicate":
        return persistent
    if half and parameters.trained:
        persistent["weights"] = _FP32 * (parameters.total - parameters.trained)
    return {part: -(-size // setting.shard_size) for part, size in persistent.items()}


def divided(network: Network, tensor_parallel: int) -> estimate.Parameters:
    """The parameters that one of `tensor_parallel` GPUs has of a role. Raises `UserError`."""
    parameters, units, shape = network.parameters, network.model.units, network.model.shape
    if tensor_parallel == 1 or not network.has_own_weights:
        return parameters
    if units.split == 0:
        raise UserError(
            f"tensor_parallel {tensor_parallel}: transformers has no plan for {network.model.name}; expected 1, or "
            "mode shard"
        )
    if shape.heads % tensor_parallel:
        raise UserError(
            f"tensor_parallel {tensor_parallel}: {network.model.name} has {shape.heads} attention heads; expected a "
            "divisor"
        )
    # Frozen roles have the model's shapes, but other trained parameters.
    trained = min(units.split_trained, parameters.trained_matrices)
    saved, saved_trained = (part - -(-part // tensor_parallel) for part in (units.split, trained))
    return replace(
        parameters,
        total=parameters.total - saved,
        trained_matrices=parameters.trained_matrices - saved_trained,
        multiplied=parameters.multiplied - saved,
    )


def gathered_bytes(network: Network, load: Load, setting: Setting) -> int:
    """Whole weights while a role's passes run, if they are sharded: f · (outside + 2 · layer), or f of all with
    `reshard_after_forward` off; and the gradients of one layer and of weights outside, before they are divided.
    """
    if setting.mode == "replicate":
        return estimate.gradient_bytes(network.parameters.largest, half_precision=number_bytes(load) == 2)
    units, size = network.model.units, number_bytes(load)
    fraction = divided(network, setting.tensor_parallel).total / max(1, network.parameters.total)
    whole = network.parameters.total if network.has_own_weights else 0
    gathered = min(whole, units.outside + 2 * units.layer) if setting.reshard_after_forward else whole
    if not network.parameters.trained:
        # A role that scores has released its layers when an update runs.
        return round(fraction * size * min(whole, units.outside))
    gradient = min(network.parameters.trained, units.outside + units.layer)
    made = estimate.gradient_bytes(gradient, half_precision=size == 2)
    return round(fraction * (size * gathered + made))


def _update(load: Load, setting: Setting, longest: int) -> dict[str, int]:
    activations = sum(
        estimate.activation_bytes(
            network.model.shape,
            tokens=load.tokens // setting.splits,
            longest=longest,
            number_bytes=activation_number_bytes(load),
            recomputes=setting.checkpointing,
            tensor_parallel=setting.tensor_parallel,
        )
        for network in load.trained
        if network.has_own_pass
    )
    first = load.networks[0].model
    logits = 0
    if first.vocabulary:
        logits = estimate.logit_bytes(
            width=first.shape.width,
            vocabulary=first.vocabulary,
            number_bytes=activation_number_bytes(load),
            trains_output=first.trains_output,
        )
    gathered = sum(gathered_bytes(network, load, setting) for network in load.networks)
    return {"activations": activations, "logits": logits, "gathered": gathered}


def _rollout(load: Load, setting: Setting) -> dict[str, int]:
    """Keys and values, and the weights of all roles, which stay gathered until all responses are scored."""
    if load.cache is None:
        return {}
    writer = load.networks[0]
    keys = estimate.cache_bytes(
        writer.model.shape,
        layers=writer.model.num_layers,
        rows=load.cache.rows,
        columns=load.cache.columns,
        number_bytes=activation_number_bytes(load),
    )
    gathered = setting.mode == "shard"
    whole = sum(divided(network, setting.tensor_parallel).total for network in load.networks) if gathered else 0
    return {"cache": keys // setting.tensor_parallel, "gathered": number_bytes(load) * whole}


ALL_GATHER, REDUCE_SCATTER, ALL_REDUCE = "all-gather", "reduce-scatter", "all-reduce"
# Collectives of activations in a layer under tensor parallelism: after attention and after the feed-forward layers.
_JOINTS = 2


@dataclass(frozen=True, slots=True)
class Transfer:
    """`size`: bytes of the tensors that one GPU passes to this collective; among `group` GPUs, every `stride`-th one.
    `what`: the content.
    """

    collective: str
    what: str
    size: int
    group: int
    stride: int

    @property
    def sent(self) -> float:
        """Bytes that a GPU sends on a ring."""
        ways = 2 if self.collective == ALL_REDUCE else 1
        return ways * self.size * (self.group - 1) / self.group

    def seconds(self, cluster: Cluster) -> float:
        """The time of this transfer without other work."""
        return cluster.ring_seconds(self.sent, size=self.group, stride=self.stride)

    def to_dict(self, cluster: Cluster) -> dict[str, object]:
        """All figures as one JSON object."""
        return {
            "collective": self.collective,
            "what": self.what,
            "bytes": self.size,
            "sent": round(self.sent),
            "group": self.group,
            "seconds": self.seconds(cluster),
        }


def step_transfers(load: Load, setting: Setting, cluster: Cluster) -> list[Transfer]:
    """The collectives of one optimizer step."""
    passes = load.accumulation * setting.splits
    found = [each for network in load.trained for each in _of_weights(network, load, setting, cluster, passes)]
    if setting.tensor_parallel > 1:
        found += [_of_activations(network, load, setting) for network in load.trained if network.has_own_pass]
    return [each for each in found if each.group > 1 and each.size > 0]


def iteration_transfers(load: Load, setting: Setting, cluster: Cluster) -> list[Transfer]:
    """The collectives of a PPO iteration other than those of its optimizer steps: every role is gathered once, and
    stays so while responses are generated and scored.
    """
    if not load.writes_responses:
        return []
    size, stride = number_bytes(load), setting.tensor_parallel
    found = [
        Transfer(
            ALL_GATHER,
            f"weights of the {network.role}",
            size * divided(network, setting.tensor_parallel).total,
            setting.shard_size,
            stride,
        )
        for network in load.networks
    ]
    return [each for each in found if each.group > 1 and each.size > 0]


def divided_whole(network: Network, setting: Setting) -> int:
    """Parameters that one GPU of a tensor-parallel group gathers for a pass of a role."""
    if setting.tensor_parallel == 1 or not network.has_own_weights:
        return network.model.parameters.total
    return divided(network, setting.tensor_parallel).total


def _of_weights(network: Network, load: Load, setting: Setting, cluster: Cluster, passes: int) -> list[Transfer]:
    """Weights gathered, gradients summed. Replicated, gradients are summed once per step, in fp32: 4·R. Sharded, every
    pass gathers the weights, f·P, and the layers again for its backward half unless they stayed gathered, and reduces
    4·R; groups with the same shards sum their parts of the gradients, 4·R/S.
    """
    stride, copies = setting.tensor_parallel, setting.copies(cluster)
    trained = _FP32 * divided(network, setting.tensor_parallel).trained
    gradients = f"gradients of the {network.role}"
    if setting.mode == "replicate":
        return [Transfer(ALL_REDUCE, gradients, trained, copies, stride)]
    shards = setting.shard_size
    whole, outside = network.parameters.total, network.parameters.total
    if network.has_own_pass:
        whole, outside = divided_whole(network, setting), network.model.units.outside
    again = (whole - outside) * network.model.shape.layers // network.model.num_layers
    gathered = number_bytes(load) * (whole + (again if setting.reshard_after_forward else 0))
    return [
        Transfer(ALL_GATHER, f"weights of the {network.role}", passes * gathered, shards, stride),
        Transfer(REDUCE_SCATTER, gradients, passes * trained, shards, stride),
        Transfer(ALL_REDUCE, gradients, passes * trained // shards, copies // shards, stride * shards),
    ]


def _of_activations(network: Network, load: Load, setting: Setting) -> Transfer:
    """Hidden states and their gradients, T · d · f, summed after attention and feed-forward layers of each layer."""
    tokens = load.tokens // setting.splits
    times = _JOINTS * (3 if setting.checkpointing else 2) * network.model.num_layers
    size = tokens * network.model.shape.width * activation_number_bytes(load)
    passes = load.accumulation * setting.splits
    return Transfer(ALL_REDUCE, f"activations of the {network.role}", passes * times * size, setting.tensor_parallel, 1)
