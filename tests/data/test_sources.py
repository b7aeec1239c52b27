"""What a source names: files, folders, globs, hub ids, and near names where nothing is."""

from __future__ import annotations

from pathlib import Path

import pytest

from loopos.config.diagnostics import DataError
from loopos.data.rows import read
from loopos.data.sources import is_hub_id, locate


def _folder(folder: Path, *names: str) -> str:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text(f"text,label\n{name},1\n")
    return str(folder)


def _texts(source: str, split: str = "train") -> list[object]:
    return [row.values["text"] for row in read(source, split=split)]


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    source = _folder(tmp_path / "rows", "b.csv", "a.csv", ".hidden.csv", "README.md")
    reader = read(source)
    rows = list(reader)
    assert [(row.values["text"], row.line, row.index) for row in rows] == [("a.csv", 2, 0), ("b.csv", 2, 1)]
    assert [row.source for row in rows] == [f"{source}/a.csv", f"{source}/b.csv"] == reader.report.files
    assert reader.report.summary == [f"{source}: not read: README.md"]


@pytest.mark.parametrize(
    ("split", "names"),
    [
        ("train", ["train-00.csv", "train-01.csv"]),
        ("validation", ["my_dev.csv"]),
        ("valid", ["my_dev.csv"]),
        ("test", ["Test.csv"]),
    ],
)
def test_file_names_that_state_a_split_are_read_only_for_it(split: str, names: list[str], tmp_path: Path) -> None:
    source = _folder(tmp_path / "rows", "train-00.csv", "train-01.csv", "Test.csv", "my_dev.csv", "other.csv")
    assert _texts(source, split) == names
    assert read(source, split=split).report.summary == [f"{source}: for the split {split}: {', '.join(names)}"]


def test_a_split_that_no_file_states_is_a_diagnostic(tmp_path: Path) -> None:
    source = _folder(tmp_path / "rows", "train.csv", "test.csv")
    with pytest.raises(DataError, match=r"got the split 'validation'; expected one of .*: test, train"):
        read(source, split="validation")


def test_a_word_within_a_word_is_no_split(tmp_path: Path) -> None:
    assert _texts(_folder(tmp_path / "rows", "training_course.csv", "contest.csv"), "train") == ["training_course.csv"]
    assert _texts(_folder(tmp_path / "more", "contest.csv", "trainers.csv")) == ["contest.csv", "trainers.csv"]


def test_a_glob(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "rows", "b.csv", "a.csv", "c.tsv")
    assert _texts(f"{folder}/*.csv") == ["a.csv", "b.csv"]
    assert _texts(f"{tmp_path}/**/[b]*.csv") == ["b.csv"]
    with pytest.raises(DataError, match="a pattern that no file matches"):
        read(f"{folder}/*.json")


def test_missing_files_name_the_near_ones(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "rows", "sentiment_train.csv", "other.csv")
    with pytest.raises(DataError) as caught:
        read(f"{folder}/sentiment_trian.csv")
    assert f"did you mean '{folder}/sentiment_train.csv'?" in str(caught.value)
    assert caught.value.diagnostics[0].source == f"{folder}/sentiment_trian.csv"
    with pytest.raises(DataError, match="there is no folder"):
        read(f"{tmp_path}/nowhere/a.csv")
    with pytest.raises(DataError, match="paths are relative to"):
        read("nothing-like-it.csv")
    with pytest.raises(DataError, match="an empty path"):
        read(" ")


@pytest.mark.parametrize(("names", "seen"), [((), "nothing"), (("a.xls", "b.png"), "'a.xls', 'b.png'")])
def test_a_folder_without_data_is_a_diagnostic(names: tuple[str, ...], seen: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"a folder that holds {seen}; expected files named .csv"):
        read(_folder(tmp_path / "rows", *names))


def test_a_folder_of_subfolders_names_the_globs_that_read_them(tmp_path: Path) -> None:
    (tmp_path / "repo" / "data" / "deep").mkdir(parents=True)
    (tmp_path / "repo" / "data" / "deep" / "a.jsonl").write_text('{"text": "a"}\n')
    source = str(tmp_path / "repo")
    with pytest.raises(DataError) as caught:
        read(source)
    glob = f"{source}/**/*.jsonl"
    assert f"subfolders are not read; to read those files, give {glob!r}" in str(caught.value)
    assert _texts(glob) == ["a"]
    _folder(tmp_path / "repo", "top.csv")
    reader = read(source)
    assert [row.values["text"] for row in reader] == ["top.csv"]
    assert f"{source}: files in subfolders are not read; {glob!r} would read them" in reader.report.summary


@pytest.mark.parametrize("between", [",", ", ", " ", ";"])
def test_a_list_of_files_in_one_string_suggests_the_glob(between: str, tmp_path: Path) -> None:
    folder = _folder(tmp_path / "rows", "a.csv", "b.csv")
    with pytest.raises(DataError) as caught:
        read(f"{folder}/a.csv{between}{folder}/b.csv")
    assert f"one source is read: a folder or a glob, such as '{folder}/*.csv'" in str(caught.value)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("stanfordnlp/sst2", True),
        ("org/name.v2-x_y", True),
        ("imdb", False),
        ("here/name", False),
        ("org/rows.csv", False),
        ("org/rows.jsonl.gz", False),
        ("a/b/c", False),
        ("./org/name", False),
        ("/org/name", False),
        ("org/", False),
    ],
)
def test_what_reads_as_a_hub_id(source: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert is_hub_id(source) is expected
    if expected:
        assert locate(source, "train").kind == "hub"
