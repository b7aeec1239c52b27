"""Completions that follow a JSON schema: in batches with others, with log-probabilities, and mistakes in schemas."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loopos.config.diagnostics import UserError
from loopos.generation.engine import Engine
from loopos.generation.settings import SamplingParams

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 3}, "right": {"type": "boolean"}},
    "required": ["name", "right"],
    "additionalProperties": False,
}
TEXT = json.dumps(SCHEMA)


@pytest.fixture(scope="module")
def engine(pico_folder: Path) -> Engine:
    return Engine(
        AutoModelForCausalLM.from_pretrained(pico_folder), AutoTokenizer.from_pretrained(pico_folder), max_rows=3
    )


def test_rows_with_and_without_a_schema_decode_together(engine: Engine) -> None:
    prompts = [[5, 6, 7], [8, 9], [5, 6, 7], [10], [11, 12]]
    settings = [
        SamplingParams(temperature=1, max_new_tokens=60, seed=number, json_schema=schema)
        for number, schema in enumerate([TEXT, None, '{"type": "boolean"}', TEXT, None])
    ]
    together = engine.generate(prompts, settings)
    for number in (0, 3):
        assert together[number].finish_reason == "stop"
        value = json.loads(together[number].text)
        assert list(value) == ["name", "right"]
        assert isinstance(value["right"], bool)
        assert len(value["name"]) <= 3
    assert together[2].text in ("true", "false")
    for number, (prompt, setting) in enumerate(zip(prompts, settings, strict=True)):
        (alone,) = engine.generate([prompt], setting)
        assert alone.token_ids == together[number].token_ids
    # Log-probabilities are the model's own; the distribution that was drawn from has only the allowed tokens.
    made = together[2]
    with torch.no_grad():
        logits = engine.model(torch.tensor([[*prompts[2], *made.token_ids]])).logits[0]  # type: ignore[operator]
    expected = [float(logits[2 + index].log_softmax(-1)[token]) for index, token in enumerate(made.token_ids)]
    assert made.logprobs == pytest.approx(expected, abs=1e-4)
    assert made.filtered_logprobs is not None
    assert all(drawn >= own for drawn, own in zip(made.filtered_logprobs, made.logprobs, strict=True))
    assert made.filtered_logprobs[-1] == pytest.approx(0, abs=1e-6), "after the value only the end may come"


@pytest.mark.parametrize(
    ("schema", "piece"),
    [('{"type": "strin"}', "cannot be followed: Invalid type: strin"), ("[1", "cannot be read"), ('{"not": {}}', "Unimplemented keys")],
)  # fmt: skip
def test_schemas_that_cannot_be_followed(engine: Engine, schema: str, piece: str) -> None:
    with pytest.raises(UserError, match=piece):
        engine.generate([[5]], SamplingParams(json_schema=schema))
