"""Two models' speed, held against each other in turn.

Enters: the model before and the quantized one, both on one device. Leaves: tokens a second of each and their ratio, for
reading and for writing one text and sixteen at a time. They run in turn, A B A B, and the ratio is the median of the
pairs', so that a machine that is busy for a while slows both. Left out: what is done about it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loopos.deploy.speed import GOES, reading_work, seconds_of, writing_work

ROWS = (1, 16)
# Less than this apart is what a machine that does other things too cannot tell.
_TOLD_APART = 0.03


@dataclass(frozen=True, slots=True)
class Rate:
    """One kind of work: its name, tokens a second before and after, and how many times as fast."""

    name: str
    before: float
    after: float
    ratio: float

    @property
    def slower(self) -> bool:
        return self.ratio < 1 - _TOLD_APART

    @property
    def verdict(self) -> str:
        """faster, slower, or as fast."""
        if self.slower:
            return "slower"
        return "faster" if self.ratio > 1 + _TOLD_APART else "as fast"


@torch.no_grad()
def compared_rates(
    before: PreTrainedModel, after: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, writes: bool
) -> list[Rate]:
    """Reading a row of 256 tokens and, where the model writes, writing 32 tokens of 1 text and of 16."""
    rates = [_compared("reading", reading_work(before), reading_work(after), before.device)]
    for rows in ROWS if writes else ():
        first, second = (writing_work(model, tokenizer, rows) for model in (before, after))
        rates.append(
            _compared("writing, 1 text" if rows == 1 else f"writing, {rows} texts", first, second, before.device)
        )
    return rates


Work = tuple[int, Callable[[], object]]


def _compared(name: str, first: Work, second: Work, device: torch.device) -> Rate:
    goes = [[tokens / seconds for tokens, seconds in _pair(first, second, device)] for _ in range(GOES + 1)][1:]
    before, after = (statistics.median(rates) for rates in zip(*goes, strict=True))
    return Rate(name, before, after, statistics.median(pair[1] / pair[0] for pair in goes))


def _pair(first: Work, second: Work, device: torch.device) -> list[tuple[int, float]]:
    return [(tokens, seconds_of(partial(work), device)) for tokens, work in (first, second)]
