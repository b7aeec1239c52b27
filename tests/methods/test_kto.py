"""KTO through its real entry point, on the pico model, beside a plain computation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from preference_runs import comparisons, events_of, thumbs
from preference_runs import preference_config as config
from test_preference import plain_logprobs
from transformers import AutoModelForCausalLM

from loopos.config.diagnostics import DataError
from loopos.data.answer_batches import EncodedAnswer, with_mismatched
from loopos.data.batches import Cursor
from loopos.methods.kto import KtoTrainer
from loopos.training.progress import RunProgress


def trained(tmp_path: Path, weights: Path, rows: Sequence[Mapping[str, Any]], **sections: Any) -> KtoTrainer:
    settings = config(tmp_path, weights, "kto", rows=rows, **sections)
    method = KtoTrainer(settings, progress=RunProgress(quiet=True))
    method.train()
    return method


@pytest.mark.parametrize("trainable", ["all", "lora"])
def test_the_first_loss_is_one_half_and_rewards_are_0(tmp_path: Path, pico_folder: Path, trainable: str) -> None:
    training = {"max_steps": 2, "trainable": trainable}
    trained(tmp_path / "run", pico_folder, thumbs(40), training=training)
    first, second = events_of(tmp_path / "run", "step")
    assert (first["loss"], first["kl"], first["rewards_desirable"], first["rewards_undesirable"]) == (0.5, 0, 0, 0)
    assert second["rewards_desirable"] != 0


def test_loss_and_baseline_equal_a_plain_computation(tmp_path: Path, pico_folder: Path) -> None:
    section = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.7}
    training = {"max_steps": 6, "learning_rate": 3e-3, "batch_size": 3, "gradient_accumulation": 4}
    method = trained(tmp_path / "run", pico_folder, thumbs(40), training=training, preference=section)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(pico_folder, dtype=torch.float32)

    def ratio(prompt: Sequence[int], response: Sequence[int]) -> torch.Tensor:
        with torch.no_grad():
            return plain_logprobs(model, prompt, response).sum() - plain_logprobs(reference, prompt, response).sum()

    batches = method.fit.batches.step(Cursor(0, 1))
    rows = [method.train_answers[row] for batch in batches for row in batch.rows]
    assert len(rows) == 12
    baseline = max(0.0, float(torch.stack([ratio(row.prompt, row.mismatched) for row in rows]).mean()))
    assert [batch.baseline for batch in batches] == pytest.approx([baseline] * len(batches), abs=1e-4)
    expected = 0.0
    for row in rows:
        gap = 0.3 * (float(ratio(row.prompt, row.response)) - baseline)
        good = 1 / (1 + torch.exp(torch.tensor(gap))).item()
        expected += 1.5 * good if row.desirable else 0.7 * (1 - good)
    with torch.no_grad():
        loss = sum(float(method.objective.loss(batch)["loss"]) for batch in batches)
    assert loss == pytest.approx(expected, rel=1e-5)


def test_only_the_assistants_tokens_count(tmp_path: Path, pico_folder: Path) -> None:
    """In answers of several turns, and in the mismatched answers of other prompts."""
    rows = []
    for row in comparisons(12):
        asked, thanks = {"role": "user", "content": row["prompt"]}, {"role": "user", "content": "thank you"}
        good, bad = ({"role": "assistant", "content": row[side]} for side in ("chosen", "rejected"))
        rows.append({"chosen": [asked, good, thanks, bad], "rejected": [asked, bad]})
    method = trained(tmp_path / "run", pico_folder, rows, training={"max_steps": 2})
    answers, mismatched = method.answers(method.train_answers)
    for own, part in ((answers, "response"), (mismatched, "mismatched")):
        batch = own(range(6))
        expected = [
            token
            for each in method.train_answers[:6]
            for token, counts in zip(
                getattr(each, part), each.mask if part == "response" else each.mismatched_mask, strict=True
            )
            if counts
        ]
        assert batch.targets.tolist() == expected
        assert batch.ids[batch.positions + 1].tolist() == expected
    assert any(not all(each.mask) for each in method.train_answers)


def test_every_prompt_is_paired_with_the_answer_to_another_one() -> None:
    """Prompts 0 to 3 have two answers each; an answer is its own number."""
    answers = [EncodedAnswer([number // 2], [100 + number], bool(number % 2), number) for number in range(8)]
    for seed in range(20):
        paired = with_mismatched(answers, seed=seed)
        assert [(each.prompt, each.response, each.index) for each in paired] == [
            ([n // 2], [100 + n], n) for n in range(8)
        ]
        assert all((each.mismatched[0] - 100) // 2 != each.prompt[0] for each in paired)
    assert with_mismatched(answers, seed=1) != with_mismatched(answers, seed=2)


def test_micro_batches_and_comparisons_change_nothing(tmp_path: Path, pico_folder: Path) -> None:
    """A comparison is two answers; a step of 8 is the same in 8 micro-batches as in one."""
    found = []
    for size, accumulation in ((8, 1), (1, 8)):
        training = {"max_steps": 5, "batch_size": size, "gradient_accumulation": accumulation, "learning_rate": 1e-3}
        run = tmp_path / f"run{size}"
        method = trained(run, pico_folder, comparisons(20), training=training)
        assert sum(each.desirable for each in method.train_answers) == len(method.train_answers) / 2 == 16
        found.append([(step["loss"], step["gradient_norm"], step["kl"]) for step in events_of(run, "step")])
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, abs=2e-5, rel=2e-4)


@pytest.mark.slow
def test_it_learns_which_answers_are_good(tmp_path: Path, pico_folder: Path) -> None:
    trained(tmp_path / "run", pico_folder, thumbs(40), training={"learning_rate": 3e-3, "num_epochs": 6})
    first, *_, last = events_of(tmp_path / "run", "validation")
    assert first["loss"] == pytest.approx(0.5, abs=1e-6)
    # The answers of other prompts are the same few sentences here, so that the baseline rises with the good ones.
    assert last["reward_margin"] > 0.5


def test_a_label_that_is_no_thumb_is_named(tmp_path: Path, pico_folder: Path) -> None:
    rows = thumbs(6)
    rows[3]["label"] = "perhaps"
    with pytest.raises(DataError, match=r"run.jsonl:4: label: got 'perhaps' .*expected true or false"):
        trained(tmp_path / "run", pico_folder, rows)
