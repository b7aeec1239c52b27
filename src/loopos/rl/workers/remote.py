"""Completions as tensors and JSON, and back: for checkpoints.

Enters: completions without a guide. Leaves: the same, but for the log-probabilities of a filtered distribution.

Responses by workers: weights sent, iterations begun ahead of training, what is in flight kept in checkpoints.

Enters: requests; on the first process, a dispatcher. Leaves: each process's share of the completions. The first
process alone speaks with the workers, and the others get from it what they came back with. Left out: which worker
writes what (`dispatch.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loopos.generation.completions import Completion
from loopos.rl.workers.dispatch import Dispatcher
from loopos.rl.workers.protocol import Request, Written


def completion_tensors(completions: Sequence[Completion]) -> dict[str, Tensor]:
    """Tokens and log-probabilities of all, end to end, and their lengths."""
    return {
        "tokens": torch.tensor([token for each in completions for token in each.token_ids]),
        "logprobs": torch.tensor([value for each in completions for value in each.logprobs], dtype=torch.float64),
        "lengths": torch.tensor([len(each.token_ids) for each in completions]),
    }


def completion_state(completions: Sequence[Completion]) -> list[list[Any]]:
    """What else they are."""
    return [[each.prompt_index, each.sample_index, each.text, each.finish_reason] for each in completions]


def stored_completions(tensors: Mapping[str, Tensor], state: Sequence[Sequence[Any]]) -> list[Completion]:
    """What both were made of."""
    lengths = tensors["lengths"].tolist()
    columns = zip(
        state, torch.split(tensors["tokens"], lengths), torch.split(tensors["logprobs"], lengths), strict=True
    )
    return [
        Completion(prompt, sample, tokens.tolist(), text, logprobs.tolist(), None, (), reason)
        for (prompt, sample, text, reason), tokens, logprobs in columns
    ]


# Seconds after which the first process tells the others that there is still nothing: no collective may wait for long.
_SIGN = 20.0


class Policy(Protocol):
    """The policy in training."""

    def version(self) -> int:
        """A number of these very weights: another one after every change."""
        ...

    def weights(self) -> bytes:
        """What workers need of it, as bytes of a safetensors file."""
        ...

    def request(self, iteration: int) -> Request | None:
        """What will be asked for in this iteration; None after the last."""
        ...


@dataclass
class _Begun:
    """Responses of an iteration: `by` the policy of which iteration, in flight under `number` or found already."""

    by: int
    number: int | None = None
    found: list[Completion] | None = None


class RemoteRollouts:
    """Written by workers. With `max_staleness` s the responses of iteration i are begun in iteration i − s, by the
    policy as it was then; the first s iterations are begun together, by the first policy.

    Where a checkpoint is saved all that is in flight is waited for and kept in it, so that a resumed run gets the very
    responses of the uninterrupted one.
    """

    def __init__(
        self,
        dispatcher: Dispatcher | None,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        summary: str,
        *,
        max_staleness: int,
        share: tuple[int, int] = (0, 1),
        gather: Callable[[object], list[object]] = lambda value: [value],
    ) -> None:
        """dispatcher: None on all processes but the first. share, gather: as `evaluation.rollout.Collector`'s."""
        self.tokenizer, self.summary = tokenizer, summary
        self._dispatcher, self._policy, self._max_staleness = dispatcher, policy, max_staleness
        self._share, self._gather = share, gather
        self._ahead: dict[int, _Begun] = {}
        self._waited = 0.0

    def write(self, request: Request, *, iteration: int | None = None) -> Written:
        """As `RolloutEngine`. Raises `MissingRequirement` when no worker is left."""
        began = time.monotonic()
        if iteration is None:
            begun, staleness = self._begin(request, by=0), 0
        else:
            self._begin_ahead(request, iteration)
            begun = self._ahead.pop(iteration)
            staleness = iteration - begun.by
        completions = self._shared(lambda seconds: self._found(begun, seconds))
        self._waited += time.monotonic() - began
        rank, ranks = self._share
        return Written([each for each in completions if each.prompt_index % ranks == rank], staleness)

    def _begin_ahead(self, request: Request, iteration: int) -> None:
        """This iteration's responses and, with staleness, those of the next ones, where they are not begun."""
        for number in range(iteration, iteration + self._max_staleness + 1):
            known = self._ahead.get(number)
            if known is not None and number - known.by <= self._max_staleness:
                continue
            asked = request if number == iteration else self._policy.request(number)
            if asked is not None:
                self._ahead[number] = self._begin(asked, by=iteration)

    def _begin(self, request: Request, *, by: int) -> _Begun:
        if self._dispatcher is None:
            return _Begun(by)
        self._dispatcher.publish(self._policy.version(), self._policy.weights)
        return _Begun(by, self._dispatcher.begin(request))

    def _found(self, begun: _Begun, seconds: float) -> list[Completion] | None:
        """Waits so long for what is in flight."""
        if begun.found is None:
            assert self._dispatcher is not None
            assert begun.number is not None
            begun.found = self._dispatcher.finished(begun.number, seconds=seconds)
        return begun.found

    def _shared(self, finish: Callable[[float], Any]) -> Any:
        """What `finish(seconds)` gives on the first process as soon as it is not None, on all."""
        seconds = math.inf if self._share[1] == 1 else _SIGN
        while True:
            mine = finish(seconds) if self._dispatcher is not None else None
            found = self._gather(mine)[0]
            if found is not None:
                return found

    def drain(self) -> None:
        """Waits for all that is in flight: called on every process before a checkpoint is saved."""
        if self._ahead:
            self._shared(lambda seconds: True if all(self._found(b, seconds) for b in self._ahead.values()) else None)

    def tensors(self) -> dict[str, Tensor]:
        """What is written ahead, drained, for a checkpoint; on the first process."""
        return {
            f"ahead-{iteration}-{name}": tensor
            for iteration, begun in self._ahead.items()
            for name, tensor in completion_tensors(begun.found or []).items()
        }

    def state(self) -> dict[str, Any]:
        return {
            str(iteration): {"by": begun.by, "completions": completion_state(begun.found or [])}
            for iteration, begun in self._ahead.items()
        }

    def load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Goes on from `tensors` and `state`."""
        for iteration, told in state.items():
            begin = f"ahead-{iteration}-"
            mine = {name.removeprefix(begin): tensor for name, tensor in tensors.items() if name.startswith(begin)}
            self._ahead[int(iteration)] = _Begun(told["by"], found=stored_completions(mine, told["completions"]))

    def timing(self) -> dict[str, float]:
        """Seconds that training waited for responses, prompts given to another worker, answers that came twice."""
        counts = self._dispatcher.counts if self._dispatcher is not None else {}
        told = {"waited_seconds": self._waited, **{name: float(counts.get(name, 0)) for name in ("redone", "doubled")}}
        self._waited = 0.0
        if self._dispatcher is not None:
            self._dispatcher.counts.clear()
        return told

    def close(self) -> None:
        if self._dispatcher is not None:
            self._dispatcher.close()
