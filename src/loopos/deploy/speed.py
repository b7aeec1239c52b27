"""How fast a model reads and writes here and now.

Enters: a model on its device. Leaves: tokens a second. Medians of several goes, after one that warms up. Left out:
comparing two models (`quantizing.rates`).
Letters: L tokens of a row.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loopos.generation.engine import Engine
from loopos.generation.settings import SamplingSettings

GOES = 5
READ, PROMPTS, PROMPT, WRITTEN = 256, 4, 16, 32


@torch.no_grad()
def reading_rate(model: PreTrainedModel) -> float:
    """Tokens a second of a forward pass over a row of 256 tokens, or of the model's positions where they are fewer."""
    tokens, work = reading_work(model)
    return tokens / _median(work, model.device)


def writing_rate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """New tokens a second of 4 greedy completions of 32 tokens side by side, their prompts of 16 tokens included."""
    tokens, work = writing_work(model, tokenizer, PROMPTS)
    return tokens / _median(work, model.device)


def reading_work(model: PreTrainedModel) -> tuple[int, Callable[[], object]]:
    """How many tokens are read, and what reads them."""
    base = getattr(model, model.base_model_prefix, model)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or READ
    row = _tokens(model, min(READ, positions))[None]
    return row.numel(), lambda: base(input_ids=row)


def writing_work(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: int
) -> tuple[int, Callable[[], object]]:
    """How many tokens are written, and what writes them: greedy completions side by side."""
    engine = Engine(model, tokenizer, max_rows=rows)
    room = engine.max_positions or PROMPT + WRITTEN
    new = max(1, min(WRITTEN, room - PROMPT))
    ids = _tokens(model, rows * PROMPT).tolist()
    prompts = [ids[first : first + PROMPT] for first in range(0, len(ids), PROMPT)]
    settings = SamplingSettings(max_new_tokens=new, stop_at_end=False)
    return rows * new, lambda: engine.generate(prompts, settings, logprobs=False)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that one go takes."""
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _median(work: Callable[[], object], device: torch.device) -> float:
    """Median seconds."""
    return statistics.median([seconds_of(work, device) for _ in range(GOES + 1)][1:])


def _tokens(model: PreTrainedModel, number: int) -> torch.Tensor:
    vocabulary = model.config.get_text_config().vocab_size
    draw = torch.Generator().manual_seed(0)
    return torch.randint(min(3, vocabulary - 1), vocabulary, (number,), generator=draw).to(model.device)
