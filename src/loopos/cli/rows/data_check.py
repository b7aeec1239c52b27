"""`loopos data check`: what is in a data file, read as training reads it, and what is wrong with it.

Enters: a source of rows. Leaves: format, columns, labels, lengths, duplicates, and every fault up to a limit; exit code
2 if there is any fault. Repeated texts are told, not counted as faults: training takes them. Left out: tokens (`loopos
data preview`), for they need a model.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from loopos.cli.answers import say, say_json, table
from loopos.cli.columns import parse_columns
from loopos.cli.quiet import hush_libraries
from loopos.config.faults import DataError, Fault
from loopos.data.formats import Labelled, LabelledFormat, detect, read_labelled
from loopos.data.label_space import key_of, members_of
from loopos.data.labels import LabelSpace, infer_task
from loopos.data.reading import left_out
from loopos.data.record import MAXIMUM_FAULTS
from loopos.data.rows import RowReader, read

_MOST_LISTED = 12
_FAULTY = 2


@dataclass
class Findings:
    """All that the check found. `labels`: rows by class, or for regression the least, mean and greatest value."""

    source: str
    formats: list[str]
    rows: int = 0
    used: int = 0
    columns: list[str] = field(default_factory=list)
    roles: dict[str, str] = field(default_factory=dict)
    task: str | None = None
    labels: dict[str, float] = field(default_factory=dict)
    characters: dict[str, float] = field(default_factory=dict)
    repeated: dict[str, int] = field(default_factory=dict)
    conflicts: list[dict[str, Any]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    num_faults: int = 0


def run(source: str, columns: Sequence[str], *, as_json: bool) -> int:
    """Checks and prints. Raises `UserError` for a source that cannot be opened at all."""
    hush_libraries(verbose=False)
    found = check(source, parse_columns(columns))
    if as_json:
        shown = asdict(found)
        shown["faults"] = [
            {"place": fault.place, **asdict(fault), "message": str(fault)} for fault in found.faults[:MAXIMUM_FAULTS]
        ]
        say_json(shown)
    else:
        say(described(found))
    return _FAULTY if found.num_faults else 0


def check(source: str, columns: Mapping[str, str]) -> Findings:
    """Reads all rows. Raises `DataError` where nothing can be read."""
    reader = read(source, on_bad_row="skip")
    found = Findings(source, sorted({kind for _, kind in reader.location.files}) or [reader.location.kind])
    form = _format(reader, columns, found)
    if form is None:
        return found
    examples, report = read_labelled(reader, columns, require_label=form.label is not None)
    found.rows, found.used, found.said = report.read, report.used, list(report.said)
    found.said += left_out(report)
    _add_faults(found, report.faults, reader.report.num_faults)
    _measure(found, examples)
    if form.label is not None:
        _judge_labels(found, examples, form.label)
    else:
        found.said.append("no label column: the rows can be predicted, not trained on")
    return found


def _format(reader: RowReader, columns: Mapping[str, str], found: Findings) -> LabelledFormat | None:
    """The column of each role, or None with the fault noted. A first pass, for columns may differ by row."""
    names: dict[str, None] = {}
    for row in reader.rows():
        names.update(dict.fromkeys(row.values))
    found.columns, found.rows = list(names), reader.report.rows_read
    if not names:
        _add_faults(found, reader.report.faults, reader.report.num_faults)
        return None
    try:
        form = detect(found.columns, columns, require_label=False, source=found.source)
    except DataError as error:
        _add_faults(found, [*error.faults, *reader.report.faults], len(error.faults) + reader.report.num_faults)
        return None
    chosen = {"text": form.text, "text_pair": form.text_pair, "label": form.label}
    found.roles = {role: name for role, name in chosen.items() if name is not None}
    return form


def _add_faults(found: Findings, faults: Sequence[Fault], total: int) -> None:
    found.faults.extend(faults)
    found.num_faults += total


def _measure(found: Findings, examples: Sequence[Labelled]) -> None:
    """Lengths in characters, and texts that occur more than once, with the same label or with others."""
    lengths = sorted(len(example.text) + len(example.text_pair or "") for example in examples)
    found.characters = {
        "least": lengths[0],
        "median": statistics.median(lengths),
        "mean": round(statistics.fmean(lengths), 1),
        "most": lengths[-1],
    }
    same: dict[tuple[str, str | None], list[Labelled]] = defaultdict(list)
    for example in examples:
        same[example.text, example.text_pair].append(example)
    groups = [group for group in same.values() if len(group) > 1]
    found.repeated = {"texts": len(groups), "rows": sum(len(group) for group in groups)}
    for group in groups:
        labels = {repr(example.label): example.label for example in group}
        if len(labels) > 1:
            places = [example.row.line if example.row.line is not None else example.row.index for example in group]
            found.conflicts.append({"text": group[0].text, "labels": list(labels.values()), "lines": places})


def _judge_labels(found: Findings, examples: Sequence[Labelled], column: str) -> None:
    try:
        space = infer_task(examples, column=column)
    except DataError as error:
        _add_faults(found, error.faults, getattr(error, "total", len(error.faults)))
        return
    found.task = space.task
    found.said.append(space.said)
    found.labels = _label_counts(space, examples)


def _label_counts(space: LabelSpace, examples: Sequence[Labelled]) -> dict[str, float]:
    if space.task == "regression":
        values = [float(str(example.label)) for example in examples]
        return {"least": min(values), "mean": statistics.fmean(values), "greatest": max(values)}
    counts: Counter[str] = Counter()
    for example in examples:
        members = (members_of(example.label) or []) if space.task == "multi_label" else [example.label]
        counts.update(key for member in members if (key := key_of(member, space.label_kind)) is not None)
    return {name: counts[key] for key, name in zip(space.keys, space.class_names, strict=True)}


def described(found: Findings) -> str:
    """The findings in lines."""
    roles = ", ".join(f'{role} <- "{name}"' for role, name in found.roles.items()) or "none found"
    lines = [
        f"{found.source}: {', '.join(found.formats)}, {found.rows:,} rows, {found.used:,} good",
        f"columns   {', '.join(found.columns) or 'none'}",
        f"roles     {roles}",
    ]
    if found.characters:
        numbers = ", ".join(f"{name} {value:g}" for name, value in found.characters.items())
        lines.append(f"length    {numbers} (characters)")
    if found.task is not None:
        lines.append(f"task      {found.task}")
        listed = list(found.labels.items())
        share = [] if found.task == "regression" else [f"{count / found.used:.1%}" for _, count in listed]
        rows = [(name, count, *share[place : place + 1]) for place, (name, count) in enumerate(listed[:_MOST_LISTED])]
        lines.append(table(rows, indent=" " * 10))
        lines += [f"{'':10}and {len(listed) - _MOST_LISTED} more classes"] if len(listed) > _MOST_LISTED else []
    if found.repeated:
        lines.append(
            f"repeated  {found.repeated['texts']:,} texts, in {found.repeated['rows']:,} rows; "
            f"{len(found.conflicts):,} of them with different labels"
        )
        lines += [f"{'':10}lines {_listed(each['lines'])}: {_cut(each['text'])!r}" for each in found.conflicts[:5]]
    lines += [f"note      {sentence}" for sentence in found.said]
    lines.append(f"faults    {found.num_faults:,}" if found.num_faults else "faults    none")
    lines += [str(fault) for fault in found.faults[:MAXIMUM_FAULTS]]
    if found.num_faults > len(found.faults[:MAXIMUM_FAULTS]):
        lines.append(f"... and {found.num_faults - len(found.faults[:MAXIMUM_FAULTS])} more faults")
    return "\n".join(lines)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:6])) + (", ..." if len(numbers) > 6 else "")


def _cut(text: str, limit: int = 50) -> str:
    return text if len(text) <= limit else text[:limit] + "..."
