"""Excel workbooks, written by openpyxl and by hand, read as rows."""

from __future__ import annotations

import datetime
import sys
import zipfile
from pathlib import Path
from typing import Any

import openpyxl
import pytest

from loopos.config.diagnostics import DataError, MissingRequirement
from loopos.data.formats import read_labeled
from loopos.data.rows import read

ROWS = [
    ["text", "label", "sent"],
    ["late", "complaint", datetime.datetime(2024, 5, 1)],
    [None],
    ["fine", "praise", None],
]


def _workbook(path: Path, **sheets: list[list[Any]]) -> str:
    book = openpyxl.Workbook()
    book.remove(book.active)
    for name, rows in sheets.items():
        sheet = book.create_sheet(name)
        for row in rows:
            sheet.append(row)
    book.save(path)
    return str(path)


def test_rows_have_their_numbers_and_values(tmp_path: Path) -> None:
    reader = read(_workbook(tmp_path / "a.xlsx", Tickets=ROWS))
    assert [(row.line, row.values) for row in reader] == [
        (2, {"text": "late", "label": "complaint", "sent": "2024-05-01"}),
        (4, {"text": "fine", "label": "praise", "sent": None}),
    ]
    assert reader.report.blank_lines == 1
    examples, report = read_labeled(read(str(tmp_path / "a.xlsx")), {})
    assert [(each.text, each.label) for each in examples] == [("late", "complaint"), ("fine", "praise")]
    assert (report.read, report.used) == (2, 2)


def test_numbers_and_truths_stay_what_they_are(tmp_path: Path) -> None:
    source = _workbook(tmp_path / "a.xlsx", S=[["", "text", "y"], [None, "a", 3], [None, "b", 2.5], [None, "c", True]])
    assert [row.values for row in read(source)] == [
        {"text": "a", "y": 3},
        {"text": "b", "y": 2.5},
        {"text": "c", "y": True},
    ]


def test_one_of_several_sheets_is_named_behind_a_hash(tmp_path: Path) -> None:
    other = [["text", "label"], ["x", "y"]]
    source = _workbook(tmp_path / "a.xlsx", Tickets=ROWS, Old=other, Notes=[])
    with pytest.raises(DataError) as caught:
        list(read(source))
    assert "got 2 sheets with rows: 'Tickets', 'Old'; expected one sheet" in str(caught.value)
    assert "a.xlsx#Tickets" in str(caught.value)
    assert [row.values["text"] for row in read(f"{source}#Old")] == ["x"]
    with pytest.raises(DataError, match=r"got the sheet 'New'; expected one of the existing sheets: 'Tickets'"):
        list(read(f"{source}#New"))
    alone = read(_workbook(tmp_path / "b.xlsx", Empty=[], Full=other))
    assert [row.values["label"] for row in alone] == ["y"]
    assert "read the sheet 'Full', the only one with rows" in alone.report.summary[0]


@pytest.mark.parametrize(
    ("rows", "piece"),
    [
        ([], "an empty workbook"),
        ([["text", "text"], ["a", "b"]], "the column name 'text' twice (columns A and B)"),
        ([["text", "label"]], "no rows"),
        ([["text", "label"], ["a", "b", "c"]], "'c' in column C, which has no name"),
    ],
)
def test_a_sheet_that_is_no_table_is_a_diagnostic(rows: list[list[Any]], piece: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        list(read(_workbook(tmp_path / "a.xlsx", S=rows)))
    assert piece in str(caught.value)


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.9])
def test_a_damaged_workbook_is_a_diagnostic(cut: float, tmp_path: Path) -> None:
    source = Path(_workbook(tmp_path / "a.xlsx", S=ROWS))
    source.write_bytes(source.read_bytes()[: int(cut * source.stat().st_size)])
    with pytest.raises(DataError, match=r"got what can't be read as \.xlsx"):
        list(read(str(source)))


def test_broken_xml_and_a_workbook_that_unpacks_to_gigabytes_are_diagnostics(tmp_path: Path) -> None:
    source = _workbook(tmp_path / "a.xlsx", S=ROWS)
    with zipfile.ZipFile(source) as whole:
        members = {name: whole.read(name) for name in whole.namelist()}
    sheet = "xl/worksheets/sheet1.xml"
    for content, piece in ((members[sheet][:200], "can't be read as .xlsx"), (bytes(80 << 20), "unpack to more than")):
        with zipfile.ZipFile(source, "w", zipfile.ZIP_DEFLATED) as changed:
            for name, member in members.items():
                changed.writestr(name, content if name == sheet else member)
        with pytest.raises(DataError) as caught:
            list(read(source))
        assert piece in str(caught.value)


def test_without_openpyxl_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _workbook(tmp_path / "a.xlsx", S=ROWS)
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(MissingRequirement, match="pip install openpyxl"):
        list(read(source))
