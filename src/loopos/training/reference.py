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

import torch
from torch import Tensor

from loopos.config.diagnostics import UserError
from loopos.data.batches import in_step
from loopos.data.digest import comparisons_digest
from loopos.data.preference_tokens import EncodedComparison
from loopos.data.response_batches import PreferenceRows
from loopos.storage.durable import explain_disk_full, fsync_path
from loopos.storage.tensor_files import read_tensors, save_tensors
from loopos.training.distributed import World
from loopos.training.preference_objective import Logprobs

# Tokens of one forward pass.
_TOKENS = 2048


@torch.no_grad()
def response_logprobs(policy: Logprobs, rows: PreferenceRows, world: World) -> list[Tensor]:
    """Log-probabilities of each comparison's response tokens, fp32 on CPU, computed over all ranks. Every rank gets all
    of them.
    """
    rank, size = world.data_parallel
    own: dict[int, list[float]] = {}
    for batch, counts in in_step(rows, tokens=_TOKENS, rank=rank, world=size):
        logprobs = policy(batch.ids, batch.layout, batch.positions, batch.targets)[0].float().cpu()
        if counts:
            sizes = [sum(map(len, rows.examples[row].responses)) for row in batch.rows]
            own |= {row: part.tolist() for row, part in zip(batch.rows, torch.split(logprobs, sizes), strict=True)}
    found: dict[int, list[float]] = {}
    for part in world.gather_data_parallel(own):
        assert isinstance(part, dict)
        found.update(part)
    return [torch.tensor(found[row]) for row in range(len(rows.examples))]


@dataclass(frozen=True)
class ReferenceCache:
    """Cached log-probabilities in a folder, one file for each key; a file is whole or not there."""

    folder: Path

    def key(self, examples: Sequence[EncodedComparison], *, weights: str, precision: str) -> str:
        """The name of what decides the values: rows as tokens (and so the template), weights, number format."""
        parts = [comparisons_digest(examples), weights, precision, "1"]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    def read(self, key: str, examples: Sequence[EncodedComparison]) -> list[Tensor] | None:
        """The values of each comparison, or None where there are none. Raises `UserError` for a file that does not
        fit its rows.
        """
        file = self._file(key)
        if not file.is_file():
            return None
        values = read_tensors(file)["logprobs"]
        sizes = [sum(map(len, example.responses)) for example in examples]
        if values.shape != (sum(sizes),) or not bool(values.isfinite().all()):
            raise UserError(f"{file}: got {tuple(values.shape)} values; expected {sum(sizes)} finite ones; delete it")
        return list(torch.split(values, sizes))

    def write(self, key: str, values: Sequence[Tensor]) -> None:
        """Writes the values of all comparisons. Raises `DiskFull`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tensor = torch.cat(list(values))
        with explain_disk_full(self.folder, tensor.numel() * 4, "the reference's log-probabilities"):
            partial = self.folder / f".{key}.{os.getpid()}"
            partial.unlink(missing_ok=True)
            save_tensors(partial, {"logprobs": tensor})
            os.replace(partial, self._file(key))
            fsync_path(self.folder)

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


def cached_logprobs(
    cache: ReferenceCache,
    key: str,
    policy: Logprobs,
    rows: PreferenceRows,
    world: World,
    *,
    say: Callable[[str], None],
) -> list[Tensor]:
    """The reference's log-probabilities of rows: read where they were computed before, else computed and kept."""
    found = world.gather(cache.read(key, rows.examples) is not None if world.is_first else None)[0]
    if found:
        values = cache.read(key, rows.examples)
        assert values is not None
        say(f"reference: log-probabilities of {len(values):,} comparisons read from {cache.folder}")
        return values
    values = response_logprobs(policy, rows, world)
    if world.is_first:
        cache.write(key, values)
    world.wait()
    say(f"reference: log-probabilities of {len(values):,} comparisons computed once and kept in {cache.folder}")
    return values
