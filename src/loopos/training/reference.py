"""The reference of preference optimization: log-probabilities of the weights that training starts from.

Under LoRA the reference is the model without the adapters that train, run beside each step. Otherwise its
log-probabilities are computed once, before the first step, and kept in a file, so that no second model is held. A
reference that moves, or that is asked about responses nobody knew before, has its own copy of the trained weights.
Letters: M tokens of responses.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from loopos.config.diagnostics import UserError
from loopos.data.batches import BatchT, Cursor, DerivedBatches, Rows, in_step
from loopos.functional.packing import PackedLayout
from loopos.storage.durable import explain_disk_full, fsync_path
from loopos.storage.tensor_files import read_tensors, save_tensors
from loopos.training.distributed import World
from loopos.training.precision import MasterWeights
from loopos.training.preference_objective import Logprobs

# Tokens of one forward pass.
_TOKENS = 2048


class ScoredBatch(Protocol):
    """A batch whose responses have log-probabilities."""

    @property
    def ids(self) -> Tensor: ...
    @property
    def layout(self) -> PackedLayout: ...
    @property
    def positions(self) -> Tensor: ...
    @property
    def targets(self) -> Tensor: ...
    @property
    def rows(self) -> tuple[int, ...]: ...
    @property
    def num_tokens(self) -> int: ...


@torch.no_grad()
def response_logprobs(policy: Logprobs, rows: Rows[ScoredBatch], sizes: Sequence[int], world: World) -> list[Tensor]:
    """Log-probabilities of the response tokens of each row, fp32 on CPU, computed over all ranks. Every rank gets all
    of them. sizes: tokens of each row's responses.
    """
    rank, size = world.data_parallel
    own: dict[int, list[float]] = {}
    for batch, counts in in_step(rows, tokens=_TOKENS, rank=rank, world=size):
        logprobs = policy(batch.ids, batch.layout, batch.positions, batch.targets)[0].float().cpu()
        if counts:
            parts = torch.split(logprobs, [sizes[row] for row in batch.rows])
            own |= {row: part.tolist() for row, part in zip(batch.rows, parts, strict=True)}
    found: dict[int, list[float]] = {}
    for part in world.gather_data_parallel(own):
        assert isinstance(part, dict)
        found.update(part)
    return [torch.tensor(found[row]) for row in range(len(sizes))]


@dataclass(frozen=True)
class ReferenceCache:
    """Cached log-probabilities in a folder, one file for each key; a file is whole or not there."""

    folder: Path

    @staticmethod
    def key(rows: str, *, weights: str, precision: str) -> str:
        """The name of what decides the values: a digest of the rows as tokens (and so of the template), the weights,
        the number format.
        """
        parts = [rows, weights, precision, "1"]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    def read(self, key: str, sizes: Sequence[int]) -> list[Tensor] | None:
        """The values of each row, or None where there are none. Raises `UserError` for a file that does not
        fit its rows.
        """
        file = self._file(key)
        if not file.is_file():
            return None
        values = read_tensors(file)["logprobs"]
        if values.shape != (sum(sizes),) or not bool(values.isfinite().all()):
            raise UserError(f"{file}: got {tuple(values.shape)} values; expected {sum(sizes)} finite ones; delete it")
        return list(torch.split(values, list(sizes)))

    def write(self, key: str, values: Sequence[Tensor]) -> None:
        """Writes the values of all rows. Raises `DiskFull`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tensor = torch.cat(list(values))
        with explain_disk_full(self.folder, tensor.numel() * 4, "the reference's log-probabilities"):
            partial = self.folder / f".{key}.{os.getpid()}"
            for left in self.folder.glob(f".{key}.*"):
                # Of a process that was killed while it wrote.
                left.unlink()
            save_tensors(partial, {"logprobs": tensor})
            os.replace(partial, self._file(key))
            fsync_path(self.folder)

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


def cached_logprobs(
    cache: ReferenceCache,
    key: str,
    policy: Logprobs,
    rows: Rows[ScoredBatch],
    sizes: Sequence[int],
    world: World,
    *,
    say: Callable[[str], None],
    started: bool,
) -> list[Tensor]:
    """The reference's log-probabilities of rows: read where they were computed before, else computed and kept.
    started: whether training may have changed the policy, which is then no longer the reference.
    """
    found = world.gather(cache.read(key, sizes) is not None if world.is_first else None)[0]
    if found:
        values = cache.read(key, sizes)
        assert values is not None
        say(f"reference: log-probabilities of {len(values):,} rows read from {cache.folder}")
        return values
    assert not started, "the policy is no longer the reference"
    values = response_logprobs(policy, rows, sizes, world)
    if world.is_first:
        cache.write(key, values)
    world.wait()
    say(f"reference: log-probabilities of {len(values):,} rows computed once and kept in {cache.folder}")
    return values


class ReferenceCopy:
    """A reference ρ with its own copy of the weights that train; what stays frozen is shared with the policy π. At
    first it is the policy. With `every`, it moves after every so many steps, weight by weight: ρ ← α·π + (1 − α)·ρ
    (TR-DPO: Gorbatovski et al. 2024, equation 8). Under LoRA the weights are the matrices A and B, and ΔW = B·A follows
    from the mixed ones. The sums are fp32; the passes take the policy's number format.
    """

    def __init__(
        self, policy: nn.Module, master_weights: MasterWeights, *, every: int | None = None, alpha: float = 1.0
    ) -> None:
        """policy: computes `Logprobs`. Raises `UserError` for a sharded policy."""
        if master_weights.sharding is not None:
            raise UserError(
                "preference.sync_reference, preference.reference: a copy of the trained weights needs them whole in "
                'each process, and this model is sharded; expected distributed.mode "replicate", or no copy'
            )
        self.every, self.alpha = every, alpha
        self._policy, self._trained = policy, master_weights.parameters
        own = dict(policy.named_parameters())
        self._weights = {name: weight.detach().clone() for name, weight in self._trained.items()}
        # Parameters, as the fast path of adapters tells other tensors apart. In fp32 they share the memory of the sums.
        self._copies: dict[str, Tensor] = {
            name: nn.Parameter(weight.to(own[name].dtype), requires_grad=False)
            for name, weight in self._weights.items()
        }

    @torch.no_grad()
    def __call__(self, batch: ScoredBatch) -> Tensor:
        """Log-probabilities of the targets of a batch, `[M]`."""
        arguments = (batch.ids, batch.layout, batch.positions, batch.targets)
        logprobs: Tensor = functional_call(self._policy, self._copies, arguments).logprobs
        return logprobs

    @torch.no_grad()
    def follow(self, before: int, after: int) -> None:
        """Moves if a multiple of `every` lies between the numbers of steps before and after an update."""
        if self.every is None or after // self.every == before // self.every:
            return
        for name, weight in self._weights.items():
            weight.mul_(1.0 - self.alpha).add_(self._trained[name], alpha=self.alpha)
        self._take_over()

    def _take_over(self) -> None:
        for name, copied in self._copies.items():
            if copied.dtype != torch.float32:
                copied.data.copy_(self._weights[name])

    def synchronize(self, world: World) -> None:
        """All ranks have the same copy."""

    def tensors(self) -> Mapping[str, Tensor]:
        """The copy, for a checkpoint; one that never moves is that of the start."""
        return {} if self.every is None else self._weights

    def state(self) -> dict[str, Any]:
        return {}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Restores `tensors`."""
        for name, tensor in tensors.items():
            self._weights[name].copy_(tensor)
        self._take_over()


@dataclass(frozen=True)
class FollowedBatches(DerivedBatches[BatchT]):
    """Batches after whose steps the reference may move: before a validation and a checkpoint of the same step."""

    reference: ReferenceCopy

    def after(self, cursor: Cursor, losses: Mapping[str, float]) -> Cursor:
        """The cursor of the next step."""
        following = self.batches.after(cursor, losses)
        before, after = (each.epoch * self.steps_an_epoch + each.step for each in (cursor, following))
        self.reference.follow(before, after)
        return following
