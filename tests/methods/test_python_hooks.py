"""`loopos.train` with functions of a program: callbacks of events, and metrics of validation."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from pico_runs import class_rows, slow_but
from preference_runs import ASKED, comparisons
from test_python_api import PROBLEMS, config_of, language_config

import loopos
from loopos.config.diagnostics import ConfigError, UserError
from loopos.evaluation.run_folder import read_run
from loopos.storage.events import fingerprint, read

Train = Callable[..., Any]


def keep(event: dict[str, Any]) -> None:
    """Does nothing."""


@pytest.fixture
def train(tmp_path: Path, pico_folder: Path) -> Train:
    """A short run of a classifier in `run`; training.KEY=value by keyword."""

    def run(name: str = "run", *, training: Mapping[str, Any] | None = None, **arguments: Any) -> Any:
        config = config_of(tmp_path / name, pico_folder)
        config["training"] |= {"num_epochs": 2, "batch_size": 4, **(training or {})}
        return loopos.train(config, data=class_rows(24), quiet=True, **arguments)

    return run


def test_a_callback_sees_what_the_log_holds_and_changes_nothing(train: Train, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    def spoils(event: dict[str, Any]) -> None:
        seen.append(json.loads(json.dumps(event)))
        event["metrics"].clear()
        random.random(), numpy.random.rand(), torch.rand(3)

    train()
    train("seen", callbacks=[spoils, keep])
    assert seen == list(read(tmp_path / "seen" / "events.jsonl"))
    assert {"session", "step", "validation", "checkpoint", "end", "export", "confusion"} == {e["event"] for e in seen}
    assert fingerprint(tmp_path / "seen" / "events.jsonl") == fingerprint(tmp_path / "run" / "events.jsonl")


def test_a_callback_ends_the_run(train: Train, tmp_path: Path) -> None:
    def after_three(event: dict[str, Any]) -> str | None:
        return "stop" if event["event"] == "step" and event["step"] == 3 else None

    result = train(callbacks=[after_three])
    assert (result.step, result.stopped_by, result.interrupted) == (3, "callback", False)
    run = read_run(tmp_path / "run")
    assert (run.state, run.has_model, run.last_metrics["loss"] > 0) == ("finished", True, True)
    told = f"stopped by callback {after_three.__qualname__}"
    assert run.ended == told
    assert told[1:] in (tmp_path / "run" / "report.md").read_text()
    # Ended it stays, as long as there are callbacks; without any the run goes on.
    assert train(callbacks=[keep], resume=True).step == 3
    train("whole")
    assert train(resume=True).stopped_by == "epochs"
    whole, resumed = (
        [e["metrics"] for e in read(tmp_path / name / "events.jsonl") if e["event"] == "step"]
        for name in ("whole", "run")
    )
    assert whole == resumed


def test_a_callback_may_answer_to_a_validation(train: Train, tmp_path: Path) -> None:
    def at_once(event: dict[str, Any]) -> str | None:
        return "stop" if event["event"] == "validation" and event["step"] else None

    assert train(training={"validate_every": 2}, callbacks=[at_once]).step == 2
    steps = [event["step"] for event in read(tmp_path / "run" / "events.jsonl") if event["event"] == "validation"]
    assert steps == [0, 2]


@pytest.mark.parametrize(
    ("kind", "step", "saved"),
    slow_but(("validation", 2, 2), [("step", 3, 3), ("validation", 2, 2), ("session", 0, None)]),
)
def test_a_callback_that_fails_ends_the_run_in_order(
    kind: str, step: int, saved: int | None, train: Train, tmp_path: Path
) -> None:
    others = []

    def divides(event: dict[str, Any]) -> None:
        if event["event"] == kind and event["step"] == step:
            raise ZeroDivisionError("by zero")

    with pytest.raises(UserError) as problem:
        train(training={"validate_every": 2}, callbacks=[divides, lambda event: others.append(event["event"])])
    message = str(problem.value)
    assert message.startswith(f"callback {divides.__qualname__}: raised ZeroDivisionError at {__file__}:")
    assert f"for the event {kind} of step {step}" in message
    assert f"the run ended after step {step}; " in message
    assert isinstance(problem.value.__cause__, ZeroDivisionError)
    if saved is None:
        assert "there is no checkpoint yet" in message
    else:
        assert f"the last complete checkpoint is step {saved}" in message
        assert others[-1] == "end"
        run = read_run(tmp_path / "run")
        assert (run.state, run.ended) == ("failed", f"stopped by an error in callback {divides.__qualname__}")
    assert train(training={"validate_every": 2}, resume=True).stopped_by == "epochs"
    train("whole", training={"validate_every": 2})
    if saved is not None:
        assert fingerprint(tmp_path / "run" / "events.jsonl") == fingerprint(tmp_path / "whole" / "events.jsonl")


def test_what_a_callback_returns_and_raises_is_named(train: Train) -> None:
    with pytest.raises(UserError, match=r'callback .*<lambda>: returned bool True; expected None, or "stop"'):
        train(callbacks=[lambda event: True])
    with pytest.raises(UserError, match=r"callback opens: raised nowhere: no trained model here"):
        train("other", callbacks=[opens])
    with pytest.raises(UserError, match="callbacks: got 'keep'; expected functions of an event"):
        train("third", callbacks=["keep"])


def opens(event: dict[str, Any]) -> None:
    loopos.load("nowhere")


def confidence(predictions: Any, targets: Any) -> Any:
    """Mean probability of the class that is right."""
    value = predictions[numpy.arange(len(targets)), targets].mean()
    predictions[:], targets[:] = 0, 0
    numpy.random.rand(), torch.rand(1)
    return value


def cost(predictions: Any, targets: Any) -> Any:
    return torch.tensor([float((predictions.argmax(-1) != targets).sum())])


def test_user_metrics_are_listed_beside_ours(train: Train, tmp_path: Path) -> None:
    metrics = {"confidence": confidence, "cost": (cost, "min"), "undefined": lambda p, t: float("nan")}
    train("plain")
    train(metrics=metrics)
    validations = [e["metrics"] for e in read(tmp_path / "run" / "events.jsonl") if e["event"] == "validation"]
    plain = [e["metrics"] for e in read(tmp_path / "plain" / "events.jsonl") if e["event"] == "validation"]
    assert [{key: each[key] for key in plain[0]} for each in validations] == plain
    for each in validations:
        assert set(each) - set(plain[0]) == {"confidence", "cost"}
        assert 0 < each["confidence"] < 1
    report = (tmp_path / "run" / "report.md").read_text()
    assert "| confidence | max |" in report
    assert "| cost | min |" in report


def test_a_metric_of_a_program_may_decide(train: Train, tmp_path: Path) -> None:
    values = iter([9.0, 5.0, 3.0, 4.0, 6.0, 7.0, 8.0])
    training = {
        "metric": "falls",
        "early_stopping": {"patience": 2},
        "num_epochs": 6,
        "validate_every": 2,
    }
    result = train(training=training, metrics={"falls": (lambda p, t: next(values), "min")})
    assert (result.best_step, result.best_metric, result.stopped_by) == (4, 3.0, "early stopping")
    run = read_run(tmp_path / "run")
    assert run.outcome.metric == "falls"
    assert run.exported_step == 4
    assert json.loads((tmp_path / "run" / "config.json").read_text())["training"]["metric"] == "falls"
    with pytest.raises(ConfigError, match=r'training.metric: got "falls"; expected .*"accuracy"'):
        train("other", training=training)


def test_a_metric_that_is_none_is_refused_by_name(train: Train) -> None:
    def gives(value: Any) -> Any:
        return {"mine": lambda predictions, targets: value}

    for value, told in (({"f1": 1.0}, "dict"), (None, "NoneType"), ("0.5", "str"), (numpy.ones(2), "ndarray")):
        with pytest.raises(
            UserError, match=rf"metrics\['mine'\] \(.*<lambda>\): returned {told} .*; expected .*number"
        ):
            train("run", metrics=gives(value), resume=True)
    with pytest.raises(UserError, match=r"metrics\['mine'\] \(cost\): raised .*\n.*array of shape \(2, 3\)"):
        train("run", metrics={"mine": lambda_of_cost()}, resume=True)
    for name, function in (("accuracy", cost), ("best", cost), ("", cost), ("mine", "cost"), ("mine", (cost, "up"))):
        with pytest.raises(UserError, match=r"metrics.*(expected|choose another name)"):
            train("run", metrics={name: function})
    with pytest.raises(UserError, match="the config validates nothing"):
        train("other", metrics={"mine": cost}, training={"validate_every": "never"})


def lambda_of_cost() -> Any:
    def fails(predictions: Any, targets: Any) -> float:
        raise ValueError("no")

    fails.__qualname__ = "cost"
    return fails


def test_a_language_model_gets_answers_and_references(tmp_path: Path, pico_folder: Path) -> None:
    got: list[tuple[Sequence[str], Sequence[str]]] = []

    def length(answers: Sequence[str], references: Sequence[str]) -> float:
        got.append((answers, references))
        return float(sum(map(len, answers)))

    data = {"reasoning_examples": PROBLEMS, "validation_data": PROBLEMS[:3]}
    config = language_config("chain_of_thought", tmp_path, pico_folder, data)
    config["training"] |= {"metric": "length"}
    config["evaluation"] = {"problems": 2}
    loopos.train(config, metrics={"length": length}, quiet=True)
    assert read_run(tmp_path / "run").outcome.metric == "length"
    assert [references for _, references in got] == [["2", "3"]] * 2
    assert all(len(answers) == 2 for answers, _ in got)
    config["evaluation"] = {"problems": 0, "samples": 0}
    config["data"]["output_dir"] = str(tmp_path / "other")
    with pytest.raises(UserError, match="metrics: no validation row asks for an answer"):
        loopos.train(config, metrics={"length": length}, quiet=True)


def test_a_reward_model_gets_scores_and_a_policy_its_responses(tmp_path: Path, pico_folder: Path) -> None:
    def gap(preferred: Any, other: Any) -> float:
        assert preferred.shape == other.shape == (4,)
        return float((preferred - other).mean())

    data = {"preference_data": comparisons(16), "validation_data": comparisons(4)}
    loopos.train(
        language_config("reward_model", tmp_path / "reward", pico_folder, data), metrics={"gap": gap}, quiet=True
    )
    for event in read(tmp_path / "reward" / "run" / "events.jsonl"):
        if event["event"] == "validation":
            assert event["metrics"]["gap"] == pytest.approx(event["metrics"]["score_gap"])

    def words(responses: Sequence[str], prompts: Sequence[str]) -> float:
        assert sorted(prompts) == sorted(ASKED)
        return float(sum(len(response) for response in responses))

    prompts = [{"prompt": prompt} for prompt in ASKED]
    config = language_config("ppo", tmp_path / "ppo", pico_folder, {"prompts": prompts, "validation_data": prompts})
    config["training"] |= {"validate_every": 1, "metric": "words"}
    loopos.train(config, metrics={"words": (words, "min")}, quiet=True)
    outcome = read_run(tmp_path / "ppo" / "run").outcome
    assert (outcome.metric, outcome.mode) == ("words", "min")


def test_pretraining_has_nothing_for_a_metric(tmp_path: Path, pico_folder: Path) -> None:
    rows = [{"text": f"the parcel {i} came late. it broke after two days."} for i in range(12)]
    config = language_config("autoregressive", tmp_path, pico_folder, {"input_file": rows})
    with pytest.raises(UserError, match="metrics: got mine; expected none"):
        loopos.train(config, metrics={"mine": cost}, quiet=True)
