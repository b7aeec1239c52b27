"""The real SmolLM2-135M in fp32: greedy tokens equal transformers' for 64 prompts, together and one by one."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loopos.config.diagnostics import MissingRequirement
from loopos.generation.engine import Engine
from loopos.generation.settings import SamplingParams
from loopos.models.gguf import converted_folder
from loopos.models.resolve import EMBEDDED, embedded_model

NEW = 8
WORDS = [
    "the",
    "parcel",
    "came",
    "late",
    "and",
    "a",
    "box",
    "was",
    "open",
    "so",
    "my",
    "card",
    "is",
    "charged",
    "twice",
    "for",
    "one",
    "order",
    "please",
    "answer",
    "within",
    "hours",
]


@pytest.mark.slow
def test_greedy_tokens_of_the_real_model_equal_those_of_transformers() -> None:
    try:
        folder = converted_folder(embedded_model())
    except MissingRequirement as problem:
        pytest.skip(f"{EMBEDDED}: {problem}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    draw = random.Random(0)
    prompts = [tokenizer.encode(" ".join(draw.choices(WORDS, k=draw.randint(1, 40)))) for _ in range(64)]
    assert len({len(prompt) for prompt in prompts}) > 20
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        expected.append(output[0, len(prompt) :].tolist())
    engine = Engine(model, tokenizer)
    assert engine.path == "cached", engine.reason
    settings = SamplingParams(max_new_tokens=NEW)
    assert [completion.token_ids for completion in engine.generate(prompts, settings)] == expected
    assert [engine.generate([prompt], settings)[0].token_ids for prompt in prompts] == expected
