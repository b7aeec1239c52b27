"""Two models' speed, held against each other in turn.

Enters: a model before a change and after it, both on one device. Leaves: tokens a second of each and their ratio, for
reading and for writing one text and sixteen at a time. They run in turn, A B A B, and the ratio is the median of the
pairs', so that a machine that is busy for a while slows both. Left out: what is done about it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loopos.generation.engine import Engine
from loopos.generation.settings import SamplingSettings

GOES = 5
ROWS = (1, 16)
READ, PROMPT, WRITTEN = 256, 16, 32
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
    """Reading a row of 256 tokens, or of the model's positions where they are fewer, and, where the model writes, 32
    greedy tokens of 1 text and of 16 behind prompts of 16, which are read within the time.
    """
    rates = [_compared("reading", _reading(before), _reading(after), before.device)]
    for rows in ROWS if writes else ():
        first, second = (_writing(model, tokenizer, rows) for model in (before, after))
        name = "writing, 1 text" if rows == 1 else f"writing, {rows} texts"
        rates.append(_compared(name, first, second, before.device))
    return rates


Work = tuple[int, Callable[[], object]]
"""How many tokens are read or written, and what does it."""


def _compared(name: str, first: Work, second: Work, device: torch.device) -> Rate:
    # The first go warms up.
    goes = [[tokens / seconds for tokens, seconds in _pair(first, second, device)] for _ in range(GOES + 1)][1:]
    before, after = (statistics.median(rates) for rates in zip(*goes, strict=True))
    return Rate(name, before, after, statistics.median(pair[1] / pair[0] for pair in goes))


def _pair(first: Work, second: Work, device: torch.device) -> list[tuple[int, float]]:
    return [(tokens, _seconds_of(partial(work), device)) for tokens, work in (first, second)]


def _reading(model: PreTrainedModel) -> Work:
    base = getattr(model, model.base_model_prefix, model)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or READ
    row = _tokens(model, min(READ, positions))[None]
    return row.numel(), lambda: base(input_ids=row)


def _writing(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: int) -> Work:
    engine = Engine(model, tokenizer, max_rows=rows)
    room = engine.max_positions or PROMPT + WRITTEN
    new = max(1, min(WRITTEN, room - PROMPT))
    ids = _tokens(model, rows * PROMPT).tolist()
    prompts = [ids[first : first + PROMPT] for first in range(0, len(ids), PROMPT)]
    settings = SamplingSettings(max_new_tokens=new, stop_at_end=False)
    return rows * new, lambda: engine.generate(prompts, settings, logprobs=False)


def _seconds_of(work: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _tokens(model: PreTrainedModel, number: int) -> torch.Tensor:
    vocabulary = model.config.get_text_config().vocab_size
    draw = torch.Generator().manual_seed(0)
    return torch.randint(min(3, vocabulary - 1), vocabulary, (number,), generator=draw).to(model.device)
