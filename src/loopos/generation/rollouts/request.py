"""What is asked of whatever writes a policy's responses, and the writer in this very process.

Enters: prompts with the settings of each. Leaves: completions of this process's share of them, and how far behind the
policy the one that wrote was. Left out: workers elsewhere (`remote.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from loopos.generation.completions import Completion
from loopos.generation.engine import Engine
from loopos.generation.settings import SamplingSettings


@dataclass(frozen=True)
class Request:
    """`n` completions of every prompt; `settings`: those of each, whose seeds make its completions what they are
    whoever writes them.
    """

    prompts: list[list[int]]
    settings: list[SamplingSettings]
    n: int = 1

    def of(self, places: Sequence[int]) -> Request:
        """The same of some of its prompts."""
        return Request([self.prompts[place] for place in places], [self.settings[place] for place in places], self.n)


@dataclass(frozen=True)
class Written:
    """Completions of a share of a request's prompts, whose `prompt_index` is the place in the whole request.
    `staleness`: iterations that the policy which wrote them is behind.
    """

    completions: list[Completion]
    staleness: int = 0


class RolloutEngine(Protocol):
    """What writes responses with the weights as they are now."""

    tokenizer: PreTrainedTokenizerBase

    @property
    def said(self) -> str:
        """What writes, in words."""
        ...

    def write(self, request: Request, *, iteration: int | None = None) -> Written:
        """This process's share: every process of a run asks for the same. iteration: that of training whose responses
        these are, which may have been begun before.
        """
        ...

    def timing(self) -> dict[str, float]:
        """What a clock and chance made of the writing since it was last asked."""
        ...

    def close(self) -> None:
        """Nothing is written any more."""
        ...


class LocalRollouts:
    """The engine over the very weights that train."""

    def __init__(self, engine: Engine, *, share: tuple[int, int] = (0, 1)) -> None:
        """share: (rank, ranks): this process answers every `ranks`-th prompt."""
        self.tokenizer, self._engine, self._share = engine.tokenizer, engine, share

    @property
    def said(self) -> str:
        return self._engine.said

    def write(self, request: Request, *, iteration: int | None = None) -> Written:
        rank, ranks = self._share
        places = range(rank, len(request.prompts), ranks)
        mine = request.of(places)
        completions = self._engine.generate(mine.prompts, mine.settings, n=request.n)
        return Written([replace(each, prompt_index=places[each.prompt_index]) for each in completions])

    def timing(self) -> dict[str, float]:
        return {}

    def close(self) -> None: ...
