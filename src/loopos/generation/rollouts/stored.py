"""Completions as tensors and JSON, and back: for checkpoints.

Enters: completions without a guide. Leaves: the same, but for the log-probabilities of a filtered distribution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from loopos.generation.completions import Completion


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
