"""Which column a name may have meant, and what a check of the first rows finds without reading the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loopos.config.diagnostics import DataError, Diagnostic, Remedy, Wording
from loopos.config.fine_tuning import FineTuningConfig
from loopos.data import row_check
from loopos.data.columns import LABEL_TIERS, TEXT_TIERS, closest, likely
from loopos.data.row_check import check_columns, check_labeled

TICKETS = ["Ticket", "Issue description (free text)", "Cat. lvl-1"]


@pytest.mark.parametrize(
    ("name", "columns", "meant"),
    [
        ("Issue", TICKETS, "Issue description (free text)"),
        ("issue text", TICKETS, "Issue description (free text)"),
        ("cat", TICKETS, "Cat. lvl-1"),
        ("TICKET", TICKETS, "Ticket"),
        ("lable", ["text", "label"], "label"),
        ("Text-Body", ["text_body", "label"], "text_body"),
        # Two columns hold the word: neither is guessed, and no spelling is near.
        ("name", ["first name here", "last name there"], None),
        ("weather", TICKETS, None),
        ("", TICKETS, None),
    ],
)
def test_the_column_that_a_name_may_mean(name: str, columns: list[str], meant: str | None) -> None:
    assert closest(name, columns) == meant


def test_the_column_that_a_role_may_be() -> None:
    assert likely(TICKETS, TEXT_TIERS) == "Issue description (free text)"
    assert likely(TICKETS, LABEL_TIERS) is None
    assert likely(["short text", "long text"], TEXT_TIERS) is None
    assert likely(["text,label"], TEXT_TIERS) is None


def test_a_remedy_in_a_config() -> None:
    columns = Remedy("name them", (("data.columns.chosen", "a"), ("data.columns.rejected", "b")))
    assert Wording().remedy(columns) == 'name them: data.columns: {"chosen": "a", "rejected": "b"}'
    assert Wording().remedy(Remedy("set", (("data.on_bad_row", "skip"),))) == 'set: data.on_bad_row: "skip"'


def test_hint_and_remedy_follow_each_other() -> None:
    diagnostic = Diagnostic(
        "a.csv", None, None, "data.columns.text", "no column 'x'", "", "did you mean y?", Remedy("set", ())
    )
    assert str(diagnostic).splitlines()[0] == "a.csv: data.columns.text: no column 'x'"
    assert "did you mean y?" in str(diagnostic)


def config_of(folder: Path, **data: object) -> FineTuningConfig:
    sections: dict[str, Any] = {
        "computation": {"mode": "posttraining", "method": "fine_tuning"},
        "training": {"learning_rate": 1e-5},
        "data": {"pretrained_weights": "smollm2-135m", "output_dir": str(folder / "out"), **data},
    }
    return FineTuningConfig.model_validate(sections)


def test_the_diagnostics_of_both_sources_come_at_once(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("body of it,kind\na,b\n", encoding="utf-8")
    (tmp_path / "valid.csv").write_text("text,kind\na,b\n", encoding="utf-8")
    config = config_of(tmp_path, training_data=str(tmp_path / "train.csv"), validation_data=str(tmp_path / "valid.csv"))
    with pytest.raises(DataError) as caught:
        check_columns(config)
    assert [(Path(diagnostic.source).name, diagnostic.field) for diagnostic in caught.value.diagnostics] == [
        ("train.csv", "data.columns.text"), ("train.csv", "data.columns.label"), ("valid.csv", "data.columns.label"),
    ]  # fmt: skip


def test_only_the_first_rows_of_a_table_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row behind the sample that cannot be read does not matter to the header."""
    monkeypatch.setattr(row_check, "_SAMPLE", 3)
    lines = ["text,label", *(f"t{number},a" for number in range(3))]
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\nbroken\n", encoding="utf-8")
    check_labeled(str(tmp_path / "rows.csv"), {}, require_label=True)
    with pytest.raises(DataError, match="no column 'x'"):
        check_labeled(str(tmp_path / "rows.csv"), {"text": "x"}, require_label=True)


def test_a_column_that_comes_late_in_json_lines_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_check, "_SAMPLE", 2)
    rows: list[dict[str, str]] = [{"text": "a"}, {"text": "b"}, {"text": "c", "label": "x"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    check_labeled(str(tmp_path / "rows.jsonl"), {}, require_label=True)


def test_a_folder_of_tables_is_looked_at_whole(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\na\n", encoding="utf-8")
    (tmp_path / "b.csv").write_text("text,label\nb,x\n", encoding="utf-8")
    check_labeled(str(tmp_path), {}, require_label=True)
    with pytest.raises(DataError, match="no label column found"):
        check_labeled(str(tmp_path / "a.csv"), {}, require_label=True)
