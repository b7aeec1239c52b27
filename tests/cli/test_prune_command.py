"""`loopos prune`, and `loopos evaluate` on running text, as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Invoke
from tests.conftest import SENTENCES

pytestmark = pytest.mark.usefixtures("few_goes")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("\n".join(f"{each}. {other}!" for each in SENTENCES for other in SENTENCES[:3]), encoding="utf-8")
    return file


def test_prune_writes_a_model_and_a_report(invoke: Invoke, language_run: Path, text: Path, tmp_path: Path) -> None:
    options = (
        "--calibration",
        text,
        "--calibration-rows",
        4,
        "--calibration-tokens",
        16,
        "--evaluate",
        text,
        "--window",
        64,
    )
    result = invoke(
        "prune", language_run, "--method", "wanda", "--sparsity", "0.5", *options, "-o", tmp_path / "out", "--json"
    )
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["after"][0]["zeros"] * 2 == told["after"][0]["block_weights"]
    assert told["before"]["metrics"]["tokens"] == told["after"][0]["metrics"]["tokens"]
    again = invoke("evaluate", tmp_path / "out", text, "--window", 64, "--json")
    assert json.loads(again.stdout)["metrics"]["perplexity"] == pytest.approx(told["after"][0]["metrics"]["perplexity"])
    assert "zeros by themselves make a dense product no faster" in (tmp_path / "out" / "report.md").read_text(
        encoding="utf-8"
    )
    # The step format and end tokens of the run are still there.
    spoken = invoke("generate", tmp_path / "out", "-p", "a", "--max-new-tokens", 2)
    assert spoken.exit_code == 0, spoken.stderr


@pytest.mark.slow
def test_a_recipe_runs_again_and_options_win_over_it(invoke: Invoke, pico_folder: Path, tmp_path: Path) -> None:
    first = invoke("prune", pico_folder, "--method", "magnitude", "--sparsity", "0.25,0.5", "-o", tmp_path / "first")
    assert first.exit_code == 0, first.stderr
    assert "reading, tokens/s" in first.stdout
    recipe = tmp_path / "first" / "recipe.json"
    assert json.loads(recipe.read_text(encoding="utf-8"))["sparsity"] == [0.25, 0.5]
    second = invoke("prune", recipe, "--sparsity", "0.75", "-o", tmp_path / "second", "--json")
    told = json.loads(second.stdout)["after"]
    assert [each["zeros"] / each["block_weights"] for each in told] == [0.75]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--method", "wanda", "--sparsity", "0.5"), "calibration: got nothing with method wanda"),
        (("--method", "wnda", "--sparsity", "half"), 'did you mean "wanda"'),
        (("--method", "magnitude", "--sparsity", "0.5,1.5"), "sparsity"),
        (("--sparsity", "0.5"), "method: got nothing"),
        (("--method", "heads", "--sparsity", "0.5", "--calibration", "nowhere.txt"), "calibration: got"),
    ],
)
def test_mistakes_end_in_a_few_lines(
    words: tuple[str, ...], told: str, invoke: Invoke, pico_folder: Path, tmp_path: Path
) -> None:
    result = invoke("prune", pico_folder, *words, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert told in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_not_overwritten(invoke: Invoke, pico_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine", encoding="utf-8")
    result = invoke("prune", pico_folder, "--method", "magnitude", "--sparsity", "0.5", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "which exists; expected a new folder" in result.stderr
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_evaluate_on_running_text(
    invoke: Invoke, language_run: Path, trained: object, project: Path, text: Path
) -> None:
    result = invoke("evaluate", language_run, text, "--window", 64, "--stride", 16)
    assert result.exit_code == 0, result.stderr
    assert "windows of 64 in steps of 16" in result.stdout
    assert {"perplexity", "loss", "bits_per_byte"} <= set(result.stdout.split())
    plain = invoke("evaluate", language_run, text, "--json")
    assert json.loads(plain.stdout)["metrics"]["window"] == 256
    assert "--samples: only for rows" in invoke("evaluate", language_run, text, "--samples", 2).stderr
    assert "window: got 999" in invoke("evaluate", language_run, text, "--window", 999).stderr
    headed = invoke("evaluate", project / "outputs" / "first", text, "--window", 64)
    assert "--window: only for language models" in headed.stderr
