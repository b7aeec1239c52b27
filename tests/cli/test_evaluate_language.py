"""`loopos evaluate` on a pico language model: the loss is transformers', answers are checked, nothing drops in silence."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Invoke, write_jsonl

TEXTS = ["the parcel came late", "a kind answer within the hour, thank you", "my card was charged twice"]
CPU = ("--device", "cpu", "--json")


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    rows = [{"problem": f"where is {i}", "reasoning": [f"{i} is there"], "answer": str(i)} for i in range(5)]
    return write_jsonl(tmp_path / "problems.jsonl", rows)


@pytest.fixture
def always_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "lenient_checker.py").write_text(
        "def right(answer, expected, row):\n    return True\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return "lenient_checker:right"


def told(result: Any) -> dict[str, Any]:
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_the_loss_is_transformers(language_run: Path, tmp_path: Path, invoke: Invoke) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    found = told(invoke("evaluate", language_run, file, *CPU))
    model = AutoModelForCausalLM.from_pretrained(language_run / "model")
    tokenizer = AutoTokenizer.from_pretrained(language_run / "model")
    total, count = 0.0, 0
    for text in TEXTS:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], 2]])
        with torch.no_grad():
            total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert found["rows"] == 3
    assert found["dropped"] == {}
    assert set(found["metrics"]) == {"loss", "perplexity"}
    assert found["metrics"]["loss"] == pytest.approx(total / count, abs=1e-5)
    assert found["metrics"]["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert found["tokens_per_second"] is None


def test_problems_are_answered_and_checked(
    language_run: Path, problems: Path, tmp_path: Path, invoke: Invoke, always_right: str
) -> None:
    file = tmp_path / "answers.jsonl"
    words = ("evaluate", language_run, problems, "--max-new-tokens", 10, "--checker", always_right, "-o", file)
    result = invoke(*words, *CPU)
    found = told(result)
    assert found["rows"] == 5
    assert found["metrics"]["accuracy"] == 1.0
    assert {"format_rate", "mean_steps", "mean_tokens", "end_rate"} <= set(found["metrics"])
    assert "loss" not in found["metrics"]
    assert found["tokens_generated"] == 50
    assert found["tokens_per_second"] > 0
    assert "answers 5/5" in result.stderr
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [record["expected"] for record in records] == ["0", "1", "2", "3", "4"]
    assert all(record["is_right"] for record in records)


def test_only_requested_metrics_are_measured(language_run: Path, problems: Path, invoke: Invoke) -> None:
    found = told(invoke("evaluate", language_run, problems, "--metric", "perplexity", "--limit", 2, *CPU))
    assert (set(found["metrics"]), found["rows"], found["tokens_generated"]) == ({"perplexity"}, 2, 0)


def test_pass_at_k_of_samples(language_run: Path, problems: Path, invoke: Invoke, always_right: str) -> None:
    words = ("--samples", 3, "--pass-k", 2, "--temperature", 1, "--max-new-tokens", 6, "--checker", always_right)
    metrics = told(invoke("evaluate", language_run, problems, *words, *CPU))["metrics"]
    assert {"pass@1", "pass@2", "pass@3", "majority@2", "sample_accuracy", "confidence"} <= set(metrics)
    assert metrics["pass@2"] == 1.0


def test_rows_over_the_positions_are_counted(language_run: Path, tmp_path: Path, invoke: Invoke) -> None:
    rows = [{"problem": "where is it", "answer": "1"}, {"problem": "where " * 300, "answer": "2"}]
    file = write_jsonl(tmp_path / "long.jsonl", rows)
    words = ("--metric", "accuracy", "--metric", "loss", "--max-new-tokens", 4)
    found = told(invoke("evaluate", language_run, file, *words, *CPU))
    assert found["rows"] == 1
    assert found["dropped"] == {
        "the problem is over the model's 256 positions": 1,
        "the row is over the model's 256 positions": 1,
    }


def test_bad_rows_are_an_error_or_counted(language_run: Path, tmp_path: Path, invoke: Invoke) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [{"problem": "one", "answer": "1"}, {"problem": "", "answer": "2"}])
    refused = invoke("evaluate", language_run, file, "--metric", "loss", *CPU)
    assert refused.exit_code == 2
    assert "rows.jsonl:2: problem" in refused.stderr
    found = told(invoke("evaluate", language_run, file, "--metric", "loss", "--skip-bad-rows", *CPU))
    assert (found["rows"], found["dropped"]) == (1, {"problem is blank": 1})


def test_as_text(language_run: Path, problems: Path, invoke: Invoke) -> None:
    result = invoke("evaluate", language_run, problems, "--max-new-tokens", 4, "--device", "cpu")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0] == f"{language_run} on {problems}: 5 rows"
    assert "accuracy" in result.stdout
    assert "tokens generated" in result.stdout


@pytest.mark.parametrize(
    ("words", "summary"),
    [
        (("--samples", 4), "--samples 4 at --temperature 0"),
        (("--pass-k", 2), "--pass-k: got 2; expected 1 to the number of chains"),
        (("--metric", "loss", "--strategy", "self_consistency:2", "--temperature", 1), "without --metric accuracy"),
        (("--checker", "nobody"), "checker: got nobody"),
        (("--limit", 0), "--limit: got 0"),
    ],
)
def test_contradictions(
    language_run: Path, problems: Path, invoke: Invoke, words: tuple[Any, ...], summary: str
) -> None:
    result = invoke("evaluate", language_run, problems, *words)
    assert result.exit_code == 2
    assert summary in result.stderr


def test_accuracy_of_plain_text_is_refused(language_run: Path, tmp_path: Path, invoke: Invoke) -> None:
    file = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    result = invoke("evaluate", language_run, file, "--metric", "accuracy", "--device", "cpu")
    assert result.exit_code == 2
    assert "no row of" in result.stderr


def test_options_of_language_models_are_refused_elsewhere(trained: Any, project: Path, invoke: Invoke) -> None:
    words = ("--strategy", "best_of_n:2", "--temperature", 1)
    result = invoke("evaluate", project / "outputs" / "first", project / "test.jsonl", *words)
    assert result.exit_code == 2
    assert "--strategy: only for language models" in result.stderr
    assert "--temperature: only for language models" in result.stderr
