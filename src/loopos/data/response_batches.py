"""Comparisons as packed batches whose response tokens have log-probabilities.

Letters: T tokens of a packed row, N responses, M tokens of responses that count, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loopos.data.batches import ComparisonBatch, ComparisonRows
from loopos.data.preference_tokens import EncodedComparison
from loopos.functional.packing import PackedLayout


@dataclass(frozen=True)
class PreferenceBatch:
    """Comparisons of one forward pass.

    `positions` `[M]`: positions of the row whose hidden states predict the tokens `targets` `[M]`; `response` `[M]`:
    the index among the N responses of each of these tokens. `reference` `[M]` fp32: log-probabilities of the reference,
    None where it is computed with the policy's pass or not at all. `sorted_reference`: see `Pairs`. `is_first`: no step
    has changed the weights yet, so the policy is the reference.
    """

    pairs: ComparisonBatch
    positions: Tensor
    targets: Tensor
    response: Tensor
    reference: Tensor | None = None
    sorted_reference: Tensor | None = None
    is_first: bool = False

    @property
    def ids(self) -> Tensor:
        return self.pairs.ids

    @property
    def layout(self) -> PackedLayout:
        return self.pairs.layout

    @property
    def rows(self) -> tuple[int, ...]:
        return self.pairs.rows

    @property
    def num_tokens(self) -> int:
        return self.pairs.num_tokens

    @property
    def lengths(self) -> Tensor:
        """Tokens of each response, `[N]` fp32."""
        return torch.tensor(self.pairs.lengths, dtype=torch.float32, device=self.ids.device)

    def per_response(self, values: Tensor) -> Tensor:
        """Sums of values `[M]` by response, `[N]` fp32."""
        total = torch.zeros(len(self.pairs.lengths), dtype=torch.float32, device=values.device)
        return total.index_add(0, self.response, values)


@dataclass(frozen=True)
class PreferenceRows:
    """Comparisons as rows of `PreferenceBatch`es. reference: the log-probabilities of each comparison's response
    tokens, concatenated in the order of its responses.
    """

    comparisons: ComparisonRows
    reference: Sequence[Tensor] | None = None

    @property
    def lengths(self) -> Sequence[int]:
        return self.comparisons.lengths

    @property
    def examples(self) -> Sequence[EncodedComparison]:
        return self.comparisons.examples

    def __call__(self, rows: Sequence[int]) -> PreferenceBatch:
        pairs = self.comparisons(rows)
        positions, targets, response = self._tokens([self.examples[row] for row in rows])
        device = self.comparisons.device
        reference = None if self.reference is None else torch.cat([self.reference[row] for row in rows]).to(device)
        return PreferenceBatch(
            pairs,
            torch.tensor(positions, device=device),
            torch.tensor(targets, device=device),
            torch.tensor(response, device=device),
            reference,
        )

    def _tokens(self, chosen: Sequence[EncodedComparison]) -> tuple[list[int], list[int], list[int]]:
        """Positions before the tokens that count, the tokens, and the number of each token's response."""
        positions: list[int] = []
        targets: list[int] = []
        response: list[int] = []
        start = number = 0
        for example in chosen:
            prompt, shared = len(example.prompt), self.comparisons.share_prompts
            first = start + prompt
            for index, ids in enumerate(example.responses):
                if not shared:
                    first = start + prompt
                # The first token of a response is predicted by the last token of the prompt.
                before = [(start + prompt if shared else first) - 1, *range(first, first + len(ids) - 1)]
                own = example.counted(index)
                positions += [before[token] for token in own]
                targets += [ids[token] for token in own]
                response += [number] * len(own)
                number += 1
                first += len(ids)
                if not shared:
                    start = first
            if shared:
                start = first
        return positions, targets, response
