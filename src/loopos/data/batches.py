"""Pack encoded examples and comparisons into the micro-batches of each optimizer step, without pads, resumable.

A step takes the next `batch_size × accumulation × world` rows of the epoch's order, independent of how they are split,
so that one process and several compute the same sums. Within a step, rows go to the slots (rank, micro-batch) longest
first, each to the slot with the fewest tokens. A comparison's prompt is computed once for all its responses if the
device supports it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from loopos.config.sections import TrainingSection
from loopos.data.preference_tokens import EncodedComparison
from loopos.data.tokens import Encoded
from loopos.functional.packing import PackedLayout

BatchT = TypeVar("BatchT", bound="Counted")
MadeT_co = TypeVar("MadeT_co", covariant=True)


class Rows(Protocol[MadeT_co]):
    """The rows of a data set: how many tokens each has, and a batch of any of them."""

    @property
    def lengths(self) -> Sequence[int]: ...

    def __call__(self, rows: Sequence[int]) -> MadeT_co: ...


@dataclass(frozen=True)
class Batch:
    """Rows of one forward pass, flat.

    `ids` `[T]` int64; `layout` of N sequences; `token_types` `[T]` or None; `targets` `[N]` or `[N, C]`, or None when
    predicting; `rows` `[N]`: row indices; `weights` `[T]` fp32: the factor on the loss of each token as a
    target, or None.
    """

    ids: Tensor
    layout: PackedLayout
    token_types: Tensor | None
    targets: Tensor | None
    rows: tuple[int, ...]
    weights: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.layout.num_tokens


@dataclass(frozen=True)
class Cursor:
    """The position of a run in its data: `epoch` from 0, and completed optimizer steps of the epoch."""

    epoch: int = 0
    step: int = 0


class Counted(Protocol):
    """What the training loop reads from a batch."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def rows(self) -> tuple[int, ...]: ...


class StepSource(Protocol[BatchT]):
    """The batches of each step: of a data set (`StepBatches`), or of what the policy wrote (`RolloutBatches`)."""

    @property
    def num_rows(self) -> int: ...

    @property
    def rows_a_step(self) -> int: ...

    @property
    def steps_an_epoch(self) -> int: ...

    def step(self, cursor: Cursor) -> list[BatchT]:
        """This rank's micro-batches for the step at `cursor`."""
        ...

    def idle(self) -> BatchT:
        """A batch for a process that has no rows in this step but must join the collective calls. Called after
        `step`.
        """
        ...

    def after(self, cursor: Cursor, losses: Mapping[str, float]) -> Cursor:
        """The cursor after a step with these losses."""
        ...


@dataclass(frozen=True)
class PackedRows:
    """Encoded examples as `Rows`, packed into one flat row. targets: of all examples, indexed by row."""

    examples: Sequence[Encoded]
    targets: Tensor | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @cached_property
    def lengths(self) -> list[int]:
        return [len(example.ids) for example in self.examples]

    def __call__(self, rows: Sequence[int]) -> Batch:
        chosen, device = [self.examples[row] for row in rows], self.device
        types = None
        if chosen[0].token_types is not None:
            types = torch.tensor([t for example in chosen for t in example.token_types or ()], device=device)
        weights = None
        if chosen[0].weights is not None:
            factors = [factor for example in chosen for factor in example.weights or ()]
            weights = torch.tensor(factors, dtype=torch.float32, device=device)
        return Batch(
            ids=torch.tensor([token for example in chosen for token in example.ids], device=device),
            layout=PackedLayout(tuple(self.lengths[row] for row in rows), device),
            token_types=types,
            targets=None if self.targets is None else self.targets[torch.as_tensor(list(rows))].to(device),
            rows=tuple(rows),
            weights=weights,
        )


def deal(lengths: Sequence[int], slots: int, capacity: int) -> list[list[int]]:
    """Splits rows over slots so that their token counts are close: longest first, to the lightest slot with room
    (greedy; Graham 1969).

    Returns the indices into `lengths` of each slot's rows, longest first; a slot may stay empty.
    """
    assert len(lengths) <= slots * capacity
    filled: list[list[int]] = [[] for _ in range(slots)]
    tokens = [0] * slots
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        slot = min((s for s in range(slots) if len(filled[s]) < capacity), key=lambda s: (tokens[s], s))
        filled[slot].append(index)
        tokens[slot] += lengths[index]
    return filled


@dataclass(frozen=True)
class StepBatches(Generic[BatchT]):
    """The training data, a step at a time, for one rank.

    `batch_size`: rows per forward pass and rank. `accumulation`: forward passes per step. The last step of an
    epoch takes the remaining rows.
    """

    rows: Rows[BatchT]
    batch_size: int
    accumulation: int = 1
    rank: int = 0
    world: int = 1
    shuffle: bool = True
    seed: int = 42

    @classmethod
    def of(cls, settings: TrainingSection, rows: Rows[BatchT], *, rank: int, world: int) -> StepBatches[BatchT]:
        """The batches for a config's `training` section."""
        return cls(
            rows, settings.batch_size, settings.gradient_accumulation, rank, world, settings.shuffle, settings.seed
        )

    @property
    def num_rows(self) -> int:
        return len(self.rows.lengths)

    @property
    def rows_a_step(self) -> int:
        return self.batch_size * self.accumulation * self.world

    @property
    def steps_an_epoch(self) -> int:
        return -(-self.num_rows // self.rows_a_step)

    def order(self, epoch: int) -> np.ndarray:
        """The epoch's order of rows; depends only on seed and epoch."""
        if not self.shuffle:
            return np.arange(self.num_rows)
        return shuffled(self.num_rows, self.seed, epoch)

    def rows_of(self, cursor: Cursor) -> list[list[int]]:
        """The rows of this rank's micro-batches in the step at `cursor`."""
        group = self.order(cursor.epoch)[cursor.step * self.rows_a_step :][: self.rows_a_step].tolist()
        slots = deal([self.rows.lengths[row] for row in group], self.accumulation * self.world, self.batch_size)
        return [[group[index] for index in slot] for slot in slots[self.rank :: self.world]]

    def step(self, cursor: Cursor) -> list[BatchT]:
        """This rank's micro-batches of the step at `cursor`, without empty ones."""
        return [self.rows(rows) for rows in self.rows_of(cursor) if rows]

    def idle(self) -> BatchT:
        """A batch of the shortest row."""
        return self.rows([min(range(self.num_rows), key=lambda row: self.rows.lengths[row])])

    def after(self, cursor: Cursor, losses: Mapping[str, float] | None = None) -> Cursor:
        """The cursor of the next step."""
        return (
            Cursor(cursor.epoch, cursor.step + 1)
            if cursor.step + 1 < self.steps_an_epoch
            else Cursor(cursor.epoch + 1, 0)
        )


@dataclass(frozen=True)
class DerivedBatches(Generic[BatchT]):
    """The steps of `batches`; a subclass overrides `step` to add what a step needs before its losses, or `after`.
    observe: takes the named means of each step.
    """

    batches: StepSource[BatchT]
    observe: Callable[[Mapping[str, float]], None] = field(default=lambda losses: None, kw_only=True)

    @property
    def num_rows(self) -> int:
        return self.batches.num_rows

    @property
    def rows_a_step(self) -> int:
        return self.batches.rows_a_step

    @property
    def steps_an_epoch(self) -> int:
        return self.batches.steps_an_epoch

    def step(self, cursor: Cursor) -> list[BatchT]:
        """This rank's micro-batches of the step at `cursor`."""
        return self.batches.step(cursor)

    def idle(self) -> BatchT:
        """A batch of the shortest row."""
        return self.batches.idle()

    def after(self, cursor: Cursor, losses: Mapping[str, float]) -> Cursor:
        """The cursor of the next step."""
        self.observe(losses)
        return self.batches.after(cursor, losses)


@lru_cache(maxsize=2)
def shuffled(number: int, seed: int, turn: int) -> np.ndarray:
    """The order of `number` rows in pass `turn` over them, from these numbers only; read-only. A permutation takes 40
    ms for a million rows, and every step asks for that of its pass: the latest two are remembered.
    """
    order = np.random.Generator(np.random.PCG64([seed, turn])).permutation(number)
    order.flags.writeable = False
    return order


def in_order(rows: Rows[BatchT], *, tokens: int) -> Iterator[BatchT]:
    """Batches for evaluation: rows of similar length, about `tokens` tokens each; every row occurs once."""
    for pack in in_packs(rows.lengths, tokens=tokens):
        yield rows(pack)


def in_step(rows: Rows[BatchT], *, tokens: int, rank: int, world: int) -> Iterator[tuple[BatchT, bool]]:
    """The batches of `in_order`, distributed over ranks, the same number on each. False marks a filler batch whose
    results do not count; it only keeps the ranks in step.
    """
    packs = list(in_packs(rows.lengths, tokens=tokens))
    for first in range(0, len(packs), world):
        own = first + rank
        yield (rows(packs[own]), True) if own < len(packs) else (rows(packs[0][:1]), False)


def in_packs(lengths: Sequence[int], *, tokens: int) -> Iterator[list[int]]:
    """Indices of rows, grouped by similar length into packs of at most `tokens` tokens (or one row)."""
    pack: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: (lengths[row], row)):
        if pack and sum(lengths[r] for r in pack) + lengths[row] > tokens:
            yield pack
            pack = []
        pack.append(row)
    if pack:
        yield pack


@dataclass(frozen=True)
class ComparisonBatch:
    """Comparisons of one forward pass, flat, with N responses and P pairs.

    `ids` `[T]`; `layout`: N sequences, or one per comparison with a continuation per response. `better`, `worse`
    `[P]`: indices of the N responses; `probabilities`, `margins`, `weights` `[P]` fp32. The weights of a comparison's
    pairs sum to 1, so that each prompt counts equally (Ouyang et al. 2022, section 3.5). `lengths` `[N]`: tokens of
    each response that count.
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
    """Encoded comparisons as `Rows`. `share_prompts`: compute a prompt once for all its responses. `margins`: use the
    margins of the rows. `soft_labels`: use their probabilities, else 1 for the better response.
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
            better=self._tensor([start + pair.better for start, pair, _ in pairs]),
            worse=self._tensor([start + pair.worse for start, pair, _ in pairs]),
            probabilities=self._tensor(probabilities).float(),
            margins=self._tensor([pair.margin if self.margins else 0.0 for _, pair, _ in pairs]).float(),
            weights=self._tensor([weight for _, _, weight in pairs]).float(),
            rows=tuple(rows),
            lengths=tuple(len(each.counted(number)) for each in chosen for number in range(len(each.responses))),
        )

    def _tensor(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=self.device)

    def _tokens(self, example: EncodedComparison) -> list[int]:
        if self.share_prompts:
            return [*example.prompt, *(token for response in example.responses for token in response)]
        return [token for response in example.responses for token in (*example.prompt, *response)]

    def _layout(self, chosen: Sequence[EncodedComparison]) -> PackedLayout:
        if self.share_prompts:
            segments = [(len(example.prompt), *map(len, example.responses)) for example in chosen]
            return PackedLayout.of_shared_prefixes(segments, self.device)
        lengths = [len(example.prompt) + len(response) for example in chosen for response in example.responses]
        return PackedLayout(tuple(lengths), self.device)
