"""Rows of generated files: whatever the standard library writes reads back, and any bytes are rows or a clear error."""

from __future__ import annotations

import csv
import io
import json

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from loopos.config.diagnostics import DataError
from loopos.data.rows import read

CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8) | st.sampled_from(
    ["", '"', "\n", "\r\n", "a,b", '""', "a\nb", " x "]
)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(st.lists(CELLS, min_size=2, max_size=2), min_size=1, max_size=6),
    delimiter=st.sampled_from([",", "\t"]),
    line_end=st.sampled_from(["\n", "\r\n"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_whatever_csv_writes_reads_back_with_its_lines(
    rows: list[list[str]], delimiter: str, line_end: str, quoting: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    # Python 3.11 writes a lone carriage return without quotes where rows end in \n; no reader can tell it from a line end.
    assume(quoting == csv.QUOTE_ALL or not any("\r" in cell for row in rows for cell in row))
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, delimiter=delimiter, lineterminator=line_end, quoting=quoting)  # type: ignore[arg-type]
    writer.writerow(["text", "label"])
    lines = []
    for row in rows:
        lines.append(buffer.getvalue().count("\n") + 1)
        writer.writerow(row)
    name = "a.tsv" if delimiter == "\t" else "a.csv"
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(buffer.getvalue().encode())
    got = list(read(str(path)))
    assert [[row.values["text"], row.values["label"]] for row in got] == rows
    assert [row.line for row in got] == lines


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
OBJECTS = st.lists(st.dictionaries(st.text(max_size=5), VALUES, max_size=4), min_size=1, max_size=5)


@settings(max_examples=50, deadline=None)
@given(rows=OBJECTS, ascii_only=st.booleans(), indent=st.sampled_from([None, 1]), wrapped=st.booleans())
def test_whatever_json_writes_reads_back_with_its_lines(
    rows: list[dict[str, object]], ascii_only: bool, indent: int | None, wrapped: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    lines = tmp_path_factory.getbasetemp() / "a.jsonl"
    lines.write_text("".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows), encoding="utf-8")
    expected = json.loads(json.dumps(rows))
    got = list(read(str(lines)))
    assert [row.values for row in got] == expected
    assert [row.line for row in got] == list(range(1, len(rows) + 1))
    document = tmp_path_factory.getbasetemp() / "a.json"
    document.write_text(json.dumps({"data": rows} if wrapped else rows, indent=indent))
    assert [row.values for row in read(str(document))] == expected


@settings(max_examples=150, deadline=None)
@given(
    content=st.binary(max_size=80), name=st.sampled_from(["a.csv", "a.tsv", "a.json", "a.jsonl", "a.txt", "a.csv.gz"])
)
def test_any_bytes_are_rows_or_a_data_error(
    content: bytes, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    reader = read(str(path), on_bad_row="skip")
    seen = 0
    source = str(path)
    try:
        for _ in reader:
            seen += 1
    except DataError as error:
        source = error.diagnostics[0].source
    assert source == str(path)
    assert reader.report.rows_read == seen + reader.report.bad_rows
