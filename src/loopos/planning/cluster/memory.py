"""Memory of one GPU under a setting, by part and by role.

Enters: a load and a setting. Leaves: `Need`. Replicated, each GPU holds all that training holds
(`estimate.held_bytes`). Sharded by FSDP2 over S GPUs, it holds 1/S of it: a model in training in fp32, so that weights
are their own masters, a frozen role in the run's format; a layer is gathered in the run's format while it is at work,
the next one beside it, and what lies outside of layers for the whole pass. Tensor parallelism divides the weights of
the model's plan, and most activations. Left out: what NCCL and the allocator take (`hardware.FREE_SHARE`), data,
checkpoints, and that a head keeps fp32 (2 bytes a number too little).
Letters: f bytes of a number in the run's format.

What each GPU sends in an optimizer step, and how long that takes at given bandwidths.

Enters: a load, a setting, a cluster. Leaves: `Transfer`s. Bytes are those of the tensors that go into a collective; on
a ring of S GPUs each GPU sends (S − 1)/S of them in an all-gather or a reduce-scatter, twice that in an all-reduce
(Patarasu & Yuan 2009). Left out: latency, what is hidden behind computation, counts and metrics (less than a kilobyte a
step).
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
    """Bytes of one GPU. `held`: all the time; `update`: beside that in a forward and backward pass; `rollout`: beside
    it while responses are generated. `host`: bytes of the host's memory for each GPU. `roles`: what of `held` (or
    `host`) is whose.
    """

    held: dict[str, int]
    update: dict[str, int]
    rollout: dict[str, int]
    host: int
    roles: dict[str, int]

    @property
    def peak(self) -> int:
        """held + the larger of update and rollout."""
        return sum(self.held.values()) + max(sum(self.update.values()), sum(self.rollout.values()))

    def to_dict(self) -> dict[str, object]:
        """As one JSON object."""
        parts = {"held": self.held, "update": self.update, "rollout": self.rollout}
        return {"peak": self.peak, **parts, "host": self.host, "roles": self.roles}


def number_bytes(load: Load) -> int:
    """f of weights: 2 in bf16, which a GPU takes where precision is auto; with fp16 weights stay in fp32."""
    return 2 if load.training.precision in ("auto", "bf16") else _FP32


def activation_number_bytes(load: Load) -> int:
    """f of what a forward pass keeps."""
    return _FP32 if load.training.precision == "fp32" else 2


def need_of(load: Load, setting: Setting, *, longest: int = 0) -> Need:
    """What one GPU needs. longest: tokens of a row whose attention probabilities are kept: 0 on a GPU, whose fused
    kernels keep none. Raises `UserError` for tensor parallelism of a model without a plan.
    """
    held, roles = Counter[str](), dict[str, int]()
    for network in load.networks:
        parts = held_of(network, load, setting)
        held.update(parts)
        roles[network.role] = sum(parts.values())
    update = _update(load, setting, longest)
    rollout = _rollout(load, setting)
    if setting.cpu_offload:
        return Need({}, update, rollout, sum(held.values()), roles)
    return Need(dict(held), update, rollout, 0, roles)


def held_of(network: Network, load: Load, setting: Setting) -> dict[str, int]:
    """Weights, masters, gradients and optimizer's state of a role on one GPU."""
    half, training = number_bytes(load) == 2, load.training
    parameters = divided(network, setting.tensor_parallel)
    state = estimate.optimizer_bytes(training.optimizer, training.momentum, parameters)
    held = estimate.held_bytes(parameters, half_precision=half, optimizer_state=state)
    if setting.mode == "replicate":
        return held
    if half and parameters.trained:
        held["weights"] = _FP32 * (parameters.total - parameters.trained)
    return {part: -(-size // setting.shard_size) for part, size in held.items()}


def divided(network: Network, tensor_parallel: int) -> estimate.Parameters:
    """The parameters that one of `tensor_parallel` GPUs holds of a role. Raises `UserError`."""
    parameters, units, shape = network.parameters, network.model.units, network.model.shape
    if tensor_parallel == 1 or not network.has_own_weights:
        return parameters
    if units.split == 0:
        raise UserError(
            f"tensor_parallel {tensor_parallel}: transformers carries no plan for {network.model.name}; expected 1, or "
            "mode shard"
        )
    if shape.heads % tensor_parallel:
        raise UserError(
            f"tensor_parallel {tensor_parallel}: {network.model.name} has {shape.heads} attention heads; expected a "
            "divisor"
        )
    # Frozen roles share the model's shapes, not what of it trains.
    trained = min(units.split_trained, parameters.trained_matrices)
    saved, saved_trained = (part - -(-part // tensor_parallel) for part in (units.split, trained))
    return replace(
        parameters,
        total=parameters.total - saved,
        trained_matrices=parameters.trained_matrices - saved_trained,
        multiplied=parameters.multiplied - saved,
    )


def gathered_bytes(network: Network, load: Load, setting: Setting) -> int:
    """Weights that are whole while a role's passes run, where they are sharded: f · (outside + 2 · layer), or f of all
    with `reshard_after_forward` off; and the gradients of one layer and of what lies outside, before they are divided.
    """
    if setting.mode == "replicate":
        return estimate.gradient_bytes(network.parameters.largest, half_precision=number_bytes(load) == 2)
    units, size = network.model.units, number_bytes(load)
    share = divided(network, setting.tensor_parallel).total / max(1, network.parameters.total)
    whole = network.parameters.total if network.has_own_weights else 0
    kept = min(whole, units.outside + 2 * units.layer) if setting.reshard_after_forward else whole
    if not network.parameters.trained:
        # One that scores has left its layers behind when an update runs.
        return round(share * size * min(whole, units.outside))
    gradient = min(network.parameters.trained, units.outside + units.layer)
    made = estimate.gradient_bytes(gradient, half_precision=size == 2)
    return round(share * (size * kept + made))


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
# Collectives of activations in a layer under tensor parallelism: behind attention and behind the feed-forward layers.
_JOINTS = 2


@dataclass(frozen=True, slots=True)
class Transfer:
    """`size`: bytes of the tensors that one GPU brings through this collective; among `group` GPUs, every `stride`-th
    one. `what`: whose bytes.
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
        """The time of it, with nothing else to do."""
        return cluster.ring_seconds(self.sent, size=self.group, stride=self.stride)

    def to_dict(self, cluster: Cluster) -> dict[str, object]:
        """As one JSON object."""
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
    """Those of an iteration of PPO beside its optimizer steps: every role is gathered once, and kept while responses
    are written and scored.
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
    """Weights gathered, gradients summed. Replicated, gradients are summed once a step, in fp32: 4·R. Sharded, every
    pass gathers the weights, f·P, and the layers again for its backward half unless they were kept, and reduces 4·R;
    groups that share weights sum their parts of the gradients, 4·R/S.
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
    """Hidden states and their gradients, T · d · f, summed behind attention and feed-forward layers of each layer."""
    tokens = load.tokens // setting.splits
    times = _JOINTS * (3 if setting.checkpointing else 2) * network.model.num_layers
    size = tokens * network.model.shape.width * activation_number_bytes(load)
    passes = load.accumulation * setting.splits
    return Transfer(ALL_REDUCE, f"activations of the {network.role}", passes * times * size, setting.tensor_parallel, 1)
