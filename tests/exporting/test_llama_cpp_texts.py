"""Greedy chat texts of the real model: llama.cpp on the exported file beside LoopOS on the model."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench" / "gguf_text.py"


@pytest.mark.slow
def test_llama_cpp_generates_the_same_text_as_the_model() -> None:
    """In f16 the same, but for near ties; in fewer bits most of it."""
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    spec = importlib.util.spec_from_file_location("gguf_text", BENCH)
    assert spec is not None
    assert spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    found = bench.compared("smollm2-135m", ["f16", "q8_0", "q4_0"], list(bench.PROMPTS), 48)
    assert {kind: each["prompts"] for kind, each in found.items()} == {"f16": 20, "q8_0": 20, "q4_0": 20}
    assert all(each["same_prompt_length"] == 1.0 for each in found.values())
    assert found["f16"]["same_text"] >= 0.9
    assert found["f16"]["largest_gap"] < 0.05
    assert found["q8_0"]["same_likeliest"] > 0.9
    assert found["q4_0"]["same_likeliest"] > 0.5
