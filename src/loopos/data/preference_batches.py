"""Encoded comparisons → packed batches: every response once, and which of them beat which.

Enters: encoded comparisons. Leaves: `ComparisonBatch`es. A prompt is computed once for all its responses where the
device allows, else before each. Left out: tokens (`preference_tokens`), the order of rows (`batches`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from loopos.data.preference_tokens import EncodedComparison
from loopos.functional.packing import PackedLayout


@dataclass(frozen=True)
class ComparisonBatch:
    """Comparisons of one forward pass, flat, with N responses and P pairs.

    `ids` `[T]`; `layout`: N sequences, or a sequence a comparison with a branch a response. `better`, `worse` `[P]`:
    places among the N responses; `probabilities`, `margins`, `weights` `[P]` fp32. The pairs of a comparison weigh 1
    together, so that each prompt counts alike (Ouyang et al. 2022, section 3.5). `lengths` `[N]`: tokens of each
    response.
    """

    ids: Tensor
    layout: PackedLayout
    better: Tensor
    worse: Tensor
    probabilities: Tensor
    margins: Tensor
    weights: Tensor
    rows: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return self.layout.num_tokens


@dataclass(frozen=True)
class ComparisonRows:
    """Encoded comparisons as `Rows`. share_prompts: compute a prompt once for all its responses. margins: take those
    of the rows; soft_labels: take their probabilities, else the better response is certain to be preferred.
    """

    examples: Sequence[EncodedComparison]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    share_prompts: bool = False
    margins: bool = False
    soft_labels: bool = True

    @cached_property
    def lengths(self) -> list[int]:
        if self.share_prompts:
            return [example.num_tokens for example in self.examples]
        return [sum(len(e.prompt) + len(response) for response in e.responses) for e in self.examples]

    def __call__(self, rows: Sequence[int]) -> ComparisonBatch:
        chosen = [self.examples[row] for row in rows]
        pairs, first = [], 0
        for example in chosen:
            pairs += [(first, pair, 1.0 / len(example.pairs)) for pair in example.pairs]
            first += len(example.responses)
        probabilities = [
            1.0 if pair.probability != 0.5 and not self.soft_labels else pair.probability for _, pair, _ in pairs
        ]
        return ComparisonBatch(
            ids=self._tensor([token for example in chosen for token in self._tokens(example)]),
            layout=self._layout(chosen),
            better=self._tensor([place + pair.better for place, pair, _ in pairs]),
            worse=self._tensor([place + pair.worse for place, pair, _ in pairs]),
            probabilities=self._tensor(probabilities).float(),
            margins=self._tensor([pair.margin if self.margins else 0.0 for _, pair, _ in pairs]).float(),
            weights=self._tensor([weight for _, _, weight in pairs]).float(),
            rows=tuple(rows),
            lengths=tuple(len(response) for example in chosen for response in example.responses),
        )

    def _tensor(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=self.device)

    def _tokens(self, example: EncodedComparison) -> list[int]:
        if self.share_prompts:
            return [*example.prompt, *(token for response in example.responses for token in response)]
        return [token for response in example.responses for token in (*example.prompt, *response)]

    def _layout(self, chosen: Sequence[EncodedComparison]) -> PackedLayout:
        if self.share_prompts:
            branches = [(len(example.prompt), *map(len, example.responses)) for example in chosen]
            return PackedLayout.of_branches(branches, self.device)
        lengths = [len(example.prompt) + len(response) for example in chosen for response in example.responses]
        return PackedLayout(tuple(lengths), self.device)
