"""`loopos study`: from a file of pairs to votes, figures and training data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loopos.config.diagnostics import ConfigError, DataError
from loopos.config.load import load_recipe
from loopos.config.source import read_source
from loopos.config.study import StudyConfig
from loopos.studies.study import Study
from tests.studies.study_makers import label_all, prefers


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs `loopos` with arguments and what is typed; the result has exit_code and output."""
    from typer.testing import CliRunner

    from loopos.cli.commands import app

    return lambda *arguments, typed="": CliRunner().invoke(app, [str(each) for each in arguments], input=typed)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"question {n}", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(8)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_from_pairs_to_training_data(invoke: Any, tmp_path: Path, pairs: Path) -> None:
    folder = tmp_path / "study"
    made = invoke("study", "new", folder, "title=Which is better?", "repeat_fraction=0.0")
    assert made.exit_code == 0, made.output
    added = invoke("study", "add", folder, pairs, "--source", "A", "--source", "B")
    assert "8 items added; 8 in all" in added.output
    again = json.loads(invoke("study", "add", folder, pairs, "--source", "A", "--source", "B", "--json").stdout)
    assert (again["added"], again["repeated"], again["items"]) == (0, 8, 8)
    # A vote with a strength, one taken back, a mistake, a tie, a skip, a flag.
    voted = invoke("study", "vote", folder, "--annotator", "ana", typed="1 3\n2\nundo\n1\n9\nt\ns\nf spam\n2\nq\n")
    assert voted.exit_code == 0, voted.output
    assert "got 9; expected one of 1, 2, t, b" in voted.output
    with Study.open(folder) as study:
        assert [vote.ballot.choice for vote in study.votes()] == ["left", "left", "tie", "right"]
        assert study.votes()[0].ballot.strength == 3
        assert (study.progress().skips, study.progress().flagged) == (1, 1)
        label_all(study, "bo", prefers("A"))
    # One is on the screen that Ana left.
    shown = invoke("study", "show", folder, "--between", "A", "--between", "B")
    assert shown.exit_code == 0, shown.output
    for part in ("6 of 7 votes", "left of those with a winner", "A (a) against B (b)"):
        assert part in shown.output
    figures = json.loads(invoke("study", "show", folder, "--json").stdout)
    assert (figures["quality"]["votes"], figures["quality"]["ties"], figures["win_rate"]) == (6, 1, None)
    out = tmp_path / "out.jsonl"
    written = invoke("study", "export", folder, "-o", out, "--validation", "0.3", "--json")
    counts = json.loads(written.stdout)
    assert counts["dropped"] == {"tie": 1}
    assert sum(counts["written"].values()) == 5
    assert len(counts["written"]) == 2
    checked = invoke("data", "check", out)
    assert checked.exit_code == 0, checked.output
    assert "kind      pairs" in checked.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "{missing}"), "got no study.json there; expected the folder of a study: make one with"),
        (("new", "{new}", "overlap=0"), "command line: title: got nothing"),
        (("new", "{new}", "title=x", "strategy=best"), 'strategy: got "best"; expected "random", "disagreement"'),
        (("export", "{study}", "-o", "{out}"), "got no votes; expected some"),
        (("export", "{study}", "-o", "{out}", "--validation", "1"), "--validation: got 1; expected 0 or more"),
        (("show", "{study}", "--between", "A"), "--between: got 1 sources; expected two"),
        (("new", "{study}", "title=x"), "which exists; expected a new folder"),
    ],
)
def test_mistakes_are_named(invoke: Any, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    folders = {name: str(tmp_path / name) for name in ("missing", "new", "study", "out")}
    Study.create(Path(folders["study"]), StudyConfig(title="x")).close()
    found = invoke("study", *(each.format(**folders) for each in arguments))
    assert found.exit_code == 2
    assert message in " ".join(found.output.split())


def test_a_setting_that_does_not_fit_is_named_with_line_and_column(tmp_path: Path) -> None:
    file = tmp_path / "study.json"
    file.write_text('{\n  "title": "x",\n  "mode": "compar",\n  "overlap": 3,\n  "annotators": ["ana", "ana"]\n}\n')
    with pytest.raises(ConfigError) as caught:
        load_recipe(read_source(file), [], StudyConfig)
    text = str(caught.value)
    assert f'{file}:3:11: mode: got "compar"; expected "compare", "rating" or "thumbs"' in text
    assert f'{file}:5:17: annotators: got "ana" twice; expected distinct names' in text
    assert f"{file}:4:14: overlap: got 3 annotators per item, and 2 who may vote" in text
    file.write_text('{"title": "x", "mode": "thumbs", "rating_scale": [5, 1]}')
    with pytest.raises(ConfigError, match="rating_scale: got from 5 to 1"):
        load_recipe(read_source(file), [], StudyConfig)
    file.write_text('{"title": "x", "mode": "thumbs", "rating_scale": [1, 7]}')
    assert load_recipe(read_source(file), [], StudyConfig).notes == ["rating_scale has no effect: the mode is thumbs"]


def test_the_settings_that_are_saved_are_those_that_are_read(tmp_path: Path) -> None:
    config = StudyConfig(title="x", criteria=["style"], lease=90.0, annotators=["ana"], strategy="diversity")
    Study.create(tmp_path / "s", config).close()
    with Study.open(tmp_path / "s") as study:
        assert study.config == config
    (tmp_path / "s" / "items.jsonl").write_text('{"prompt": 3}\n')
    with pytest.raises(DataError, match=r"items.jsonl:1:12: prompt: got 3"):
        Study.open(tmp_path / "s")


def test_strategies_and_formats_are_listed(invoke: Any) -> None:
    for kind, names in (("study-strategies", ("random", "diversity")), ("study-formats", ("kto", "argilla"))):
        listed = {row["name"]: row["summary"] for row in json.loads(invoke("list", kind, "--json").stdout)}
        assert all(listed[name] for name in names)
