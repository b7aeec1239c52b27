"""Rows of tokens that a causal language model continues. All model calls of generation go through this module.

`CachedRows` runs many rows together over LoopOS's cache; `PlainRows` runs any model row by row with transformers'
cache. `decoders.py` chooses between them.
Letters: N rows, B rows that decode, V tokens of the vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loopos.functional.packing import PackedLayout
from loopos.functional.reductions import segment_reduce
from loopos.generation.cache import IMPLEMENTATION, KeyValueCache, PromptPass, TokenPass
from loopos.models.backbone import headless
from loopos.models.quantized import QuantizedLinear

# transformers' own attention that every model has.
PLAIN = "eager"
# Up to this many rows a bf16 product on a CPU is as fast with the plain weight as in the kernel layout.
FEW_ROWS = 2


class Rows(Protocol):
    """The interface of rows. `fed[i]`: the tokens of row i."""

    @property
    def fed(self) -> list[list[int]]: ...

    def extend(self, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """Appends tokens (at least one each) to these rows; logits after each row's last token, `[N, V]`."""
        ...

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Appends tokens[i] to row i, for the first B rows; logits `[B, V]`."""
        ...

    def cut(self, row: int, length: int) -> None:
        """Truncates a row to its first `length` tokens."""
        ...

    def copy(self, source: int, target: int, length: int) -> None:
        """Replaces a row by the first `length` tokens of another."""
        ...

    def select(self, sources: Sequence[int]) -> None:
        """Row i becomes row sources[i], all at once."""
        ...


@contextmanager
def prepared(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """The model in evaluation mode with this attention; restored at exit."""
    before = model.config._attn_implementation
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        for module in training:
            module.training = True


def without_gradients(implementation: str) -> torch.inference_mode | torch.no_grad:
    """The context in which a forward of generation runs. Inference tensors cost less (5% of a decode step). They stay
    within LoopOS's cache, while transformers' code may store a tensor in the model, where training would use it.
    """
    return torch.inference_mode() if implementation == IMPLEMENTATION else torch.no_grad()


@contextmanager
def serving(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """The model prepared for generation, and without gradients."""
    with prepared(model, implementation), without_gradients(implementation):
        yield


def _streams_weights(model: PreTrainedModel) -> bool:
    """Whether products of few rows should bypass oneDNN, which reorders the whole bf16 weight for each product
    (measured with 1.8 MB and one row: 0.19 ms; torch's own vector product 0.08 ms). Not for GPT-2's transposed weights,
    which would be much slower, nor for integer products.
    """
    plain = not any(isinstance(module, Conv1D | QuantizedLinear) for module in model.modules())
    return plain and model.device.type == "cpu" and model.dtype is torch.bfloat16


@contextmanager
def _without_onednn() -> Iterator[None]:
    enabled, *_ = torch.backends.mkldnn.set_flags(False, None, None, None)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(enabled, None, None, None)  # type: ignore[no-untyped-call]


class CachedRows:
    """Rows that decode together over one cache, without pads. Use within `serving(model, IMPLEMENTATION)`."""

    def __init__(self, model: PreTrainedModel, num_rows: int) -> None:
        self._model = model
        self._cache = KeyValueCache()
        self._device = model.device
        self._extra: dict[str, bool] = {} if getattr(model.config, "use_cache", None) is None else {"use_cache": False}
        self._few = FEW_ROWS if _streams_weights(model) else 0
        self.fed: list[list[int]] = [[] for _ in range(num_rows)]

    def extend(self, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        layout = PackedLayout(tuple(map(len, tokens)), self._device)
        starts = tuple(len(self.fed[row]) for row in rows)
        for row, new in zip(rows, tokens, strict=True):
            self.fed[row] += new
        self._cache.make_room(1 + max(rows), max(len(self.fed[row]) for row in rows))
        prompt_pass = PromptPass.of(self._cache, layout, rows, starts)
        ids = torch.tensor([token for new in tokens for token in new], device=self._device)
        return self._logits(ids[None], prompt_pass.columns[None], prompt_pass, layout.ends())[0]

    def step(self, tokens: Sequence[int]) -> Tensor:
        lengths = [len(row_tokens) for row_tokens in self.fed[: len(tokens)]]
        for row_tokens, token in zip(self.fed, tokens, strict=False):
            row_tokens.append(token)
        longest = 1 + max(lengths)
        self._cache.make_room(len(tokens), longest)
        columns = torch.tensor(lengths, device=self._device)
        ids = torch.tensor(tokens, device=self._device)
        return self._logits(ids[:, None], columns[:, None], TokenPass.of(self._cache, columns, longest), 0)[:, -1]

    def _logits(
        self, ids: Tensor, positions: Tensor, cached: PromptPass | TokenPass, logits_to_keep: Tensor | int
    ) -> Tensor:
        with _without_onednn() if ids.numel() <= self._few else nullcontext():
            logits: Tensor = self._model(
                input_ids=ids, position_ids=positions, cached_pass=cached, logits_to_keep=logits_to_keep, **self._extra
            ).logits
        return logits

    def cut(self, row: int, length: int) -> None:
        del self.fed[row][length:]

    def copy(self, source: int, target: int, length: int) -> None:
        assert length <= len(self.fed[source])
        if source != target:
            self._cache.make_room(1 + target, length)
            self._cache.copy(source, target, slice(0, length))
        self.fed[target] = self.fed[source][:length]

    def select(self, sources: Sequence[int]) -> None:
        # Beams of one prompt share their first columns: only columns from the first difference on need to move.
        moved = [(target, source) for target, source in enumerate(sources) if target != source]
        if not moved:
            return
        first = min(common_length(self.fed[a], self.fed[b]) for a, b in moved)
        longest = max(len(self.fed[source]) for _, source in moved)
        self._cache.make_room(len(sources), longest)
        self._cache.select(sources, slice(first, longest))
        fed = [list(self.fed[source]) for _, source in moved]
        for (target, _), tokens in zip(moved, fed, strict=True):
            self.fed[target] = tokens


def mean_hidden_states(model: PreTrainedModel, implementation: str, sequences: Sequence[Sequence[int]]) -> Tensor:
    """The mean of the last layer's hidden states over the tokens of each sequence, `[N, d]` fp32. Call within
    `serving(model, implementation)`; rows that decode are not affected.
    """
    base = headless(model)
    extra: dict[str, object] = {} if getattr(model.config, "use_cache", None) is None else {"use_cache": False}
    if implementation == PLAIN:
        outputs = [base(input_ids=torch.tensor([list(ids)], device=model.device), **extra) for ids in sequences]
        return torch.stack([output.last_hidden_state[0].float().mean(0) for output in outputs])
    layout = PackedLayout(tuple(map(len, sequences)), model.device)
    cache = KeyValueCache()
    cache.make_room(len(sequences), max(layout.lengths))
    prompt_pass = PromptPass.of(cache, layout, range(len(sequences)), [0] * len(sequences))
    ids = torch.tensor([token for sequence in sequences for token in sequence], device=model.device)
    output = base(input_ids=ids[None], position_ids=prompt_pass.columns[None], cached_pass=prompt_pass, **extra)
    return segment_reduce(output.last_hidden_state[0], layout.lengths_tensor(), "mean")


class PlainRows:
    """Rows that run one by one, each with the model's own transformers cache, or with none if the model returns none or
    `own_cache` is False. Slow, but as exact as the model itself. Use within `serving(model, PLAIN)`.
    """

    def __init__(self, model: PreTrainedModel, num_rows: int, *, own_cache: bool = True) -> None:
        self._model, self._own_cache = model, own_cache
        self._caches: list[object | None] = [None] * num_rows
        self.fed: list[list[int]] = [[] for _ in range(num_rows)]

    def extend(self, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        return torch.stack([self._run(row, list(new)) for row, new in zip(rows, tokens, strict=True)])

    def step(self, tokens: Sequence[int]) -> Tensor:
        return torch.stack([self._run(row, [token]) for row, token in enumerate(tokens)])

    def cut(self, row: int, length: int) -> None:
        """Some caches cannot be truncated, so the cache is rebuilt with the next tokens."""
        if length < len(self.fed[row]):
            del self.fed[row][length:]
            self._caches[row] = None

    def copy(self, source: int, target: int, length: int) -> None:
        if source != target:
            self._caches[target] = copy.deepcopy(self._caches[source])
            self.fed[target] = list(self.fed[source])
        self.cut(target, length)

    def select(self, sources: Sequence[int]) -> None:
        caches, fed = list(self._caches), [list(tokens) for tokens in self.fed]
        for target, source in enumerate(sources):
            if target != source:
                self._caches[target], self.fed[target] = copy.deepcopy(caches[source]), list(fed[source])

    def _run(self, row: int, new: list[int]) -> Tensor:
        self.fed[row] += new
        cache = self._caches[row]
        ids = torch.tensor([self.fed[row] if cache is None else new], device=self._model.device)
        takes_cache = getattr(self._model.config, "use_cache", None) is not None
        extra: dict[str, object] = {"use_cache": self._own_cache} if takes_cache else {}
        if cache is not None:
            extra["past_key_values"] = cache
        output = self._model(input_ids=ids, **extra)
        self._caches[row] = getattr(output, "past_key_values", None) if self._own_cache else None
        logits: Tensor = output.logits
        return logits[0, -1]


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix of two rows."""
    shared = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        shared += 1
    return shared
