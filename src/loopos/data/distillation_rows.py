"""Rows of distillation as packed batches: which tokens are learned, and what is known of them besides.

Letters: T tokens of a packed row, M trained tokens of a batch, m of a row, k candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from loopos.data.tokens import Encoded
from loopos.functional.distillation_loss import TopLogprobs
from loopos.functional.packing import PackedLayout


@dataclass(frozen=True)
class DistilledRow:
    """`ids` with the `weights` of each token as a target, 0 for context. `top`: the teacher's stored candidates at the
    trained tokens, `[m, k]`. `sampled_logprobs`: of the trained tokens under the student that wrote them, fp32 `[m]`.
    """

    ids: list[int]
    weights: list[float]
    top: TopLogprobs | None = None
    sampled_logprobs: Tensor | None = None

    @classmethod
    def of(cls, row: Encoded, top: TopLogprobs | None = None) -> DistilledRow:
        """A row of data."""
        assert row.weights is not None
        return cls(row.ids, row.weights, top)


@dataclass(frozen=True)
class DistillationBatch:
    """Rows of one forward pass, flat. `ids` `[T]`; `targets` `[M]`: where the trained tokens are, each predicted from
    the position before it; `weights` `[M]` fp32; `top` and `sampled_logprobs` as in `DistilledRow`, `[M, k]` and `[M]`.
    """

    ids: Tensor
    layout: PackedLayout
    targets: Tensor
    weights: Tensor
    rows: tuple[int, ...]
    top: TopLogprobs | None = None
    sampled_logprobs: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.layout.num_tokens


@dataclass(frozen=True)
class DistillationRows:
    """Rows as batches take them."""

    examples: Sequence[DistilledRow]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @cached_property
    def lengths(self) -> list[int]:
        return [len(example.ids) for example in self.examples]

    def __call__(self, rows: Sequence[int]) -> DistillationBatch:
        chosen, device = [self.examples[row] for row in rows], self.device
        weights = torch.tensor([weight for each in chosen for weight in each.weights], device=device)
        targets = weights.nonzero().squeeze(1)
        tops = [each.top for each in chosen if each.top is not None]
        sampled = [each.sampled_logprobs for each in chosen if each.sampled_logprobs is not None]
        top = None
        if tops:
            assert len(tops) == len(chosen), "all rows have candidates, or none has"
            ids, logprobs = (torch.cat([getattr(each, name) for each in tops]) for name in ("ids", "logprobs"))
            top = TopLogprobs(ids.to(device), logprobs.to(device))
        return DistillationBatch(
            ids=torch.tensor([token for each in chosen for token in each.ids], device=device),
            layout=PackedLayout(tuple(self.lengths[row] for row in rows), device),
            targets=targets,
            weights=weights[targets],
            rows=tuple(rows),
            top=top,
            sampled_logprobs=torch.cat(sampled).to(device) if sampled else None,
        )


def packed(rows: Sequence[DistilledRow]) -> dict[str, Tensor]:
    """Rows without candidates as tensors, for a checkpoint."""
    if not rows:
        return {}
    found = {
        "ids": torch.tensor([token for each in rows for token in each.ids]),
        "lengths": torch.tensor([len(each.ids) for each in rows]),
        "weights": torch.tensor([weight for each in rows for weight in each.weights], dtype=torch.float64),
    }
    sampled = [each.sampled_logprobs for each in rows if each.sampled_logprobs is not None]
    return found | ({"sampled_logprobs": torch.cat(sampled)} if sampled else {})


def unpacked(tensors: Mapping[str, Tensor]) -> list[DistilledRow]:
    """The rows of `packed`."""
    if not tensors:
        return []
    lengths = tensors["lengths"].tolist()
    ids, weights = (torch.split(tensors[name], lengths) for name in ("ids", "weights"))
    sampled: list[Tensor | None] = [None] * len(lengths)
    if "sampled_logprobs" in tensors:
        sampled = [*torch.split(tensors["sampled_logprobs"], [int((each != 0).sum()) for each in weights])]
    return [
        DistilledRow(tokens.tolist(), factors.tolist(), None, logprobs)
        for tokens, factors, logprobs in zip(ids, weights, sampled, strict=True)
    ]
