"""A method of a package of the user's, found through an entry point, listed, checked and trained."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from own_packages import installed
from pico_runs import class_rows, write_jsonl
from typer.testing import CliRunner

from loopos.cli.commands import app
from loopos.config.diagnostics import UserError
from loopos.config.methods import METHODS, MethodRow, method_row
from loopos.config.registry import Reference, Registry

METHOD = """
from loopos import FineTuner, FineTuningConfig, register_method


@register_method("label_noise", config=FineTuningConfig, summary="a head that never trusts a label", reads=("labeled",))
class LabelNoise(FineTuner):
    def objective(self):
        self.config = self.config.model_copy(
            update={"model": self.config.model.model_copy(update={"label_smoothing": 0.5})}
        )
        return super().objective()
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed package whose one module registers a method."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "noisy_labels.py").write_text(METHOD, encoding="utf-8")
    with installed(site, site, "noisy_labels", monkeypatch):
        yield site


def run(*words: object) -> object:
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


def config(tmp_path: Path, pico_folder: Path, method: str) -> Path:
    rows = write_jsonl(tmp_path / "rows.jsonl", class_rows(24))
    file = tmp_path / f"{method.replace(':', '-')}.json"
    file.write_text(
        json.dumps(
            {
                "computation": {"mode": "posttraining", "method": method},
                "training": {"learning_rate": 0.01, "optimizer": "adamw", "precision": "fp32", "num_epochs": 1},
                "data": {
                    "pretrained_weights": str(pico_folder),
                    "training_data": str(rows),
                    "output_dir": str(tmp_path / file.stem),
                },
            }
        )
    )
    return file


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [line["metrics"]["loss"] for line in lines if line["event"] == "step"]


def test_a_method_of_a_package_is_listed_checked_and_trained(package: Path, tmp_path: Path, pico_folder: Path) -> None:
    listed = json.loads(run("list", "methods", "--json").stdout)  # type: ignore[attr-defined]
    assert [row["name"] for row in listed][-1] == "label_noise"
    assert listed[-1] == {
        "name": "label_noise",
        "summary": "a head that never trusts a label",
        "source": "noisy_labels",
    }
    for method in ("label_noise", "noisy_labels:LabelNoise", "fine_tuning"):
        result = run("train", config(tmp_path, pico_folder, method), "--quiet")
        assert result.exit_code == 0, result.stderr  # type: ignore[attr-defined]
    noisy, named, plain = (
        losses(tmp_path / name) for name in ("label_noise", "noisy_labels-LabelNoise", "fine_tuning")
    )
    assert noisy == named
    assert noisy != plain
    assert len(noisy) == len(plain) >= 2


def test_what_a_method_reads_decides_how_its_run_is_planned_and_shown(
    package: Path, tmp_path: Path, pico_folder: Path
) -> None:
    """A method of a package is previewed and planned as the built-in ones are; one that says nothing, is refused."""
    planned = {}
    for method in ("label_noise", "fine_tuning"):
        file = config(tmp_path, pico_folder, method)
        plan = run("train", file, "--dry-run", "--json")
        assert plan.exit_code in (0, 3), plan.stderr  # type: ignore[attr-defined]
        planned[method] = json.loads(plan.stdout)  # type: ignore[attr-defined]
        shown = run("data", "preview", file, "--rows", "1")
        assert "[pooled] by" in shown.stdout  # type: ignore[attr-defined]
    for part in ("model", "rows", "tokens", "steps"):
        assert planned["label_noise"][part] == planned["fine_tuning"][part]
    (package / "silent.py").write_text(METHOD.replace("label_noise", "silent").replace(', reads=("labeled",)', ""))
    file = config(tmp_path, pico_folder, "silent:LabelNoise")
    for words in (("train", file, "--dry-run"), ("data", "preview", file)):
        result = run(*words)
        assert result.exit_code == 2  # type: ignore[attr-defined]
        assert 'the method "silent:LabelNoise" does not say what it reads' in result.stderr  # type: ignore[attr-defined]


def test_a_method_of_comparisons_says_whether_it_trains_scores(
    package: Path, tmp_path: Path, pico_folder: Path
) -> None:
    text = METHOD.replace("FineTuner", "RewardModelTrainer").replace("FineTuningConfig", "RewardModelConfig")
    (package / "preferring.py").write_text(
        text.replace("label_noise", "preferring").replace('"labeled",', '"comparisons",')
    )
    as_language = text.replace("label_noise", "writing").replace('("labeled",)', '("comparisons",), model="language"')
    (package / "writing.py").write_text(as_language)
    row = {"prompt": "good film", "chosen": "a kind answer", "rejected": "cold food"}
    rows = write_jsonl(tmp_path / "pairs.jsonl", [{**row, "prompt": f"film {number}"} for number in range(12)])
    plans, loads = {}, {}
    for name in ("preferring", "writing"):
        file = config(tmp_path, pico_folder, f"{name}:LabelNoise")
        words = (file, f"data.training_data={rows}")
        plans[name] = json.loads(run("train", *words, "--dry-run", "--json").stdout)  # type: ignore[attr-defined]
        planned = run("plan", *words, "--gpus", 1, "--memory", "80GiB", "--json")
        assert planned.exit_code in (0, 3), planned.stderr  # type: ignore[attr-defined]
        loads[name] = planned.stdout  # type: ignore[attr-defined]
    assert plans["preferring"]["rows"] == plans["writing"]["rows"]
    assert plans["preferring"]["model"]["name"] == "LlamaModel"
    assert plans["writing"]["model"]["name"] == "LlamaForCausalLM"
    assert "learned" in plans["writing"]["tokens"]
    assert "learned" not in plans["preferring"]["tokens"]
    assert loads["preferring"] != loads["writing"]


def test_an_unknown_method_names_those_of_packages_too(package: Path, tmp_path: Path, pico_folder: Path) -> None:
    result = run("train", config(tmp_path, pico_folder, "label_nois"))
    assert result.exit_code == 2  # type: ignore[attr-defined]
    assert 'did you mean "label_noise"?' in result.stderr  # type: ignore[attr-defined]
    result = run("train", config(tmp_path, pico_folder, "noisy_labels:Nothing"))
    assert result.exit_code == 2  # type: ignore[attr-defined]
    assert '"noisy_labels:Nothing"' in result.stderr  # type: ignore[attr-defined]


def test_a_package_that_cannot_be_imported_is_named(package: Path) -> None:
    (package / "noisy_labels.py").write_text("import no_such_module_here\n", encoding="utf-8")
    with pytest.raises(UserError, match=r'"noisy_labels" of the package noisy-labels .*no_such_module_here'):
        list(METHODS)


def test_a_name_has_one_owner() -> None:
    registry: Registry[int] = Registry("loss", {"one": 1}, adopt=lambda value: value)
    registry.register("two", Reference("math:tau"), source="mine")
    assert (registry["one"], round(registry["two"], 2), registry["math:pi"] > 3) == (1, 6.28, True)
    assert (list(registry), len(registry), "two" in registry) == (["one", "two"], 2, True)
    with pytest.raises(UserError, match='"one" is already registered by loopos'):
        registry.register("one", 3, source="mine")
    with pytest.raises(UserError, match="without a colon"):
        registry.register("a:b", 3, source="mine")
    with pytest.raises(
        UserError, match=r'"twoo"; expected "one", "two" or "module:name" of your own; did you mean "two"\?'
    ):
        registry["twoo"]
    with pytest.raises(UserError, match='"math:nothing"'):
        registry["math:nothing"]


def test_a_class_that_is_not_registered_is_no_method() -> None:
    with pytest.raises(UserError, match="not registered; decorate the class"):
        method_row("loopos.methods.base:Trainer")
    assert isinstance(METHODS["fine_tuning"], MethodRow)
