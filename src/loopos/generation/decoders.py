"""Chooses the decode path of a model by running it, and runs generation over one model or the members of an ensemble.

The cached path and the kernel layout are used only if they reproduce the logits of each sequence run separately.
Letters: N rows, V tokens of the vocabulary.
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
from loopos.generation.cpu.layers import has_bf16_kernels, kernel_layout
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
# Their frequencies depend on the longest row of the batch, so a row's text would depend on its neighbors.
_BATCH_DEPENDENT_ROTARY = frozenset({"dynamic", "longrope"})
# At least four tokens each.
_PROBE_LENGTHS = (6, 10, 4, 8)
# Maximum difference of logits relative to the largest logit: kernels round differently for different shapes.
_PROBE_TOLERANCE = {torch.float32: 2e-4, torch.float64: 2e-4, torch.bfloat16: 0.06, torch.float16: 0.02}


@dataclass(frozen=True)
class DecodePath:
    """How a model generates. `why_plain`: why `CachedRows` cannot serve it; empty if it can. `kernel_layout`: whether
    logits stay equal with the weights in the kernel layout. `own_cache`: whether the model's own cache, which plain
    rows use, reproduces the logits of a full pass.
    """

    why_plain: str
    kernel_layout: bool = False
    own_cache: bool = True

    def layout(self, model: PreTrainedModel, num_rows: int) -> AbstractContextManager[None]:
        """The weight layout for this many rows: a few rows are as fast without the kernel layout."""
        return kernel_layout(model) if self.kernel_layout and num_rows > FEW_ROWS else nullcontext()


def probed(model: PreTrainedModel) -> DecodePath:
    """Runs a few sequences on these weights and chooses the decode path."""
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
        separate = [model(input_ids=torch.tensor([ids], device=model.device)).logits[0, -4:] for ids in sequences]
    expected = torch.cat(separate).float()
    difference = _difference(model, sequences, expected)
    bf16_on_cpu = model.device.type == "cpu" and model.dtype is torch.bfloat16
    if difference or not bf16_on_cpu or not has_bf16_kernels():
        return DecodePath(difference)
    with kernel_layout(model):
        return DecodePath("", kernel_layout=not _difference(model, sequences, expected))


def _difference(model: PreTrainedModel, sequences: Sequence[list[int]], expected: Tensor) -> str:
    """Why `CachedRows` cannot serve the model; empty if it can."""
    try:
        with serving(model, IMPLEMENTATION):
            together = _probe(model, sequences)
    except (PackedUnsupported, ValueError, TypeError, AssertionError, RuntimeError) as problem:
        return (str(problem).splitlines() or [type(problem).__name__])[0]
    difference = float((together.float() - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
    tolerance = _PROBE_TOLERANCE.get(model.dtype, 0.06)
    return "" if difference <= tolerance else f"its logits differ from those of separate rows by {difference:.1e}"


def _own_cache_is_exact(model: PreTrainedModel) -> bool:
    """Whether a prompt and two more tokens over the model's own cache reproduce the logits of full passes."""
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
    """What in the config the cache does not support; empty if it supports all."""
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
    """Logits after each of every sequence's last four tokens, `[4N, V]`: all but three tokens packed, the next two as
    decode steps, the last as a continuation.
    """
    rows = CachedRows(model, len(sequences))
    every = range(len(sequences))
    parts = [rows.extend(every, [ids[:-3] for ids in sequences])]
    parts += [rows.step([ids[index] for ids in sequences]) for index in (-3, -2)]
    parts.append(rows.extend(every, [ids[-1:] for ids in sequences]))
    return torch.stack(parts, 1).flatten(0, 1)


class Runner(Protocol):
    """The interface of the engine to a model or ensemble. `path`: "cached" (batched rows over LoopOS's cache) or
    "plain" (row by row with transformers' cache). `why_plain`: why the plain path is used.
    """

    path: str
    why_plain: str

    def layout(self, num_rows: int) -> AbstractContextManager[object]:
        """The weight layout for this many rows."""
        ...

    def ready(self, num_rows: int) -> AbstractContextManager[object]:
        """Prepares the model to generate this many rows, and restores it at exit."""
        ...

    def without_gradients(self) -> torch.inference_mode | torch.no_grad:
        """The context in which forwards run."""
        ...

    def rows(self, num_rows: int) -> Rows:
        """New rows."""
        ...

    def embed(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Mean hidden states `[N, d]`. Raises `UserError` if there are none."""
        ...


def runner_of(model: PreTrainedModel | LanguageEnsemble) -> Runner:
    """The runner of a model; runs a few sequences to choose the decode path."""
    if isinstance(model, LanguageEnsemble):
        return EnsembleRunner(model)
    return ModelRunner(model)


class ModelRunner:
    """Runs one model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._decode_path = model, probed(model)
        self.why_plain = self._decode_path.why_plain
        self.path = "plain" if self.why_plain else "cached"

    @property
    def _attention(self) -> str:
        """The attention function of the path."""
        return IMPLEMENTATION if self.path == "cached" else PLAIN

    def layout(self, num_rows: int) -> AbstractContextManager[None]:
        return self._decode_path.layout(self._model, num_rows)

    @contextmanager
    def ready(self, num_rows: int) -> Iterator[None]:
        with self.layout(num_rows), prepared(self._model, self._attention):
            yield

    def without_gradients(self) -> torch.inference_mode | torch.no_grad:
        return without_gradients(self._attention)

    def rows(self, num_rows: int) -> Rows:
        if self.path == "cached":
            return CachedRows(self._model, num_rows)
        return PlainRows(self._model, num_rows, own_cache=self._decode_path.own_cache)

    def embed(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        return mean_hidden_states(self._model, self._attention, sequences)


class EnsembleRunner:
    """Every member runs every row over its own cache."""

    def __init__(self, ensemble: LanguageEnsemble) -> None:
        self._ensemble, self._members = ensemble, [ModelRunner(member) for member in ensemble.members]
        self.why_plain = "; ".join(
            f"member {number}: {member.why_plain}"
            for number, member in enumerate(self._members, start=1)
            if member.why_plain
        )

    @property
    def path(self) -> str:
        """ "plain" if any member's path is."""
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
    """Rows with the same tokens in every member; their logits are the members' mixed logits."""

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
