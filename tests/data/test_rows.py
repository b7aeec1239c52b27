"""Rows of every kind of source: values, lines and counts as they were written."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
import zstandard

from loopos.config.diagnostics import DataError
from loopos.data.record import BadRows
from loopos.data.rows import read

PLAIN = 'text,label\ngood film,pos\n"bad,\nvery ""bad""",neg\nfine,pos\n'
PLAIN_ROWS = [("good film", "pos", 2), ('bad,\nvery "bad"', "neg", 3), ("fine", "pos", 5)]
TABLE = {"text": ["good", "bad", "fine"], "label": [1, 0, 1]}


def _write(path: Path, content: bytes | str) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def _values(source: str) -> list[tuple[object, object, int | None]]:
    return [(row.values["text"], row.values["label"], row.line) for row in read(source)]


@pytest.mark.parametrize(
    ("name", "encode"),
    [
        ("a.csv", str.encode),
        ("a.txt", str.encode),
        ("a.csv.gz", lambda text: gzip.compress(text.encode())),
        ("a.csv.gz", lambda text: gzip.compress(text[:20].encode()) + gzip.compress(text[20:].encode())),
        ("a.csv.zst", lambda text: zstandard.compress(text.encode())),
        ("a.csv.zst", lambda text: zstandard.compress(text[:20].encode()) + zstandard.compress(text[20:].encode())),
        ("a.csv", lambda text: b"\xef\xbb\xbf" + text.encode()),
        ("a.csv", lambda text: text.encode("utf-16")),
        ("a.csv", lambda text: b"\xfe\xff" + text.encode("utf-16-be")),
        ("a.csv", lambda text: text.rstrip("\n").encode()),
    ],
)
def test_encodings_and_compressions_read_as_the_plain_file(
    name: str, encode: Callable[[str], bytes], tmp_path: Path
) -> None:
    assert _values(_write(tmp_path / name, encode(PLAIN))) == PLAIN_ROWS


def test_line_ends_of_windows(tmp_path: Path) -> None:
    source = _write(tmp_path / "a.csv", "text,label\r\ngood,pos\r\n\r\nbad,neg\r\n")
    assert _values(source) == [("good", "pos", 2), ("bad", "neg", 4)]


def test_json_lines_keep_types_lines_and_count_blanks(tmp_path: Path) -> None:
    text = '\n{"text": "é", "label": 1}\r\n\n{"text": "01", "label": [2.5, null]}'
    reader = read(_write(tmp_path / "a.jsonl", text))
    assert [(row.values, row.line, row.index) for row in reader] == [
        ({"text": "é", "label": 1}, 2, 0),
        ({"text": "01", "label": [2.5, None]}, 4, 1),
    ]
    assert (reader.report.rows_read, reader.report.bad_rows, reader.report.blank_lines) == (2, 0, 2)


def test_a_json_array_keeps_the_line_of_each_element(tmp_path: Path) -> None:
    text = '\n[{"text": "a",\n"label": 1},\n\n  {"text": "b", "label": 2}, {"text": "c", "label": 3}\n]\n'
    assert _values(_write(tmp_path / "a.json", text)) == [("a", 1, 2), ("b", 2, 5), ("c", 3, 5)]


def test_a_json_object_with_data_and_json_lines_named_json(tmp_path: Path) -> None:
    document = '{"version": [1, {"data": 2}],\n"data": [\n{"text": "a", "label": 1}\n],\n"more": null}'
    assert _values(_write(tmp_path / "a.json", document)) == [("a", 1, 3)]
    lines = '{"text": "a", "label": 1}\n{"text": "b", "label": 2}\n'
    reader = read(_write(tmp_path / "b.json", lines))
    assert [row.line for row in reader] == [1, 2]
    assert reader.report.summary == [f"{tmp_path}/b.json: read as JSON Lines, by its content"]


@pytest.mark.parametrize(
    ("content", "summary"),
    [
        ('{"text": "a", "label": "x"}\n', "JSON Lines"),
        ('[\n{"text": "a", "label": "x"}\n]', "a JSON document"),
        ("text,label\na,x\n", "CSV (delimiter: comma)"),
        ("label\ttext\nx\ta\n", "TSV (delimiter: tab)"),
        ("text;label\na;x\n", "CSV (delimiter: semicolon)"),
        ('"text","label"\n"a","x"\n', "CSV (delimiter: comma)"),
        ("text,user label\na,x\nb,y\n", "CSV (delimiter: comma)"),
    ],
)
def test_txt_is_read_by_content(content: str, summary: str, tmp_path: Path) -> None:
    reader = read(_write(tmp_path / "a.txt", content))
    assert next(iter(reader)).values["text"] == "a"
    assert reader.report.summary == [f"{tmp_path}/a.txt: read as {summary}, by its content"]


def test_delimiters_and_the_unnamed_pandas_index_are_reported(tmp_path: Path) -> None:
    reader = read(_write(tmp_path / "a.csv", ";text;label\n0;a;x\n"))
    assert [row.values for row in reader] == [{"column 1": "0", "text": "a", "label": "x"}]
    assert len(reader.report.summary) == 2
    excel = read(_write(tmp_path / "b.csv", "sep=;\ntext;label\na;x\n"))
    assert [(row.values["label"], row.line) for row in excel] == [("x", 3)]


def test_long_cells_are_whole(tmp_path: Path) -> None:
    long = "word " * 700_000
    source = _write(tmp_path / "a.csv", f'text,label\n"{long}\n{long}",x\n')
    assert _values(source) == [(f"{long}\n{long}", "x", 2)]


def test_parquet_arrow_and_feather_read_alike(tmp_path: Path) -> None:
    table = pyarrow.table(TABLE)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    pyarrow.feather.write_feather(table, tmp_path / "a.feather")
    with pyarrow.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as stream:
        stream.write_table(table)
    for name in ("a.parquet", "a.feather", "a.arrow"):
        assert _values(str(tmp_path / name)) == [("good", 1, None), ("bad", 0, None), ("fine", 1, None)]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.feather"])
@pytest.mark.parametrize("content", [b"", b"PAR1", b"ARROW1\0\0", b"text,label\na,x\n", bytes(200)])
def test_a_damaged_table_is_a_diagnostic(name: str, content: bytes, tmp_path: Path) -> None:
    source = _write(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        list(read(source))
    assert caught.value.diagnostics[0].source == source


def test_cut_and_empty_tables_are_diagnostics(tmp_path: Path) -> None:
    table = pyarrow.table({"text": [f"row {number}" for number in range(5000)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    cut = _write(tmp_path / "cut.parquet", whole[: len(whole) // 2])
    with pytest.raises(DataError, match="can't be read as parquet"):
        list(read(cut))
    pyarrow.parquet.write_table(table.slice(0, 0), tmp_path / "empty.parquet")
    with pytest.raises(DataError, match="no rows"):
        list(read(str(tmp_path / "empty.parquet")))


def test_saved_data_sets_with_splits_and_class_names(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    table = datasets.Dataset.from_dict(TABLE, features=features)
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": table, "test": table.select([2])}).save_to_disk(str(tmp_path / "two"))
    reader = read(str(tmp_path / "one"))
    assert [(row.values["label"], row.line, row.index) for row in reader] == [(1, None, 0), (0, None, 1), (1, None, 2)]
    assert reader.report.class_names == {"label": ("no", "yes")}
    assert [row.values["text"] for row in read(str(tmp_path / "two"), split="test")] == ["fine"]
    with pytest.raises(DataError, match="train, test"):
        list(read(str(tmp_path / "two"), split="validation"))
    table.to_parquet(str(tmp_path / "a.parquet"))
    parquet = read(str(tmp_path / "a.parquet"))
    assert len(list(parquet)) == 3
    assert parquet.report.class_names == {"label": ("no", "yes")}
    (tmp_path / "one" / "dataset_info.json").unlink()
    with pytest.raises(DataError, match="save_to_disk"):
        list(read(str(tmp_path / "one")))


@pytest.mark.parametrize(
    "error",
    [
        datasets.exceptions.DatasetNotFoundError("Dataset 'org/name' doesn't exist on the Hub"),
        ConnectionError("Couldn't reach the hub"),
        ValueError('Unknown split "train". Should be one of ["test"].'),
        RuntimeError("Dataset scripts are no longer supported"),
    ],
)
def test_a_hub_failure_says_what_to_do(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str, name: str | None, split: str, streaming: bool) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError) as caught:
        list(read("org/name", subset="plain"))
    message = str(caught.value)
    assert message.startswith("org/name: hub: got a hub id that could not be loaded")
    assert str(error).splitlines()[0] in message
    assert "HF_TOKEN" in message
    assert "save_to_disk" in message


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_rows(streaming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def load(path: str, name: str | None, split: str, streaming: bool) -> object:
        asked.append((path, name, split, streaming))
        table = datasets.Dataset.from_dict(TABLE)
        return table.to_iterable_dataset() if streaming else table

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = list(read("org/name", split="test", subset="plain", streaming=streaming, max_rows=2))
    assert [row.values["text"] for row in rows] == ["good", "bad"]
    assert [(row.source, row.index) for row in rows] == [("org/name", 0), ("org/name", 1)]
    assert asked == [("org/name", "plain", "test", streaming)]


BAD = "text,label\nbad\ngood,pos\nworse,a,b\nfine,neg\n"


def test_skipped_rows_are_counted_and_keep_their_position(tmp_path: Path) -> None:
    reader = read(_write(tmp_path / "a.csv", BAD), on_bad_row="skip")
    assert [(row.values["text"], row.line, row.index) for row in reader] == [("good", 3, 1), ("fine", 5, 3)]
    report = reader.report
    assert (report.rows_read, report.bad_rows, report.good_rows) == (4, 2, 2)
    assert [(diagnostic.line, diagnostic.field) for diagnostic in report.diagnostics] == [(2, "label"), (4, "cell 3")]
    assert len(list(reader)) == 2
    assert reader.report.rows_read == 4


def test_bad_rows_raise_at_the_end_or_at_once_when_streaming(tmp_path: Path) -> None:
    source = _write(tmp_path / "a.csv", BAD)
    rows = iter(read(source))
    seen = [next(rows).line, next(rows).line]
    with pytest.raises(BadRows) as caught:
        next(rows)
    assert [diagnostic.line for diagnostic in caught.value.diagnostics] == [2, 4]
    assert caught.value.total == 2
    assert seen == [3, 5]
    with pytest.raises(BadRows) as first:
        list(read(source, streaming=True))
    assert [diagnostic.line for diagnostic in first.value.diagnostics] == [2]


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_a_diagnostic_of_the_file_raises_under_both_policies(on_bad_row: str, tmp_path: Path) -> None:
    source = _write(tmp_path / "a.csv", 'text,label\ngood,pos\n"bad,neg\n')
    with pytest.raises(DataError, match="never closed"):
        list(read(source, on_bad_row="skip" if on_bad_row == "skip" else "error"))


def test_max_rows(tmp_path: Path) -> None:
    source = _write(tmp_path / "a.csv", BAD)
    reader = read(source, max_rows=2, on_bad_row="skip")
    assert [row.values["label"] for row in reader] == ["pos"]
    assert (reader.report.rows_read, reader.report.bad_rows) == (2, 1)
