"""`loopos score` on responses of every kind, and chains that `loopos generate` ranks by a reward model."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from loopos.data.conversations import ASSISTANT, Message
from loopos.evaluation.reward_predictor import RewardPredictor
from loopos.methods.reward_model import RewardModelTrainer
from loopos.training.progress import RunProgress
from tests.cli.conftest import Invoke, write_jsonl
from tests.preference_runs import ASKED, KIND, RUDE, comparisons, reward_config

CPU = ("--device", "cpu")
PAIRS = [(ASKED[0], KIND[0]), (ASKED[1], RUDE[0]), (ASKED[2], KIND[1])]


@pytest.fixture(scope="module")
def reward_run(tmp_path_factory: pytest.TempPathFactory, pico_folder: Path) -> Path:
    run = tmp_path_factory.mktemp("score") / "reward"
    config = reward_config(run, pico_folder, rows=comparisons(10), training={"num_epochs": 1})
    RewardModelTrainer(config, progress=RunProgress(quiet=True)).train()
    return run


@pytest.fixture(scope="module")
def expected(reward_run: Path) -> list[float]:
    """What the model gives to the responses of PAIRS, each as messages by itself."""
    judged = RewardPredictor.open(str(reward_run)).judge(
        [((Message("user", prompt),), (Message(ASSISTANT, response),)) for prompt, response in PAIRS]
    )
    return [each.score for each in judged]


def lines(result: Any) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


FORMS: dict[str, Any] = {
    "a prompt and a response": lambda prompt, response: {"prompt": prompt, "response": response},
    "what generate writes": lambda prompt, response: {
        "prompt": prompt, "text": response, "logprob": -3.5, "finish_reason": "stop", "tokens": 7, "sample": 0,
    },
    "what generate writes of steps": lambda prompt, response: {
        "prompt": prompt, "text": response, "steps": [], "answer": "7", "logprob": -3.5,
    },
    "a question and an answer": lambda prompt, response: {"question": prompt, "answer": response},
    "an instruction": lambda prompt, response: {"instruction": prompt, "input": None, "output": response},
    "a completion": lambda prompt, response: {"prompt": prompt, "completion": response},
    "messages": lambda prompt, response: {
        "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    },
    "a prompt of messages": lambda prompt, response: {
        "prompt": [{"role": "user", "content": prompt}], "response": {"role": "assistant", "content": response}
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", FORMS)
def test_responses_of_every_kind(
    kind: str, reward_run: Path, expected: list[float], tmp_path: Path, invoke: Invoke
) -> None:
    file = write_jsonl(tmp_path / "said.jsonl", [FORMS[kind](*pair) for pair in PAIRS])
    result = invoke("score", reward_run, file, *CPU)
    scored = lines(result)
    assert [(each["prompt"], each["response"]) for each in scored] == PAIRS
    assert [each["line"] for each in scored] == [1, 2, 3]
    assert [each["score"] for each in scored] == pytest.approx(expected, abs=2e-5)
    assert "mean_score" in result.stderr


def test_lists_of_responses_and_the_summary(
    reward_run: Path, expected: list[float], tmp_path: Path, invoke: Invoke
) -> None:
    rows = [{"prompt": ASKED[0], "responses": [KIND[0], RUDE[0]]}, {"prompt": ASKED[2], "responses": [KIND[1]]}]
    file = write_jsonl(tmp_path / "lists.jsonl", rows)
    first, second = lines(invoke("score", reward_run, file, *CPU))
    assert (len(first["scores"]), len(second["scores"])) == (2, 1)
    assert (first["scores"][0], second["scores"][0]) == pytest.approx((expected[0], expected[2]), abs=2e-5)
    told = json.loads(invoke("score", reward_run, file, "--json", *CPU).stdout)
    flat = [*first["scores"], *second["scores"]]
    assert (told["rows"], told["responses"]) == (2, 3)
    assert told["mean_score"] == pytest.approx(statistics.fmean(flat), abs=2e-5)
    assert told["std_score"] == pytest.approx(statistics.pstdev(flat), abs=2e-5)


def test_comparisons_are_scored_as_before(reward_run: Path, tmp_path: Path, invoke: Invoke) -> None:
    file = write_jsonl(tmp_path / "pairs.jsonl", comparisons(4))
    result = invoke("score", reward_run, file, *CPU)
    assert [set(each) for each in lines(result)] == [{"line", "scores"}] * 4
    assert "accuracy" in result.stderr


def test_columns_may_be_named(reward_run: Path, expected: list[float], tmp_path: Path, invoke: Invoke) -> None:
    rows = [{"asked of us": prompt, "we said": response} for prompt, response in PAIRS]
    file = write_jsonl(tmp_path / "own.jsonl", rows)
    named = ("--columns", "prompt=asked of us", "--columns", "response=we said")
    assert [each["score"] for each in lines(invoke("score", reward_run, file, *named, *CPU))] == pytest.approx(
        expected, abs=2e-5
    )


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": "a"}, '{"prompt", "response"}, {"prompt", "text"} as generate writes them'),
        (
            {"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]},
            "messages of assistant",
        ),
        ({"prompt": "a", "response": ""}, "response"),
    ],
)
def test_rows_without_a_response(
    row: dict[str, Any], sentence: str, reward_run: Path, tmp_path: Path, invoke: Invoke
) -> None:
    result = invoke("score", reward_run, write_jsonl(tmp_path / "bad.jsonl", [row]), *CPU)
    assert result.exit_code == 2
    assert sentence in result.stderr


def test_chains_are_ranked_by_a_reward_model(reward_run: Path, language_run: Path, invoke: Invoke) -> None:
    words = ("generate", language_run, "-p", ASKED[0], "-p", ASKED[1], "--strategy", "best_of_n:4", "--temperature", 1)
    more = ("--reward-model", reward_run, "--max-new-tokens", 8, "--seed", 3, *CPU)
    predictor = RewardPredictor.open(str(reward_run))
    for prompt, line in zip(ASKED, lines(invoke(*words, *more, "--json")), strict=False):
        assert line["prompt"] == prompt
        assert len(line["rewards"]) == 4
        assert line["rewards"] == sorted(line["rewards"], reverse=True)
        (judged,) = predictor.judge([((Message("user", prompt),), (Message(ASSISTANT, line["text"]),))])
        assert line["rewards"][0] == pytest.approx(judged.score, abs=2e-5)
    assert "(best of 4 chains, reward " in invoke(*words, *more).stdout
    result = invoke(*words, "--reward-model", language_run, *CPU)
    assert result.exit_code == 2
    assert "scores no responses" in result.stderr
