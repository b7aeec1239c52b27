"""`loopos winrate` on pico models: sides, judges, seeds, and what is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.cli.conftest import Invoke, Reference, write_jsonl

WORDS = ("--device", "cpu", "--max-new-tokens", 8, "--json")
ASKED = [{"prompt": f"where is parcel {i}"} for i in range(6)]


@pytest.fixture(scope="module")
def other_run(tmp_path_factory: pytest.TempPathFactory, language_run: Path) -> Path:
    """Another random model with the tokenizer of `language_run`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("other") / "model"
    torch.manual_seed(7)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(language_run / "model")).save_pretrained(folder)
    AutoTokenizer.from_pretrained(language_run / "model").save_pretrained(folder)
    return folder


@pytest.fixture
def longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "length_judge.py").write_text(
        "def longer(prompt, first, second):\n    return len(first), len(second)\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return "length_judge:longer"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "prompts.jsonl", ASKED)


def told(result: Any) -> dict[str, Any]:
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_answers_are_those_of_each_model_and_sides_swap(
    language_run: Path, other_run: Path, prompts: Path, longer: str, tmp_path: Path, invoke: Invoke, greedy: Reference
) -> None:
    file = tmp_path / "pairs.jsonl"
    found = told(invoke("winrate", language_run, other_run, prompts, "--judge", longer, "-o", file, *WORDS))
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [each["prompt"] for each in records] == [each["prompt"] for each in ASKED]
    assert [each["a"] for each in records] == [
        greedy([{"role": "user", "content": each["prompt"]}], 8) for each in ASKED
    ]
    wins = sum(len(each["a"]) > len(each["b"]) for each in records)
    losses = sum(len(each["a"]) < len(each["b"]) for each in records)
    rate = found["win_rate"]
    assert (rate["wins"], rate["losses"], rate["prompts"]) == (wins, losses, 6)
    assert wins + losses > 0
    back = told(invoke("winrate", other_run, language_run, prompts, "--judge", longer, *WORDS))["win_rate"]
    assert (back["wins"], back["losses"]) == (losses, wins)
    assert back["low"] == pytest.approx(1 - rate["high"])


def test_a_model_against_itself_ties_with_the_same_seed(
    language_run: Path, prompts: Path, longer: str, invoke: Invoke
) -> None:
    words = ("--judge", longer, "--temperature", 1, "-n", 3, "--seed", 4)
    found = told(invoke("winrate", language_run, language_run, prompts, *words, *WORDS))
    assert (found["pairs"], found["identical"], found["win_rate"]["ties"]) == (18, 18, 18)
    assert found["win_rate"]["prompts"] == 6
    assert found["both_orders"]["contradictions"] == 0


def test_a_reward_model_judges_and_skipped_pairs_are_counted(
    language_run: Path, other_run: Path, tmp_path: Path, pico_folder: Path, invoke: Invoke
) -> None:
    rows = [{"prompt": f"the lamp {i}", "chosen": "thank you", "rejected": "never again"} for i in range(8)]
    config = {
        "computation": {"mode": "posttraining", "method": "reward_model"},
        "training": {"learning_rate": 1e-3, "batch_size": 4, "num_epochs": 1, "precision": "fp32", "device": "cpu",
                     "max_length": 80},
        "data": {"pretrained_weights": str(pico_folder), "output_dir": str(tmp_path / "reward"),
                 "preference_data": str(write_jsonl(tmp_path / "comparisons.jsonl", rows)), "validation_share": 0.25},
    }  # fmt: skip
    (tmp_path / "reward.json").write_text(json.dumps(config), encoding="utf-8")
    # Drawing takes longer than a pico run.
    with patch("loopos.methods.base.write_report"):
        trained = invoke("train", tmp_path / "reward.json", "--quiet")
    assert trained.exit_code == 0, trained.stderr
    # Once again, over the reward model's length, over the models' positions.
    asked = [*ASKED, ASKED[0], {"prompt": "my card " * 30}, {"prompt": "my card " * 300}]
    prompts, file = write_jsonl(tmp_path / "asked.jsonl", asked), tmp_path / "pairs.jsonl"
    words = (language_run, other_run, prompts, "--judge", tmp_path / "reward", "-o", file)
    found = told(invoke("winrate", *words, *WORDS))
    assert found["dropped"] == {
        "same prompt again": 1,
        "the prompt leaves a model no position for an answer": 1,
        "an answer is longer than what the reward model was trained on": 1,
    }
    assert found["pairs"] == 6
    assert "both_orders" not in found
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for each in records:
        high, low = each["scores"]
        assert each["winner"] == ("a" if high > low else "b" if low > high else "tie")
    scored = [{"prompt": each["prompt"], "chosen": each["a"], "rejected": each["b"]} for each in records]
    alone = invoke("score", tmp_path / "reward", write_jsonl(tmp_path / "scored.jsonl", scored), "--device", "cpu")
    assert alone.exit_code == 0, alone.stderr
    assert [json.loads(line)["scores"] for line in alone.stdout.splitlines()] == [
        pytest.approx(each["scores"], abs=1e-4) for each in records
    ]


def test_as_text(language_run: Path, other_run: Path, prompts: Path, longer: str, invoke: Invoke) -> None:
    result = invoke("winrate", language_run, other_run, prompts, "--judge", longer, "--limit", 2, *WORDS[:-1])
    assert result.exit_code == 0
    assert f"{prompts}: 2 prompts, 2 pairs" in result.stdout
    assert "judged in both orders: 0 of 2" in result.stdout


@pytest.mark.parametrize(
    ("words", "summary"),
    [
        (("--judge", "no_such_module:f"), "judge no_such_module:f: cannot import"),
        (("--judge", "nowhere"), "nowhere: no trained model here"),
        (("--judge", "json:loads", "-n", 2), "--samples 2 at --temperature 0"),
        (("--judge", "json:loads", "--limit", 0), "--limit: got 0"),
        (("--judge", "json:loads", "--raw", "--system", "be kind"), "--system with --raw"),
    ],
)
def test_contradictions(
    language_run: Path, other_run: Path, prompts: Path, words: tuple[Any, ...], summary: str, invoke: Invoke
) -> None:
    result = invoke("winrate", language_run, other_run, prompts, *words)
    assert result.exit_code == 2
    assert summary in result.stderr
