"""The reference of preference optimization: log-probabilities of the weights that training starts from.

Under LoRA the reference is the model without the adapters that train, run beside each step. Otherwise its
log-probabilities are computed once, before the first step, and kept in a file, so that no second model is held.
Letters: M tokens of responses.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from loopos.config.diagnostics import UserError
from loopos.data.batches import Rows, in_step
from loopos.functional.packing import PackedLayout
from loopos.storage.durable import explain_disk_full, fsync_path
from loopos.storage.tensor_files import read_tensors, save_tensors
from loopos.training.distributed import World
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
