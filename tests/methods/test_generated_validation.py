"""Validation by generated answers in preference optimization: win rate against the start by a judge, the KL to the start,
the best checkpoint by them, and notes; through the real entry point on the pico model."""

from __future__ import annotations

import io
import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_runs import slow_but
from preference_runs import comparisons, events_of, preference_config, reward_config, thumbs, write_rows
from rich.console import Console
from test_preference import plain_logprobs
from test_sharding import compare_worlds
from transformers import AutoModelForCausalLM

import loopos
from loopos.config.diagnostics import ConfigError, UserError
from loopos.config.methods import method_row
from loopos.config.preference import PreferenceConfig
from loopos.evaluation.policy_metrics import wilson_interval
from loopos.methods.reward_model import RewardModelTrainer
from loopos.rl.collector import Collector, Rollout
from loopos.rl.preference_monitor import PreferenceMonitor
from loopos.rl.workers.protocol import Request
from loopos.training.progress import RunProgress

JUDGE = "test_generated_validation:short"
QUICK = {"max_steps": 6, "validate_every": 3, "learning_rate": 3e-3, "schedule": "constant", "warmup": 0}


def short(prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, object]]) -> list[float]:
    """Judges as a user may: by the rows, and with random numbers that are none of training's business."""
    random.seed(1)
    torch.manual_seed(1)
    assert all(row["prompt"] == prompt for prompt, row in zip(prompts, rows, strict=True))
    return [-float(len(response)) for response in responses]


def config(run: Path, weights: Path, method: str = "dpo", **sections: Any) -> PreferenceConfig:
    """A run whose validation answers 6 prompts."""
    answers = {"evaluation": {"prompts": 6, "judge": JUDGE}, "generation": {"max_new_tokens": 8}}
    training = {**QUICK, **sections.pop("training", {})}
    rows = thumbs(40) if method == "kto" else comparisons(40)
    return preference_config(run, weights, method, rows=rows, training=training, **{**answers, **sections})


def trained(settings: Any, *, resume: bool = False) -> Any:
    method = method_row(settings.computation.method).trainer_class(settings, progress=RunProgress(quiet=True))
    method.train(resume=resume)
    return method


def samples(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("method", "trainable"), slow_but(("dpo", "lora"), [("dpo", "lora"), ("simpo", "all"), ("kto", "all")])
)
def test_answers_are_judged_against_those_of_the_start(
    method: str, trainable: str, tmp_path: Path, pico_folder: Path
) -> None:
    run = tmp_path / "run"
    trained(config(run, pico_folder, method, training={"trainable": trainable, "metric": "win_rate"}))
    start, *later = events_of(run, "validation")
    records = samples(run)
    assert [each["step"] for each in records] == [0] * 6 + [3] * 6 + [6] * 6
    assert len({each["prompt"] for each in records}) == 6
    first = {each["prompt"]: each for each in records[:6]}
    assert start["win_rate"] == 0.5
    assert start["judge"] == pytest.approx(-sum(len(each["response"]) for each in records[:6]) / 6)
    for event, answers in zip(later, (records[6:12], records[12:]), strict=True):
        gaps = [each["judge"] - first[each["prompt"]]["judge"] for each in answers]
        won = sum((gap > 0) + (gap == 0) / 2 for gap in gaps)
        assert event["win_rate"] == pytest.approx(won / 6)
        assert (event["win_rate_low"], event["win_rate_high"]) == pytest.approx(wilson_interval(won, 6))
        assert {"response_length", "response_entropy", "eos_rate", "repetition"} <= set(event)
        assert ("response_kl" in event) == (trainable == "lora")
    assert any(each["response"] != first[each["prompt"]]["response"] for each in records[12:])
    assert any(each["reference"] for each in records)
    session = events_of(run, "session")[0]
    assert session["judged_by"]["metric"] == "win_rate"
    report = (run / "report.md").read_text(encoding="utf-8")
    assert "win_rate (decides)" in report
    assert "before training" in report


def test_golden_paths_have_no_answers_without_the_section(tmp_path: Path, pico_folder: Path) -> None:
    """Weights and losses are those of a run without generated answers, whatever the judge does to random states."""
    found = {}
    for name, evaluation in (("with", {"prompts": 6, "judge": JUDGE}), ("without", None)):
        training = {"trainable": "lora", "lora": {"rank": 4, "dropout": 0.1}}
        trained(config(tmp_path / name, pico_folder, evaluation=evaluation, training=training))
        losses = [step["loss"] for step in events_of(tmp_path / name, "step")]
        found[name] = losses, (tmp_path / name / "model" / "model.safetensors").read_bytes()
    assert found["with"] == found["without"]
    assert not (tmp_path / "without" / "samples.jsonl").exists()
    assert "win_rate" not in events_of(tmp_path / "without", "validation")[-1]


@pytest.mark.parametrize(("trainable", "estimator"), slow_but(("all", "k3"), [("lora", "k1"), ("all", "k3")]))
def test_the_kl_of_answers_equals_a_plain_computation(
    trainable: str, estimator: str, tmp_path: Path, pico_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the sampled answers, by two models of transformers; with all weights the copy of the start is asked for."""
    run, collected = tmp_path / "run", []
    called = Collector.__call__

    def kept(self: Collector, request: Request) -> list[Rollout]:
        collected.append(called(self, request))
        return collected[-1]

    monkeypatch.setattr(Collector, "__call__", kept)
    evaluation = {"prompts": 6, "kl_report": estimator, "reference_copy": trainable == "all"}
    training = {"trainable": trainable, "keep_best": False, "learning_rate": 1e-2}
    trained(config(run, pico_folder, evaluation=evaluation, training=training))
    start, *_, last = events_of(run, "validation")
    assert start["response_kl"] == pytest.approx(0, abs=1e-6)
    model = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(pico_folder, dtype=torch.float32)
    expected = []
    for rollout in collected[-1]:
        with torch.no_grad():
            both = rollout.response.prompt_ids, rollout.response.ids
            ratio = plain_logprobs(model, *both).double() - plain_logprobs(reference, *both).double()
        expected.append(float((ratio if estimator == "k1" else torch.exp(-ratio) - 1 + ratio).sum()))
    assert [each["kl"] for each in samples(run)[-6:]] == pytest.approx(expected, abs=1e-3)
    assert last["response_kl"] == pytest.approx(sum(expected) / 6, abs=1e-3)
    assert abs(last["response_kl"]) > 0.01


def test_a_reward_model_judges_and_stops_the_run(tmp_path: Path, pico_folder: Path) -> None:
    reward = tmp_path / "reward"
    RewardModelTrainer(reward_config(reward, pico_folder), progress=RunProgress(quiet=True)).train()
    evaluation = {"prompts": 6, "judge": str(reward)}
    training = {
        "metric": "judge", "early_stopping": {"patience": 1, "metric": "win_rate"}, "max_steps": 12,
        "learning_rate": 1e-8, "validate_every": 2,
    }  # fmt: skip
    method = trained(config(tmp_path / "run", pico_folder, evaluation=evaluation, training=training))
    start, *later = events_of(tmp_path / "run", "validation")
    # At this rate the answers stay those of the start: every win rate is even, so that none is better than the first.
    assert [each["win_rate"] for each in later] == [0.5, 0.5]
    assert method.result.stopped_by == "early stopping"
    assert later[0]["judge"] == pytest.approx(start["judge"])


def test_every_n_validations_and_one_prompt(tmp_path: Path, pico_folder: Path) -> None:
    evaluation = {"prompts": 1, "judge": JUDGE, "every": 2}
    training = {"validate_every": 1, "max_steps": 5}
    trained(config(tmp_path / "run", pico_folder, evaluation=evaluation, training=training))
    generated = ["judge" in event for event in events_of(tmp_path / "run", "validation")]
    assert generated == [True, False, True, False, True, True]


def turned(method: str = "dpo") -> list[dict[str, Any]]:
    """Validation rows whose good answers are the bad ones of training."""
    if method == "kto":
        return [{**row, "label": not row["label"]} for row in thumbs(10)]
    return [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in comparisons(10)]


def validated_on(file: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"validation_data": str(write_rows(file, rows)), "validation_share": 0.0}


@pytest.mark.slow
def test_an_unfinished_run_resumes_with_the_scores_of_the_start(tmp_path: Path, pico_folder: Path) -> None:
    """Ended at step 3 and resumed, all validations, samples and notes are those of the run that was left alone."""
    data, runs = validated_on(tmp_path / "turned.jsonl", turned()), {}
    training = {"metric": "win_rate", "learning_rate": 1e-2, "max_steps": 9}
    for name in ("whole", "resumed"):
        settings = config(tmp_path / name, pico_folder, training=training, data=data)
        if name == "resumed":
            trained(config(tmp_path / name, pico_folder, training={**training, "max_steps": 3}, data=data))
        trained(settings, resume=name == "resumed")
        kinds = ("validation", "note", "step")
        runs[name] = [events_of(tmp_path / name, kind) for kind in kinds], samples(tmp_path / name)
    assert runs["whole"] == runs["resumed"]
    assert [note["name"] for note in runs["whole"][0][1]] == ["likelihood", "overfitting"]


@pytest.mark.slow
def test_another_judge_gives_no_win_rates_against_the_old_one(tmp_path: Path, pico_folder: Path) -> None:
    settings = config(tmp_path / "run", pico_folder)
    trained(settings.model_copy(update={"training": settings.training.model_copy(update={"max_steps": 3})}))
    stream = io.StringIO()
    other = config(tmp_path / "run", pico_folder, generation={"max_new_tokens": 5})
    progress = RunProgress(console=Console(file=stream, width=300))
    method_row("dpo").trainer_class(other, progress=progress).train(resume=True)
    assert "no win rates from here on: the start answered with another setting (max_new_tokens)" in stream.getvalue()
    last = events_of(tmp_path / "run", "validation")[-1]
    assert "judge" in last
    assert "win_rate" not in last


def test_prompts_that_leave_no_room_are_refused(tmp_path: Path, pico_folder: Path) -> None:
    settings = config(tmp_path / "run", pico_folder, generation={"max_new_tokens": 250})
    with pytest.raises(UserError, match=r"evaluation\.prompts: every validation prompt is over 6 tokens"):
        trained(settings)


@pytest.mark.parametrize(
    ("training", "evaluation", "message"),
    [
        ({"metric": "win_rate"}, None, 'training.metric: got "win_rate" without a judge'),
        ({"metric": "judge"}, {"prompts": 4}, 'training.metric: got "judge" without a judge'),
        ({"metric": "judge"}, {"judge": JUDGE, "every": 2}, "which is not part of every validation"),
        ({"metric": "win_rate", "validate_at_start": False}, {"judge": JUDGE}, "without the answers of the start"),
        ({"early_stopping": {"patience": 2, "metric": "win_rate"}}, None, "training.early_stopping.metric: got"),
        ({}, {"judge": "no/such/folder"}, 'evaluation.judge: got "no/such/folder", which does not exist'),
    ],
)
def test_mistakes_name_their_key(
    training: dict[str, Any], evaluation: dict[str, Any] | None, message: str, tmp_path: Path, pico_folder: Path
) -> None:
    written = {
        "computation": {"mode": "posttraining", "method": "dpo"},
        "training": {"learning_rate": 1e-4, **training},
        "evaluation": evaluation,
        "data": {
            "pretrained_weights": str(pico_folder),
            "preference_data": str(write_rows(tmp_path / "rows.jsonl", comparisons(8))),
            "output_dir": str(tmp_path / "out"),
        },
    }
    with pytest.raises(ConfigError) as problem:
        loopos.read_config(written)
    assert message in str(problem.value)


def test_keys_without_effect_are_named(tmp_path: Path, pico_folder: Path) -> None:
    notes = "\n".join(config(tmp_path / "a", pico_folder, evaluation=None).notes())
    assert "generation.max_new_tokens has no effect: no validation prompts are answered" in notes
    copied = {"judge": JUDGE, "reference_copy": True}
    notes = "\n".join(config(tmp_path / "a", pico_folder, evaluation=copied, training={"trainable": "lora"}).notes())
    assert "evaluation.reference_copy has no effect: with lora the start is the model without its adapters" in notes
    notes = "\n".join(config(tmp_path / "a", pico_folder, training={"validate_every": "never"}).notes())
    assert "evaluation has no effect: nothing is validated" in notes


def lines_of(settings: Any) -> list[str]:
    stream = io.StringIO()
    progress = RunProgress(console=Console(file=stream, width=400))
    method_row(settings.computation.method).trainer_class(settings, progress=progress).train()
    return stream.getvalue().splitlines()


ADVICE = [
    ("ipo", '"preference": {"loss": {"ipo": 1, "sft": 1}}'),
    ("kto", "A larger preference.desirable_weight or preference.beta holds it"),
]


@pytest.mark.parametrize(
    ("method", "advice"),
    slow_but(
        ADVICE[0],
        ADVICE,
    ),
)
def test_chosen_answers_that_become_less_likely_are_noted_once(
    method: str, advice: str, tmp_path: Path, pico_folder: Path
) -> None:
    training = {"learning_rate": 1e-2, "max_steps": 12, "validate_every": 2}
    data = validated_on(tmp_path / "turned.jsonl", turned(method))
    settings = config(tmp_path / "run", pico_folder, method, evaluation=None, training=training, data=data)
    said = [line for line in lines_of(settings) if line.startswith("note: ")]
    notes = [note for note in events_of(tmp_path / "run", "note") if note["name"] == "likelihood"]
    assert len(notes) == sum("became less likely" in line for line in said) == 1
    assert advice in notes[0]["message"]
    name = "logprob_desirable" if method == "kto" else "logprob_chosen"
    values = [event[name] for event in events_of(tmp_path / "run", "validation")]
    assert notes[0]["value"] == next(value for value in values if value < values[0] - 1)
    assert notes[0]["message"] in (tmp_path / "run" / "report.md").read_text(encoding="utf-8").replace("\\", "")


@pytest.mark.slow
def test_memorized_pairs_are_noted(tmp_path: Path, pico_folder: Path) -> None:
    """The training rows are learned to the last pair, and the validation rows say the opposite."""
    training = {"learning_rate": 1e-2, "max_steps": 16, "validate_every": 2}
    data = validated_on(tmp_path / "turned.jsonl", turned())
    trained(config(tmp_path / "run", pico_folder, evaluation=None, training=training, data=data))
    [note] = [note for note in events_of(tmp_path / "run", "note") if note["name"] == "overfitting"]
    assert note["value"] >= 0.99
    validations = events_of(tmp_path / "run", "validation")
    assert validations[-1]["loss"] > validations[0]["loss"] > math.log(2) - 1e-6


def test_a_run_that_learns_has_no_notes(tmp_path: Path, pico_folder: Path) -> None:
    """One worse validation alone is no note, and neither is an accuracy of 1 on both kinds of rows."""
    monitor = PreferenceMonitor(config(tmp_path / "run", pico_folder))
    for accuracy, loss, logprob in ((0.5, 0.69, -80.0), (1.0, 0.2, -80.9), (0.9, 0.1, -70.0), (1.0, 0.05, -80.99)):
        monitor.step({"accuracy": 1.0})
        assert monitor.validation({"accuracy": accuracy, "loss": loss, "logprob_chosen": logprob}) == []
    monitor.step({"accuracy": 1.0})
    assert monitor.validation({"accuracy": 1.0, "loss": 0.06, "logprob_chosen": -70.0}) == []
    monitor.step({"accuracy": 0.98})
    assert monitor.validation({"accuracy": 1.0, "loss": 0.07, "logprob_chosen": -70.0}) == []
    monitor.step({"accuracy": 1.0})
    [note] = monitor.validation({"accuracy": 1.0, "loss": 0.08, "logprob_chosen": -70.0})
    assert (note.name, note.value) == ("overfitting", 1.0)


@pytest.mark.slow
def test_two_processes_with_a_sharded_model_answer_alike(tmp_path: Path, pico_folder: Path) -> None:
    compare_worlds(tmp_path, pico_folder, 2, {"shard": {"mode": "shard"}}, ("dpo with answers",))
    assert {"win_rate", "response_kl"} <= set(events_of(tmp_path / "dpo with answers" / "shard", "validation")[-1])
