"""`loopos.merge`, `prune`, `quantize`, `export`, `ensemble` do what their commands do, and refuse what they refuse."""

from __future__ import annotations

import json
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_runs import class_rows, config_of, save_pico, train, write_jsonl
from safetensors.torch import load_file
from typer.testing import CliRunner

import loopos
from loopos import changes
from loopos.api import SamplingKeywords
from loopos.cli.commands import app

CHANGES = ("output_dir", "models", "method", "base", "evaluate")


def command(*words: object) -> Any:
    """The JSON that a command prints."""
    result = CliRunner().invoke(app, [*map(str, words), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(first: Path, second: Path) -> None:
    one, other = weights(first), weights(second)
    assert len(one) > 3
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory: pytest.TempPathFactory, pico_folder: Path, pico_tokenizer: Path) -> Path:
    """The pico model with other weights."""
    folder = save_pico("llama", tmp_path_factory.mktemp("other"), pico_tokenizer)
    assert not torch.equal(weights(folder)["lm_head.weight"], weights(pico_folder)["lm_head.weight"] * 2)
    return folder


@pytest.mark.parametrize(
    ("keywords", "of"),
    [
        (SamplingKeywords, loopos.SamplingParams.__dataclass_fields__),
        (changes.MergeKeywords, loopos.MergeConfig.model_fields.keys() - set(CHANGES)),
        (changes.PruningKeywords, loopos.PruningRecipe.model_fields.keys() - {"model", "method", "sparsity"}),
        (changes.QuantizationKeywords, loopos.QuantizationRecipe.model_fields.keys() - {"model", "method"}),
    ],
)
def test_every_key_is_an_argument(keywords: Any, of: Any) -> None:
    assert typing.get_type_hints(keywords).keys() == set(of)


def test_a_merge_is_that_of_the_command(pico_folder: Path, other_folder: Path, tmp_path: Path) -> None:
    merged = loopos.merge(
        [pico_folder, other_folder], method="linear", weights=[3.0, 1.0], output=tmp_path / "python", normalize=True
    )
    assert merged.folder == tmp_path / "python"
    told = command("merge", pico_folder, other_folder, "--method", "linear", "--weight", 3, "--weight", 1, "-o",
                   tmp_path / "cli", "normalize=true")  # fmt: skip
    assert (told["tensors"], told["parameters"]) == (merged.num_tensors, merged.num_parameters)
    assert_same_weights(tmp_path / "python", tmp_path / "cli")
    one, other, mean = (weights(each)["lm_head.weight"] for each in (pico_folder, other_folder, merged.folder))
    torch.testing.assert_close(mean, 0.75 * one + 0.25 * other)


def test_a_recipe_file_merges_with_keys_replaced(pico_folder: Path, other_folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    keys = {"method": "slerp", "models": [str(pico_folder), str(other_folder)], "output_dir": str(tmp_path / "a")}
    recipe.write_text(json.dumps(keys))
    loopos.merge(recipe, t=0.0, output=tmp_path / "b")
    assert not (tmp_path / "a").exists()
    torch.testing.assert_close(weights(tmp_path / "b")["lm_head.weight"], weights(pico_folder)["lm_head.weight"])


@pytest.mark.usefixtures("few_goes")
def test_a_pruning_is_that_of_the_command(pico_folder: Path, tmp_path: Path, text: Path) -> None:
    pruned = loopos.prune(pico_folder, sparsity=0.5, output=tmp_path / "python", evaluate=text, window=256)
    told = command("prune", pico_folder, "--method", "magnitude", "--sparsity", "0.5", "-o", tmp_path / "cli",
                   "--evaluate", text, "--window", 256)  # fmt: skip
    assert_same_weights(tmp_path / "python", tmp_path / "cli")
    assert pruned.before.metrics == told["before"]["metrics"]
    assert pruned.after[0].measured.metrics == told["after"][0]["metrics"] != told["before"]["metrics"]
    assert [rate.name for rate in pruned.after[0].rates] == [rate["work"] for rate in told["after"][0]["rates"]]


@pytest.mark.usefixtures("few_goes")
def test_a_quantization_is_that_of_the_command(pico_folder: Path, tmp_path: Path) -> None:
    small = loopos.quantize(pico_folder, format="int8", output=tmp_path / "python", keep=["*.down_proj"])
    told = command("quantize", pico_folder, "--method", "int8", "-o", tmp_path / "cli", "--keep", "*.down_proj")
    assert_same_weights(tmp_path / "python", tmp_path / "cli")
    assert small.after[0].size_ratio == told["after"][0]["share"] < 1


@pytest.mark.slow
@pytest.mark.usefixtures("few_goes")
def test_a_recipe_file_quantizes_with_keys_replaced(pico_folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"model": str(pico_folder), "method": "int4"}))
    again = loopos.quantize(recipe, output=tmp_path / "of_recipe", group_size=64)
    assert (again.recipe.method, again.recipe.group) == ("int4", 64)


def test_an_export_is_that_of_the_command_and_warns_where_it_does(pico_folder: Path, tmp_path: Path) -> None:
    exported = loopos.export(pico_folder, format="huggingface", type="f16", output=tmp_path / "python")
    told = command("export", pico_folder, "--format", "huggingface", "--type", "f16", "-o", tmp_path / "cli")
    assert_same_weights(tmp_path / "python", tmp_path / "cli")
    assert exported.check is not None
    assert (exported.check.largest, exported.bytes_after) == (told["largest_difference"], told["bytes_after"])
    assert not exported.warning


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory, pico_folder: Path) -> list[Path]:
    folder = tmp_path_factory.mktemp("members")
    for seed in (1, 2):
        train(config_of(folder / f"run_{seed}", pico_folder, class_rows(24), training={"seed": seed}))
    return [folder / "run_1", folder / "run_2"]


def test_an_ensemble_is_that_of_the_command(members: list[Path], tmp_path: Path) -> None:
    test = write_jsonl(tmp_path / "test.jsonl", class_rows(12))
    runs = [loopos.Run(member) for member in members]
    together = loopos.ensemble(runs, output=tmp_path / "python", method="logits", test=test)
    told = command("ensemble", *members, "-o", tmp_path / "cli", "--method", "logits", "--test", test)
    assert together.weights == [0.5, 0.5]
    [measured] = together.measured  # type: ignore[union-attr]
    assert measured.mean == told["measured"][0]["mean"]
    texts = ["good film", "bad parcel"]
    opened = [loopos.load(tmp_path / name, "head", device="cpu").predict(texts) for name in ("python", "cli")]
    assert opened[0] == opened[1]
    with pytest.raises(loopos.UserError, match="weights: no use for classifiers and regressors; leave it out"):
        loopos.ensemble(members, output=tmp_path / "new", weights=[1, 2])


def test_an_ensemble_of_language_models(pico_folder: Path, other_folder: Path, tmp_path: Path) -> None:
    made = loopos.ensemble([pico_folder, other_folder], output=tmp_path / "both", weights=[1, 3])
    assert tuple(made.weights) == (0.25, 0.75)
    assert len(loopos.generate(tmp_path / "both", "good", max_new_tokens=3)) > 0
    with pytest.raises(loopos.UserError, match="fit, columns: no use for language models; leave them out"):
        loopos.ensemble([pico_folder, other_folder], output=tmp_path / "new", fit="a.jsonl", columns={"text": "x"})


Call = Callable[[Path, Path], object]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, out: loopos.prune(model, sparsity=2, output=out), "config: sparsity: got 2"),
        (lambda model, out: loopos.quantize(model, format="int3", output=out), 'config: format: got "int3"'),  # type: ignore[call-overload]
        (lambda model, out: loopos.quantize(model, output=out), "config: format: got nothing"),
        (lambda model, out: loopos.merge([model], method="slerp", output=out), "1 models with slerp"),
        (lambda model, out: loopos.merge([model], method="linear", weights=[1, 2], output=out), "weights: got 2; expected 1"),
        (lambda model, out: loopos.merge(model, method="linear", output=out), "expected a list of models, or a recipe"),
        (lambda model, out: loopos.export(model, format="gif", output=out), 'got the export format "gif"'),  # type: ignore[arg-type]
        (lambda model, out: loopos.prune(out / "no", sparsity=0.5, output=out), "config: model: got"),
    ],
)  # fmt: skip
def test_mistakes_are_user_errors_and_write_nothing(
    call: Call, message: str, pico_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(loopos.UserError) as problem:
        call(pico_folder, tmp_path / "out")
    assert message in str(problem.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.usefixtures("few_goes")
def test_nothing_is_shown_unless_asked_for(
    pico_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    loopos.prune(pico_folder, sparsity=0.5, output=tmp_path / "quiet")
    assert capfd.readouterr() == ("", "")
    loopos.prune(pico_folder, sparsity=0.5, output=tmp_path / "loud", quiet=False)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "measuring the speed of both models" in shown.err
