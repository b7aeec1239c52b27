"""`loopos validate`, `loopos schema` and the guide's `loop_cli`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from loopos.cli import guide
from tests.cli.conftest import Invoke


def test_a_valid_config(project: Path, invoke: Invoke) -> None:
    result = invoke(
        "validate",
        project / "run.json",
    )
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"{project / 'run.json'}: valid (posttraining, fine_tuning)\n"


def test_notes_are_shown(project: Path, invoke: Invoke) -> None:
    result = invoke("validate", project / "run.json", "training.num_workers=4")
    assert result.exit_code == 0
    assert result.stderr.startswith("note: training.num_workers has no effect")
    told = json.loads(invoke("validate", project / "run.json", "training.num_workers=4", "--json").stdout)
    assert (told["valid"], len(told["notes"])) == (True, 1)


def test_diagnostics_as_data(project: Path, invoke: Invoke) -> None:
    result = invoke("validate", project / "run.json", "training.batch_size=0", "training.sed=1", "--json")
    assert result.exit_code == 2
    told = json.loads(result.stdout)
    assert told["valid"] is False
    assert {diagnostic["field"] for diagnostic in told["faults"]} == {"training.batch_size", "training.sed"}
    assert all(diagnostic["expected"] for diagnostic in told["faults"])


def test_the_schema_takes_the_guide_s_config(invoke: Invoke) -> None:
    schema = json.loads(invoke("schema").stdout)
    Draft202012Validator.check_schema(schema)
    config = json.loads((Path(__file__).parents[2] / "configs" / "fine_tuning.json").read_text(encoding="utf-8"))
    assert not list(Draft202012Validator(schema).iter_errors(config))
    config["training"]["batch_size"] = "16"
    assert len(list(Draft202012Validator(schema).iter_errors(config))) == 1


def test_the_schema_of_an_unknown_method(invoke: Invoke) -> None:
    result = invoke("schema", "--method", "tuning")
    assert result.exit_code == 2
    assert 'expected "fine_tuning", ' in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-c", "x.json"], ["train", "x.json"]),
        (["--config", "x.json", "training.seed=1"], ["train", "x.json", "training.seed=1"]),
        (["--validate", "x.json"], ["validate", "x.json"]),
        (["--list-configs"], ["list"]),
    ],
)
def test_the_guide_s_options(arguments: list[str], words: list[str]) -> None:
    assert guide.command_of(arguments) == words


@pytest.mark.parametrize("arguments", [[], ["-c", "x.json", "--validate", "y.json"], ["--run", "x.json"]])
def test_other_options_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        guide.command_of(arguments)
    assert ended.value.code == 2
    assert "usage: loop_cli" in capsys.readouterr().err


def test_configs_are_listed_with_their_description(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "demo").mkdir()
    computation = {"mode": "posttraining", "method": "fine_tuning", "description": "of the section"}
    (tmp_path / "b.json").write_text(json.dumps({"computation": computation}))
    (tmp_path / "demo" / "a.json").write_text(json.dumps({"description": "of the file", "computation": computation}))
    (tmp_path / "broken.json").write_text("{")
    guide.list_configs(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].split() == [str(tmp_path / "b.json"), "posttraining", "fine_tuning", "of", "the", "section"]
    assert lines[1].split()[:2] == [str(tmp_path / "broken.json"), "broken"]
    assert lines[2].endswith("of the file")


def test_a_folder_without_configs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guide.list_configs(tmp_path)
    assert capsys.readouterr().out == f"{tmp_path}/: no configs here\n"
