"""`loopos quantize` as a user meets it, and the commands that open what it wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Invoke
from tests.conftest import SENTENCES

pytestmark = pytest.mark.usefixtures("few_goes")


def test_quantize_writes_a_report_and_every_command_opens_the_model(
    invoke: Invoke, language_run: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"{each}. {other}!" for each in SENTENCES for other in SENTENCES[:3]), encoding="utf-8")
    read = ("--calibration", "awq", "--calibration-text", text, "--calibration-rows", 4, "--calibration-tokens", 16)
    options = ("--method", "int4", *read, "--evaluate", text, "--window", 64, "-o", tmp_path / "out", "--json")
    result = invoke("quantize", language_run, *options)
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    [after] = told["after"]
    assert after["weight_bytes"] == after["share"] * told["before"]["weight_bytes"] < told["before"]["weight_bytes"]
    assert [rate["work"] for rate in after["rates"]] == ["reading", "writing, 1 text", "writing, 16 texts"]
    again = invoke("evaluate", tmp_path / "out", text, "--window", 64, "--json")
    assert json.loads(again.stdout)["metrics"]["perplexity"] == pytest.approx(after["metrics"]["perplexity"])
    # The step format and end tokens of the run are still there.
    spoken = invoke("generate", tmp_path / "out", "-p", "a", "--max-new-tokens", 2)
    assert spoken.exit_code == 0, spoken.stderr
    refused = invoke("prune", tmp_path / "out", "--method", "magnitude", "--sparsity", "0.5", "-o", tmp_path / "no")
    assert refused.exit_code == 2
    assert "is quantized" in refused.stderr or "quantized:" in refused.stderr
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_a_recipe_runs_again_and_options_win_over_it(invoke: Invoke, pico_folder: Path, tmp_path: Path) -> None:
    words = ("--method", "int8", "--keep", "*.down_proj", "--keep", "lm_head")
    first = invoke("quantize", pico_folder, *words, "-o", tmp_path / "first")
    assert first.exit_code == 0, first.stderr
    assert "of the size in bf16" in first.stdout
    recipe = tmp_path / "first" / "recipe.json"
    assert json.loads(recipe.read_text(encoding="utf-8"))["keep"] == ["*.down_proj", "lm_head"]
    second = invoke("quantize", recipe, "--method", "int8-dynamic", "-o", tmp_path / "second")
    assert second.exit_code == 0, second.stderr
    assert json.loads((tmp_path / "second" / "recipe.json").read_text(encoding="utf-8"))["keep"] != []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--method", "int5"), "method: got"),
        (("--method", "int8", "--calibration", "gptq"), "calibration_text: got nothing"),
        (("--method", "int8", "--group-size", "64"), "group_size: got 64 with method int8"),
        ((), "method: got nothing"),
    ],
)
def test_mistakes_end_in_a_few_lines(
    words: tuple[str, ...], told: str, invoke: Invoke, pico_folder: Path, tmp_path: Path
) -> None:
    result = invoke("quantize", pico_folder, *words, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert told in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []
