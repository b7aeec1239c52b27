"""A broken data file that must end in a clear diagnostic. Enters: a `Case`. Leaves: a failed test, if any."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from loopos.config.diagnostics import DataError
from loopos.data.formats import read_labeled
from loopos.data.label_space import LabelSpace, Task
from loopos.data.labels import infer_task
from loopos.data.rows import read


@dataclass(frozen=True)
class Case:
    """`content` in a file named `file` must give a first diagnostic at `line` about `about`, with `piece` in the message."""

    name: str
    file: str
    content: bytes | str
    line: int | None
    about: str
    piece: str
    column: int | None = None
    columns: dict[str, str] = field(default_factory=dict)
    task: Task | None = None
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    diagnostics: int = 1


def _label_space(path: Path, case: Case) -> LabelSpace:
    examples, _ = read_labeled(read(str(path)), case.columns)
    return infer_task(examples, case.task, case.num_classes, case.class_names)


def demand_diagnostic(case: Case, folder: Path) -> None:
    """Reads the file as fine-tuning does, rows to label space, and checks the resulting diagnostic."""
    path = folder / case.file
    path.write_bytes(case.content.encode() if isinstance(case.content, str) else case.content)
    with pytest.raises(DataError) as caught:
        _label_space(path, case)
    first = caught.value.diagnostics[0]
    assert first.source.startswith(str(path))
    assert (first.line, first.field) == (case.line, case.about), str(first)
    assert case.column is None or first.column == case.column, str(first)
    assert case.piece in str(caught.value)
    assert len(caught.value.diagnostics) == case.diagnostics, str(caught.value)
    assert "Traceback" not in str(caught.value)
