"""Responses behind their prompts → packed batches in which every token of a response knows what is known of it.

Enters: token ids, and columns with a number a token. Leaves: `ResponseBatch`es. Left out: what the columns mean.
Letters: T tokens of a packed row, M tokens of its responses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from loopos.functional.packing import PackedLayout


@dataclass(frozen=True)
class ResponseBatch:
    """Responses of one forward pass behind their prompts, flat; M tokens of responses.

    `ids` `[T]`; `places` `[M]`: positions whose hidden states predict the tokens `targets` `[M]`, the state before each
    token. `old_logprobs`, `reference_logprobs`, `values` (old), `advantages`, `returns` `[M]` fp32. `is_first`: the
    policy is still the one that wrote the responses.
    """

    ids: Tensor
    layout: PackedLayout
    places: Tensor
    targets: Tensor
    rows: tuple[int, ...]
    columns: Mapping[str, Tensor]
    is_first: bool = False

    @property
    def num_tokens(self) -> int:
        return self.layout.num_tokens


@dataclass(frozen=True)
class ResponseRows:
    """Prompts with responses as `Rows` of `ResponseBatch`es. columns: name → what is known of each token of each
    response.
    """

    prompts: Sequence[Sequence[int]]
    responses: Sequence[Sequence[int]]
    device: torch.device
    columns: Mapping[str, Sequence[Tensor]] | None = None

    @cached_property
    def lengths(self) -> list[int]:
        return [len(prompt) + len(response) for prompt, response in zip(self.prompts, self.responses, strict=True)]

    def __call__(self, rows: Sequence[int], *, is_first: bool = False) -> ResponseBatch:
        ids: list[int] = []
        places: list[int] = []
        for row in rows:
            places += range(len(ids) + len(self.prompts[row]) - 1, len(ids) + self.lengths[row] - 1)
            ids += [*self.prompts[row], *self.responses[row]]
        flat = torch.tensor(ids, device=self.device)
        before = torch.tensor(places, device=self.device)
        columns = {name: torch.cat([column[row] for row in rows]) for name, column in (self.columns or {}).items()}
        return ResponseBatch(
            ids=flat,
            layout=PackedLayout(tuple(self.lengths[row] for row in rows), self.device),
            places=before,
            targets=flat[before + 1],
            rows=tuple(rows),
            columns={name: column.to(self.device) for name, column in columns.items()},
            is_first=is_first,
        )
