"""What generation runs on: one model the way that serves it, or the members of an ensemble side by side.

Enters: a causal language model or a `LanguageEnsemble`. Leaves: rows, and the model set for generation meanwhile. Left
out: finding that way (`road.py`), rows of one model (`rows.py`), the engine.
Letters: N rows given, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loopos.config.faults import UserError
from loopos.generation.cache import IMPLEMENTATION
from loopos.generation.road import probed
from loopos.generation.rows import PLAIN, CachedRows, PlainRows, Rows, mean_hidden_states, prepared, without_gradients
from loopos.models.language_ensemble import LanguageEnsemble


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
            f"an ensemble of {len(self._members)} language models has no hidden states of its own; wanted one model"
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
