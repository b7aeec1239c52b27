"""`loopos rl check` on a pico model: the run's own sampling and rewards, the file of prompts with signal, mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Invoke, write_jsonl

FUNCTIONS = '''
def solved(prompts, responses):
    return [1.0] * len(responses)


def by_prompt(prompts, responses, rows):
    """Answers to odd prompts differ by their first letter; those to even ones are all wrong."""
    return [float(row["number"] % 2 and response[:1] < "m") for response, row in zip(responses, rows)]


def longer(prompts, responses):
    return [float(len(response)) for response in responses]
'''


@pytest.fixture
def config(tmp_path: Path, pico_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "checked_rewards.py").write_text(FUNCTIONS, encoding="utf-8")
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"where is parcel {i}", "number": i} for i in range(9)])
    content = {
        "computation": {"mode": "posttraining", "method": "ppo"},
        "training": {"learning_rate": 1e-3, "batch_size": 8, "value_model": "shared", "seed": 5},
        "generation": {"max_new_tokens": 8},
        "reward": {"functions": [{"name": "checked_rewards:by_prompt"}]},
        "data": {
            "pretrained_weights": str(pico_folder),
            "prompts": "prompts.jsonl",
            "output_dir": "run",
            "validation_share": 0.0,
        },
    }
    (tmp_path / "rl.json").write_text(json.dumps(content), encoding="utf-8")
    return tmp_path / "rl.json"


def checked(invoke: Invoke, *arguments: Any) -> dict[str, Any]:
    result = invoke("rl", "check", "rl.json", "-n", 6, "--json", *arguments)
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_prompts_with_signal_are_written(config: Path, invoke: Invoke) -> None:
    found = checked(invoke, "-o", "signal.jsonl")
    metrics = found["metrics"]
    rows = [json.loads(line) for line in Path("signal.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows
    assert all(row["number"] % 2 and 0 < row["mean_reward"] < 1 for row in rows)
    assert metrics["signal"] == pytest.approx(len(rows) / 9)
    assert (metrics["prompts"], metrics["responses"]) == (9, 54)
    assert not Path("run").exists()
    assert checked(invoke)["metrics"]["pass@1"] == metrics["pass@1"]
    # Its rows are prompts to train on.
    again = checked(invoke, "data.prompts=signal.jsonl", "--prompts", 2)
    assert again["metrics"]["prompts"] == 2


def test_a_solved_task_and_answers_without_end(config: Path, invoke: Invoke) -> None:
    solved = checked(invoke, 'reward.functions=[{"name": "checked_rewards:solved"}]')
    assert solved["advice"][0].startswith("nearly every answer passes")
    longer = checked(invoke, 'reward.functions=[{"name": "checked_rewards:longer"}]')
    assert "pass@1" not in longer["metrics"]
    assert longer["advice"][0].startswith("100% of the answers end at the token limit")
    shown = invoke("rl", "check", "rl.json", "-n", 2)
    assert "groups without signal" in shown.stdout
    assert "signal@" not in shown.stdout


def test_mistakes(config: Path, invoke: Invoke) -> None:
    result = invoke("rl", "check", "rl.json", "-n", 1, "--prompts", 0)
    assert result.exit_code == 2
    assert "--prompts: got 0; expected 1 or more" in result.stderr
    assert "--samples: got 1; expected 2 or more" in result.stderr
    other = json.loads(config.read_text(encoding="utf-8"))
    other = {
        "computation": {"mode": "posttraining", "method": "sft"},
        "training": {"learning_rate": 1e-3},
        "data": {
            **{key: other["data"][key] for key in ("pretrained_weights", "output_dir")},
            "training_data": "p.jsonl",
        },
    }
    write_jsonl(Path("p.jsonl"), [{"prompt": "a", "completion": "b"}] * 4)
    Path("sft.json").write_text(json.dumps(other), encoding="utf-8")
    result = invoke("rl", "check", "sft.json")
    assert result.exit_code == 2
    assert "got the method sft; expected one that generates answers while it trains" in result.stderr


def test_an_audit_reads_what_a_run_stored(config: Path, invoke: Invoke) -> None:
    overrides = ("training.max_iterations=2", "training.log_rollouts=8", "training.learning_rate=1e-3", "--quiet")
    result = invoke("train", "rl.json", *overrides)
    assert result.exit_code == 0, result.stderr
    result = invoke("rl", "audit", "run", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["answers"] == 16
    assert Path(found["report"]).is_file()
    assert any(each["name"] == "no end" for each in found["signs"]) is False
    Path("run/rollouts.jsonl").unlink()
    result = invoke("rl", "audit", "run")
    assert result.exit_code == 2
    assert "got no answers with rewards" in result.stderr
