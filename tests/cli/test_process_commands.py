"""Process reward models in the commands: `score`, `generate`, `evaluate`, `data check` and `data preview`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from loopos.evaluation.reward_predictor import RewardPredictor, judged_content
from loopos.methods.reward_model import RewardModelTrainer
from loopos.serving.heads import ScoreHead
from loopos.training.progress import RunProgress
from tests.cli.conftest import Invoke, write_jsonl
from tests.preference_runs import ASKED, comparisons, reward_config

CPU = ("--device", "cpu")
STEPS = [
    {"prompt": ASKED[0], "completions": ["thank you", "just wait"], "labels": [True, False]},
    {"prompt": ASKED[1], "completions": ["we change it"], "labels": [True]},
]


@pytest.fixture(scope="module")
def process_run(tmp_path_factory: pytest.TempPathFactory, pico_folder: Path) -> Path:
    run = tmp_path_factory.mktemp("process") / "process"
    training = {"num_epochs": 2, "validate_every": "never"}
    config = reward_config(run, pico_folder, rows=STEPS * 8, training=training, data={"validation_share": 0.0})
    RewardModelTrainer(config, progress=RunProgress(quiet=True)).train()
    return run


@pytest.fixture(scope="module")
def outcome_run(tmp_path_factory: pytest.TempPathFactory, pico_folder: Path) -> Path:
    run = tmp_path_factory.mktemp("outcome") / "outcome"
    config = reward_config(run, pico_folder, rows=comparisons(10), training={"max_steps": 1, "validate_every": "never"})
    RewardModelTrainer(config, progress=RunProgress(quiet=True)).train()
    return run


def lines(result: Any) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_scores_have_a_number_for_each_step(process_run: Path, tmp_path: Path, invoke: Invoke) -> None:
    labeled = write_jsonl(tmp_path / "labeled.jsonl", STEPS)
    first, second = lines(invoke("score", process_run, labeled, *CPU))
    assert (len(first["steps"]), len(second["steps"])) == (2, 1)
    assert first["score"] == pytest.approx(math.prod(first["steps"]), rel=1e-4)
    measured = json.loads(invoke("score", process_run, labeled, "--json", *CPU).stdout)
    assert (measured["rows"], measured["num_steps"]) == (2, 3)
    assert {"step_accuracy", "step_auroc", "first_error_accuracy", "first_error_f1"} <= set(measured)
    texts = [{"prompt": row["prompt"], "response": "\n".join(row["completions"])} for row in STEPS]  # type: ignore[arg-type]
    plain = lines(invoke("score", process_run, write_jsonl(tmp_path / "texts.jsonl", texts), *CPU))
    assert [each["steps"] for each in plain] == [pytest.approx(each["steps"], rel=1e-4) for each in (first, second)]
    (least, _) = lines(invoke("score", process_run, labeled, "--aggregation", "min", *CPU))
    assert least["score"] == pytest.approx(min(first["steps"]), rel=1e-4)
    asked = judged_content(str(STEPS[0]["prompt"]), "thank you\njust wait", as_text=False)
    [served] = ScoreHead(RewardPredictor.open(str(process_run))).answers([asked]).data
    assert (served["score"], served["steps"]) == (
        pytest.approx(first["score"], rel=1e-4),
        pytest.approx(first["steps"], rel=1e-4),
    )
    lists = [{"prompt": STEPS[0]["prompt"], "chosen": "thank you", "rejected": "thank you\njust wait"}]
    (both,) = lines(invoke("score", process_run, write_jsonl(tmp_path / "pairs.jsonl", lists), *CPU))
    assert [len(each) for each in both["steps"]] == [1, 2]
    assert both["scores"][0] >= both["scores"][1]


def test_unfinished_chains_are_ranked(process_run: Path, language_run: Path, invoke: Invoke) -> None:
    words = ("generate", language_run, "-p", ASKED[0], "--temperature", 1, "--max-new-tokens", 12, "--seed", 3, *CPU)
    beams = (*words, "--strategy", "step_beam:2x2", "--max-steps", 2, "--reward-model", process_run, "--json")
    (line,) = lines(invoke(*beams))
    assert line["rewards"] == sorted(line["rewards"], reverse=True)
    assert all(0 <= reward <= 1 for reward in line["rewards"])
    (best,) = lines(
        invoke(*words, "--strategy", "best_of_n:3", "--reward-model", process_run, "--aggregation", "last", "--json")
    )
    assert len(best["rewards"]) == 3


def test_what_does_not_fit_together(
    process_run: Path, outcome_run: Path, language_run: Path, tmp_path: Path, invoke: Invoke
) -> None:
    words = ("generate", language_run, "-p", "a", "--temperature", 1, *CPU)
    labeled = write_jsonl(tmp_path / "labeled.jsonl", STEPS)
    for arguments, sentence in (
        ((*words, "--strategy", "step_beam:2x2", "--reward-model", outcome_run), "step_beam ranks unfinished chains"),
        ((*words, "--reward-model", process_run), "--reward-model: ranks the chains of --strategy best_of_n:N or"),
        ((*words, "--strategy", "best_of_n:2", "--aggregation", "min"), "--aggregation without --reward-model"),
        (
            (*words, "--strategy", "best_of_n:2", "--reward-model", outcome_run, "--aggregation", "min"),
            "scores whole responses, which have no steps",
        ),
        (("score", process_run, labeled, "--aggregation", "mean", *CPU), "--aggregation: got mean; expected one of"),
        (("score", outcome_run, labeled, *CPU), "these rows have step labels, but the model scores whole responses"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 2, arguments
        assert sentence in result.stderr


def test_evaluate_ranks_with_a_reward_model(
    process_run: Path, language_run: Path, tmp_path: Path, invoke: Invoke
) -> None:
    problems = write_jsonl(
        tmp_path / "problems.jsonl", [{"problem": "1 + 1?", "reasoning": ["1 + 1 = 2"], "answer": "2"}]
    )
    result = invoke(
        "evaluate", language_run, problems, "--strategy", "best_of_n:2", "--temperature", 1, "--max-new-tokens", 8,
        "--reward-model", process_run, "--json", *CPU,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "accuracy" in json.loads(result.stdout)["metrics"]


def test_data_check_and_preview(pico_folder: Path, tmp_path: Path, invoke: Invoke) -> None:
    file = write_jsonl(tmp_path / "steps.jsonl", STEPS)
    checked = invoke("data", "check", file).stdout
    assert "kind      steps: trains reward_model as a process reward model" in checked
    assert "labeled steps 3, right steps 0.667" in checked
    config = reward_config(tmp_path / "run", pico_folder, rows=STEPS, data={"validation_share": 0.0})
    (tmp_path / "config.json").write_text(json.dumps(config.model_dump(mode="json", exclude_unset=True)))
    shown = invoke("data", "preview", tmp_path / "config.json")
    assert shown.exit_code == 0, shown.stderr
    assert "2 steps · labels 1, 0" in shown.stdout
    assert "[token that scores a labeled step]" in shown.stdout
    dry = invoke("train", tmp_path / "config.json", "--dry-run", "--json")
    assert dry.exit_code == 0, dry.stderr
    assert json.loads(dry.stdout)["rows"]["labeled_steps"] == 3
