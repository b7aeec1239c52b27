"""Task and reward models over HTTP give the outputs of `predict` and `score`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pico_runs import class_rows, config_of, train
from questions import CHAT, GOOD, ask

from loopos.evaluation.predictor import Predictor
from loopos.evaluation.reward_predictor import RewardPredictor
from loopos.methods.reward_model import RewardModelTrainer
from loopos.serving.heads import ClassifyHead, HeadService, ScoreHead
from loopos.serving.limits import ServingLimits
from loopos.serving.metrics import ServingMetrics
from loopos.training.progress import RunProgress
from tests.preference_runs import ASKED as QUESTIONS
from tests.preference_runs import KIND, RUDE, comparisons, reward_config, write_rows
from tests.serving.conftest import Server, served

LIMITS = ServingLimits(max_body=100_000)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("heads")


@pytest.fixture(scope="module")
def reward_run(home: Path, pico_folder: Path) -> Path:
    config = reward_config(home / "reward", pico_folder, training={"num_epochs": 1})
    RewardModelTrainer(config, progress=RunProgress(quiet=True)).train()
    return home / "reward"


@pytest.fixture(scope="module")
def rewards(reward_run: Path) -> Iterator[Server]:
    metrics = ServingMetrics()
    service = HeadService(ScoreHead(RewardPredictor.open(str(reward_run))), "judge", LIMITS, metrics)
    with served(service, LIMITS, metrics) as server:
        yield server


@pytest.mark.parametrize("task", ["classification", "multi_label", "regression"])
def test_classify_equals_predict(task: str, home: Path, pico_folder: Path) -> None:
    labels: Any = {"classification": ["a", "b"], "multi_label": [["a"], ["a", "b"]], "regression": [1.5, -2.0]}[task]
    run = home / task
    train(config_of(run, pico_folder, class_rows(12, labels), model={"task": task}, training={"num_epochs": 1}))
    predictor, metrics = Predictor.open(run), ServingMetrics()
    texts = ["good the parcel came late", "bad"]
    expected = Predictor.open(run).predict(texts)
    with served(HeadService(ClassifyHead(predictor), task, LIMITS, metrics), LIMITS, metrics) as server:
        status, told, _ = ask(server, "/v1/classify", {"model": task, "input": texts})
        assert status == 200
        assert (told["object"], told["task"], told["truncated"]) == ("list", task, 0)
        assert told["data"] == [
            {"object": "classification", "index": index, **each} for index, each in enumerate(expected)
        ]
        assert told["usage"]["prompt_tokens"] == predictor.tokens.tokens
        one = ask(server, "/v1/classify", {"model": task, "input": texts[0]})[1]["data"]
        assert len(one) == 1
        assert ask(server, "/v1/classify", {"model": task, "input": [["good", "it broke"]]})[0] == 200
        for body, status, param in (
            ({"model": task, "input": []}, 400, "input"),
            ({"model": task, "input": [["a", "b", "c"]]}, 400, "input"),
            ({"model": "other", "input": "x"}, 404, "model"),
            ({"model": task, "input": "x " * 100_000}, 413, None),
        ):
            got, error, _ = ask(server, "/v1/classify", body)
            assert (got, str(error["error"]["param"]).partition(".")[0]) == (status, str(param)), error
        got, error, _ = ask(server, CHAT, GOOD)
        assert got == 404
        assert task in error["error"]["message"]
        assert ask(server, "/v1/models", b"", method="GET", headers={})[1]["data"][0]["id"] == task


def test_scores_are_those_of_the_command(rewards: Server, reward_run: Path, home: Path) -> None:
    """`loopos score` on the same comparisons: its numbers are rounded to six digits."""
    file = write_rows(home / "asked.jsonl", comparisons(6))
    expected = RewardPredictor.open(str(reward_run)).score_file(str(file), {}).rows
    for row, scored in zip(comparisons(6), expected, strict=True):
        responses = [row["chosen"], row["rejected"]]
        body = {"model": "judge", "prompt": row["prompt"], "response": responses}
        status, told, _ = ask(rewards, "/v1/score", body)
        assert status == 200, told
        assert [each["score"] for each in told["data"]] == pytest.approx(scored["scores"], abs=2e-5)
        for response, score in zip(responses, scored["scores"], strict=True):
            messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": response}]
            told = ask(rewards, "/v1/score", {"model": "judge", "messages": messages})[1]
            assert [each["score"] for each in told["data"]] == pytest.approx([score], abs=2e-5)
            assert told["usage"]["prompt_tokens"] > 0


def test_what_is_no_conversation_is_refused(rewards: Server) -> None:
    asked = [{"role": "user", "content": QUESTIONS[0]}]
    for body, status in (
        ({"model": "judge"}, 400),
        ({"model": "judge", "prompt": QUESTIONS[0]}, 400),
        ({"model": "judge", "messages": [*asked, *asked]}, 400),
        ({"model": "judge", "messages": asked, "prompt": "x", "response": "y"}, 400),
        ({"model": "judge", "prompt": QUESTIONS[0], "response": []}, 400),
        ({"model": "judge", "prompt": QUESTIONS[0], "response": KIND[0] * 200}, 400),
        ({"model": "other", "prompt": QUESTIONS[0], "response": RUDE[0]}, 404),
        ({"model": "judge", "prompt": QUESTIONS[0], "response": RUDE[0]}, 200),
    ):
        got, told, _ = ask(rewards, "/v1/score", body)
        assert got == status, told
