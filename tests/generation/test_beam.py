"""Beam search equals that of transformers: tokens and scores, with and without early stopping, in any batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pico_language_models import mixed_prompts, pico_model
from pico_runs import slow_but
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loopos.config.diagnostics import UserError
from loopos.generation.beam import BeamSettings, beam_search
from loopos.generation.engine import Engine

NEW = 10
# Many end tokens, so that beams finish at different lengths.
ENDS = tuple(range(2, 60))


def beams_of_transformers(
    model: PreTrainedModel, prompt: list[int], named: dict[str, Any]
) -> list[tuple[list[int], float]]:
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, num_beams=4, num_return_sequences=4,
        pad_token_id=0, return_dict_in_generate=True, output_scores=True, **named,
    )  # fmt: skip
    # Shorter beams are filled up behind their end token.
    ends = set(named["eos_token_id"])
    rows = [
        row[: 1 + next((index for index, token in enumerate(row) if token in ends), len(row))]
        for row in output.sequences[:, len(prompt) :].tolist()
    ]
    return list(zip(rows, output.sequences_scores.tolist(), strict=True))


@pytest.mark.parametrize("name", slow_but("gpt2", ["llama", "gpt2", "gemma2 soft caps"]))
@pytest.mark.parametrize(
    ("length_penalty", "early_stopping", "ends"),
    [(1.0, False, ENDS), (0.0, True, ENDS), (2.0, None, ENDS), (-1.0, False, ENDS), (1.0, False, (2,))],
)
def test_beams_equal_those_of_transformers(
    name: str,
    length_penalty: float,
    early_stopping: bool | None,
    ends: tuple[int, ...],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    model = pico_model(name)
    prompts = mixed_prompts(5)
    settings = BeamSettings(
        num_beams=4,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        max_new_tokens=NEW,
        stop_token_ids=ends,
    )
    # Two prompts of four beams at a time.
    found = beam_search(Engine(model, tokenizer, max_rows=9), prompts, settings)
    lengths = set()
    for prompt, beams in zip(prompts, found, strict=True):
        reference = beams_of_transformers(
            model, prompt, {"length_penalty": length_penalty, "eos_token_id": list(ends),
                            "early_stopping": "never" if early_stopping is None else early_stopping},
        )  # fmt: skip
        assert [beam.token_ids for beam in beams] == [ids for ids, _ in reference]
        assert [beam.score for beam in beams] == pytest.approx([score for _, score in reference], abs=1e-4)
        lengths |= {len(beam.token_ids) for beam in beams}
    # Where length is rewarded, a flat distribution may leave only the longest.
    assert len(lengths) > 1 or length_penalty > 0


def test_one_beam_is_greedy(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    from loopos.generation.settings import SamplingParams

    prompts = mixed_prompts(3)
    engine = Engine(llama, tokenizer)
    greedy = engine.generate(prompts, SamplingParams(max_new_tokens=NEW))
    beams = beam_search(engine, prompts, BeamSettings(num_beams=1, max_new_tokens=NEW))
    assert [found[0].token_ids for found in beams] == [completion.token_ids for completion in greedy]
    assert [found[0].text for found in beams] == [completion.text for completion in greedy]


def test_more_beams_than_rows_are_refused(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match="num_beams: got 4; expected at most 3"):
        beam_search(Engine(llama, tokenizer, max_rows=3), [[5]], BeamSettings())
