"""The pico tokenizer and models of the generation tests, and a model that generates a given text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pico_language_models import VOCABULARY, Scripted, pico_model
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


@pytest.fixture(scope="session")
def tokenizer(pico_tokenizer: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(pico_tokenizer)


@pytest.fixture(scope="session")
def llama() -> PreTrainedModel:
    return pico_model("llama")


@pytest.fixture
def says(tokenizer: PreTrainedTokenizerBase) -> Callable[..., tuple[PreTrainedModel, list[int]]]:
    """Makes a model that generates a text and then end tokens after a prompt of one token; and that prompt."""

    def build(text: str) -> tuple[PreTrainedModel, list[int]]:
        ids = [*tokenizer.encode(text, add_special_tokens=False), 2]
        logits = torch.zeros(len(ids), VOCABULARY)
        logits[torch.arange(len(ids)), ids] = 20.0
        return Scripted(logits, by_position=True), [1]

    return build
