"""Memory of one GPU under a setting, by part and by role.

Enters: a load and a setting. Leaves: `Need`. Replicated, each GPU holds all that training holds
(`estimate.held_bytes`). Sharded by FSDP2 over S GPUs, it holds 1/S of it: a model in training in fp32, so that weights
are their own masters, a frozen role in the run's format; a layer is gathered in the run's format while it is at work,
the next one beside it, and what lies outside of layers for the whole pass. Tensor parallelism divides the weights of
the model's plan, and most activations. Left out: what NCCL and the allocator take (`hardware.FREE_SHARE`), data,
checkpoints, and that a head keeps fp32 (2 bytes a number too little).
Letters: f bytes of a number in the run's format.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from loopos.cli.planning import estimate
from loopos.cli.planning.cluster.setting import Setting
from loopos.cli.planning.cluster.work import Load, Network
from loopos.config.faults import UserError

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

    def told(self) -> dict[str, object]:
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
            f"tensor_parallel {tensor_parallel}: transformers carries no plan for {network.model.name}; wanted 1, or "
            "mode shard"
        )
    if shape.heads % tensor_parallel:
        raise UserError(
            f"tensor_parallel {tensor_parallel}: {network.model.name} has {shape.heads} attention heads; wanted a "
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
