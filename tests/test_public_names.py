"""The public names are these, and importing the package imports nothing heavy."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import loopos
from loopos.config.diagnostics import ConfigError, UserError

CLASSES = {
    *(
        "ChainOfThought",
        "DistillationTrainer",
        "FineTuner",
        "KtoTrainer",
        "PpoTrainer",
        "PreferenceTrainer",
        "Pretrainer",
        "ReinforcementTrainer",
        "RewardModelTrainer",
        "SftTrainer",
        "Trainer",
    ),
    *(
        "ChainOfThoughtConfig",
        "DistillationConfig",
        "FineTuningConfig",
        "PpoConfig",
        "PreferenceConfig",
        "PretrainingConfig",
        "RewardModelConfig",
        "RlhfConfig",
        "SftConfig",
    ),
    *("MergeConfig", "PruningRecipe", "QuantizationRecipe"),
    *("Engine", "FitResult", "Predictor", "Reasoner", "RewardPredictor", "Run", "SamplingParams"),
    *("ConfigError", "DataError", "UserError"),
}
FUNCTIONS = {
    *("ensemble", "export", "generate", "load", "merge", "prune", "quantize", "read_config"),
    *(
        f"register_{kind}"
        for kind in (
            "algorithm",
            "environment",
            "exporter",
            "format",
            "loss",
            "merge_method",
            "method",
            "reward",
            "study_format",
            "study_strategy",
            "tool_parser",
            "tracker",
        )
    ),
    "train",
}


def test_the_public_names_are_pinned() -> None:
    assert set(loopos.__all__) == {"__version__", *CLASSES, *FUNCTIONS}
    assert loopos.__all__ == ["__version__", *sorted(CLASSES), *sorted(FUNCTIONS)]
    for name in loopos.__all__:
        found = getattr(loopos, name)
        assert isinstance(found, type) == (name in CLASSES), name
        assert found.__doc__, name


def test_an_earlier_name_is_read_with_a_note() -> None:
    with pytest.warns(DeprecationWarning, match="loopos.SamplingSettings is now loopos.SamplingParams"):
        assert loopos.SamplingSettings is loopos.SamplingParams
    assert "SamplingSettings" not in dir(loopos)


def test_type_checkers_and_the_running_package_find_the_same_names() -> None:
    """The imports for type checkers name the modules of the lazy list."""
    imported = {}
    for node in ast.walk(ast.parse(Path(loopos.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith("loopos."):
            imported |= {alias.name: node.module for alias in node.names}
    assert imported == loopos._MODULES
    assert {*imported, "__version__"} == set(loopos.__all__)


def test_the_version_is_the_package_s() -> None:
    pyproject = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    assert loopos.__version__ == pyproject["project"]["version"]


def test_import_is_light() -> None:
    program = (
        "import sys, loopos; dir(loopos); print([n for n in ('torch', 'pydantic', 'transformers') if n in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "[]\n"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Coach'"):
        loopos.Coach  # noqa: B018


def config_of(folder: Path) -> dict[str, Any]:
    rows = folder / "rows.jsonl"
    rows.write_text('{"text": "a", "label": 0}\n')
    return {
        "computation": {"mode": "posttraining", "method": "fine_tuning"},
        "training": {"learning_rate": 0.1},
        "data": {"pretrained_weights": "smollm2-135m", "training_data": rows, "output_dir": folder / "run"},
    }


def test_a_config_is_a_dict_too(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    path = tmp_path / "run.json"
    path.write_text(json.dumps(config, default=str))
    assert loopos.read_config(config, ["training.seed=3"]) == loopos.read_config(path, ["training.seed=3"])
    assert loopos.read_config(config, kind=loopos.FineTuningConfig).training.learning_rate == 0.1
    with pytest.raises(UserError, match="got a FineTuningConfig; expected a PpoConfig"):
        loopos.read_config(config, kind=loopos.PpoConfig)


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("training", {"learning_rat": 1}),
        ("training", {"learning_rate": "fast"}),
        # Keys that contradict each other.
        ("training", {"trainable": "lora", "freeze_layers": 3}),
        ("data", {"training_data": "nowhere.jsonl"}),
    ],
)
def test_a_dict_has_the_diagnostics_of_a_file(tmp_path: Path, section: str, change: dict[str, Any]) -> None:
    config = config_of(tmp_path)
    config[section] |= change
    path = tmp_path / "run.json"
    path.write_text(json.dumps(config, default=str))
    with pytest.raises(ConfigError) as of_file:
        loopos.read_config(path)
    with pytest.raises(ConfigError) as of_dict:
        loopos.read_config(config)
    told = [(diagnostic.field, diagnostic.actual, diagnostic.expected) for diagnostic in of_dict.value.diagnostics]
    assert told == [
        (diagnostic.field, diagnostic.actual, diagnostic.expected) for diagnostic in of_file.value.diagnostics
    ]
    assert {diagnostic.location for diagnostic in of_dict.value.diagnostics} == {"config"}


def test_a_value_that_no_config_holds_is_named(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    config["training"]["learning_rate"] = {1, 2}
    with pytest.raises(ConfigError, match=r"config: training\.learning_rate: got \{1, 2\} \(set\)"):
        loopos.read_config(config)


CALLS = """
from typing import assert_type

import loopos

assert_type(loopos.generate("a", "hello"), str)
assert_type(loopos.generate("a", [{"role": "user", "content": "hello"}], temperature=0.5), str)
assert_type(loopos.generate("a", "hello", n=2), list[str])
assert_type(loopos.generate("a", ["hello", "you"], max_new_tokens=3), list[str])
assert_type(loopos.generate("a", ["hello", "you"], n=2), list[list[str]])
run = loopos.train("run.json")
assert_type(run, loopos.Run)
assert_type((run.step, run.best_metric), tuple[int, float | None])
assert_type(run.result, loopos.FitResult)
assert_type(loopos.load(run, "language"), loopos.Reasoner)
assert_type(loopos.prune(run, sparsity=0.5, output="b").after[0].size_ratio, float)
assert_type(loopos.merge([run, "c"], method="slerp", output="d", t=0.3).num_tensors, int)
"""


@pytest.mark.slow
def test_the_snippets_of_the_documents_have_types(tmp_path: Path) -> None:
    assert (Path(loopos.__file__).parent / "py.typed").is_file()
    root = Path(__file__).parents[1]
    pages = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    found = [
        snippet
        for page in pages
        for snippet in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        if "import loopos\n" in snippet
    ]
    assert len(found) >= 4
    found.append(CALLS)
    files = [tmp_path / f"snippet_{number}.py" for number in range(len(found))]
    for file, text in zip(files, found, strict=True):
        file.write_text(text, encoding="utf-8")
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file", str(root / "pyproject.toml"), *map(str, files)],
        capture_output=True,
        text=True,
        env={**os.environ, "MYPYPATH": str(root / "src")},
        cwd=root,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout


def test_a_config_is_read_with_overrides(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a", "label": 0}\n')
    path = tmp_path / "run.json"
    path.write_text(
        json.dumps(
            {
                "computation": {"mode": "posttraining", "method": "fine_tuning"},
                "training": {"learning_rate": 0.1},
                "data": {
                    "pretrained_weights": "smollm2-135m",
                    "training_data": str(rows),
                    "output_dir": str(tmp_path / "run"),
                },
            }
        )
    )
    config = loopos.read_config(path, ["training.learning_rate=0.5"])
    assert isinstance(config, loopos.FineTuningConfig)
    assert config.training.learning_rate == 0.5
