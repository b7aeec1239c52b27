"""How a model is to generate: what it can be served by, found by running it.

Enters: a loaded causal language model. Leaves: whether rows may decode together over our cache, and whether with the
weights in the kernel's layout; each is taken where it gives the logits of every sequence run alone. Left out: the rows
(`rows.py`), the layout (`kernel_layout.py`).

What generation runs on: one model the way that serves it, or the members of an ensemble side by side.

Enters: a causal language model or a `LanguageEnsemble`. Leaves: rows, and the model set for generation meanwhile. Left
out: finding that way (`decode_path.py`), rows of one model (`rows.py`), the engine.
Letters: N rows given, V tokens of the vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from loopos.config.diagnostics import UserError
from loopos.generation.cache import IMPLEMENTATION
from loopos.generation.cpu.layers import kernel_layout
from loopos.generation.rows import (
    FEW_ROWS,
    PLAIN,
    CachedRows,
    PlainRows,
    Rows,
    mean_hidden_states,
    prepared,
    serving,
    without_gradients,
)
from loopos.models.attention import PackedUnsupported
from loopos.models.language_ensemble import LanguageEnsemble
from loopos.models.quantized import exact_activations

_SERVED_LAYERS = frozenset({"full_attention", "sliding_attention"})
# Frequencies that change with the longest row of the batch: a row's text would depend on its neighbours.
_BATCH_DEPENDENT_ROTARY = frozenset({"dynamic", "longrope"})
# At least four tokens each.
_PROBE_LENGTHS = (6, 10, 4, 8)
# Largest difference of logits, relative to the largest logit: kernels round differently for different shapes.
_PROBE_TOLERANCE = {torch.float32: 2e-4, torch.float64: 2e-4, torch.bfloat16: 0.06, torch.float16: 0.02}


@dataclass(frozen=True)
class DecodePath:
    """How a model is to generate. `why_plain`: why `CachedRows` cannot serve it, in words; empty where it can.
    `kernel_layout`: whether it gives the same logits with its weights in the kernel's layout. `own_cache`: whether the
    model's own cache, which rows that run one by one use, gives the logits of a whole pass.
    """

    why_plain: str
    kernel_layout: bool = False
    own_cache: bool = True

    def layout(self, model: PreTrainedModel, num_rows: int) -> AbstractContextManager[None]:
        """The weights as rows that decode together want them: a few are as fast with the weights as they lie."""
        return kernel_layout(model) if self.kernel_layout and num_rows > FEW_ROWS else nullcontext()


def probed(model: PreTrainedModel) -> DecodePath:
    """Runs some sequences on these weights: the cached road is taken where it gives the logits of each run alone, and
    the kernel's layout where it does so too.
    """
    with exact_activations(model):
        decode_path = _probed(model)
        return replace(decode_path, own_cache=_own_cache_is_exact(model)) if decode_path.why_plain else decode_path


def _probed(model: PreTrainedModel) -> DecodePath:
    unserved = _unserved(model.config.get_text_config())
    if unserved:
        return DecodePath(unserved)
    draw, vocabulary = random.Random(0), model.config.get_text_config().vocab_size
    first = min(3, vocabulary - 1)
    sequences = [[draw.randrange(first, vocabulary) for _ in range(length)] for length in _PROBE_LENGTHS]
    with serving(model, PLAIN):
        alone = [model(input_ids=torch.tensor([ids], device=model.device)).logits[0, -4:] for ids in sequences]
    expected = torch.cat(alone).float()
    difference = _difference(model, sequences, expected)
    if difference or model.device.type != "cpu" or model.dtype is not torch.bfloat16:
        return DecodePath(difference)
    with kernel_layout(model):
        return DecodePath("", kernel_layout=not _difference(model, sequences, expected))


def _difference(model: PreTrainedModel, sequences: Sequence[list[int]], expected: Tensor) -> str:
    """What speaks against `CachedRows`, in words."""
    try:
        with serving(model, IMPLEMENTATION):
            together = _probe(model, sequences)
    except (PackedUnsupported, ValueError, TypeError, AssertionError, RuntimeError) as problem:
        return (str(problem).splitlines() or [type(problem).__name__])[0]
    difference = float((together.float() - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
    tolerance = _PROBE_TOLERANCE.get(model.dtype, 0.06)
    return "" if difference <= tolerance else f"its logits differ from each row alone by {difference:.1e}"


def _own_cache_is_exact(model: PreTrainedModel) -> bool:
    """Whether a prompt and two more tokens give, over the cache that the model returns, the logits of whole passes."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = [number % vocabulary for number in range(3, 3 + _PROBE_LENGTHS[0])]
    with serving(model, PLAIN):
        whole = [
            model(input_ids=torch.tensor([ids[:end]], device=model.device)).logits[0, -1] for end in (-2, -1, None)
        ]
        rows = PlainRows(model, 1)
        try:
            found = [rows.extend([0], [ids[:-2]])[0], rows.step(ids[-2:-1])[0], rows.step(ids[-1:])[0]]
        except (ValueError, TypeError, AttributeError, IndexError, RuntimeError):
            return False
    expected = torch.stack(whole).float()
    difference = (torch.stack(found).float() - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
    return bool(difference <= _PROBE_TOLERANCE.get(model.dtype, 0.06))


def _unserved(config: PreTrainedConfig) -> str:
    """What the configuration asks for that the cache cannot give, in words."""
    layers = set(getattr(config, "layer_types", None) or ()) - _SERVED_LAYERS
    if layers:
        return f"its layers use {', '.join(sorted(layers))}"
    rotary = getattr(config, "rope_parameters", None) or {}
    kinds = {str(part.get("rope_type")) for part in (rotary, *rotary.values()) if isinstance(part, dict)}
    moving = kinds & _BATCH_DEPENDENT_ROTARY
    if moving:
        return f"its rotary positions ({', '.join(sorted(moving))}) depend on the longest row of a batch"
    return ""


def _probe(model: PreTrainedModel, sequences: Sequence[list[int]]) -> Tensor:
    """Logits after each of every sequence's last four tokens, `[4N, V]`: all but three packed, the next two in steps,
    the last as a continuation.
    """
    rows = CachedRows(model, len(sequences))
    every = range(len(sequences))
    parts = [rows.extend(every, [ids[:-3] for ids in sequences])]
    parts += [rows.step([ids[place] for ids in sequences]) for place in (-3, -2)]
    parts.append(rows.extend(every, [ids[-1:] for ids in sequences]))
    return torch.stack(parts, 1).flatten(0, 1)


class Runner(Protocol):
    """What the engine asks. `path`: "cached", rows together over our cache, or "plain", row by row with transformers'
    cache; `why_plain`: why the plain path was taken, in words.
    """

    path: str
    why_plain: str

    def layout(self, num_rows: int) -> AbstractContextManager[object]:
        """The weights as so many rows want them."""
        ...

    def ready(self, num_rows: int) -> AbstractContextManager[object]:
        """Set for generation of so many rows, and then as it was."""
        ...

    def without_gradients(self) -> torch.inference_mode | torch.no_grad:
        """What forwards run under."""
        ...

    def rows(self, num_rows: int) -> Rows:
        """New rows."""
        ...

    def embed(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Mean hidden states `[N, d]`. Raises `UserError` where there are none."""
        ...


def runner_of(model: PreTrainedModel | LanguageEnsemble) -> Runner:
    """Runs a few sequences on the weights to find the way."""
    if isinstance(model, LanguageEnsemble):
        return EnsembleRunner(model)
    return ModelRunner(model)


class ModelRunner:
    """One model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._road = model, probed(model)
        self.why_plain = self._road.why_plain
        self.path = "plain" if self.why_plain else "cached"

    @property
    def _attention(self) -> str:
        """The attention function that the path runs with."""
        return IMPLEMENTATION if self.path == "cached" else PLAIN

    def layout(self, num_rows: int) -> AbstractContextManager[None]:
        return self._road.layout(self._model, num_rows)

    @contextmanager
    def ready(self, num_rows: int) -> Iterator[None]:
        with self.layout(num_rows), prepared(self._model, self._attention):
            yield

    def without_gradients(self) -> torch.inference_mode | torch.no_grad:
        return without_gradients(self._attention)

    def rows(self, num_rows: int) -> Rows:
        if self.path == "cached":
            return CachedRows(self._model, num_rows)
        return PlainRows(self._model, num_rows, own_cache=self._road.own_cache)

    def embed(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        return mean_hidden_states(self._model, self._attention, sequences)


class EnsembleRunner:
    """Every member runs every row, each over a cache of its own."""

    def __init__(self, ensemble: LanguageEnsemble) -> None:
        self._ensemble, self._members = ensemble, [ModelRunner(member) for member in ensemble.members]
        self.why_plain = "; ".join(
            f"member {number}: {member.why_plain}"
            for number, member in enumerate(self._members, start=1)
            if member.why_plain
        )

    @property
    def path(self) -> str:
        """ "plain" where a member's is."""
        return "plain" if any(member.path == "plain" for member in self._members) else "cached"

    @path.setter
    def path(self, path: str) -> None:
        for member in self._members:
            member.path = path

    def layout(self, num_rows: int) -> AbstractContextManager[object]:
        return self._entered([member.layout(num_rows) for member in self._members])

    def ready(self, num_rows: int) -> AbstractContextManager[object]:
        return self._entered([member.ready(num_rows) for member in self._members])

    def without_gradients(self) -> torch.inference_mode | torch.no_grad:
        return without_gradients(IMPLEMENTATION if self.path == "cached" else PLAIN)

    def rows(self, num_rows: int) -> Rows:
        return MixedRows([member.rows(num_rows) for member in self._members], self._ensemble.mixed)

    def embed(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        raise UserError(
            f"an ensemble of {len(self._members)} language models has no hidden states of its own; expected one model"
        )

    @contextmanager
    def _entered(self, contexts: Sequence[AbstractContextManager[object]]) -> Iterator[None]:
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            yield


class MixedRows:
    """Rows that hold the same tokens in every member, and whose logits are the members', mixed."""

    def __init__(self, members: Sequence[Rows], mixed: Callable[[Sequence[Tensor]], Tensor]) -> None:
        self._members, self._mixed = members, mixed

    @property
    def fed(self) -> list[list[int]]:
        return self._members[0].fed

    def extend(self, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        return self._mixed([member.extend(rows, tokens) for member in self._members])

    def step(self, tokens: Sequence[int]) -> Tensor:
        return self._mixed([member.step(tokens) for member in self._members])

    def cut(self, row: int, length: int) -> None:
        for member in self._members:
            member.cut(row, length)

    def copy(self, source: int, target: int, length: int) -> None:
        for member in self._members:
            member.copy(source, target, length)

    def select(self, sources: Sequence[int]) -> None:
        for member in self._members:
            member.select(sources)
