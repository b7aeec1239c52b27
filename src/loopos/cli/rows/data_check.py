"""`loopos data check`: what is in a data file, read as training reads it, and what is wrong with it.

Enters: a source of rows, or a text file with a prompt or text a line. Leaves: what kind of data it is and what trains
on it; columns, labels, lengths, turns; rows that repeat, nearly repeat or contradict each other; every fault up to a
limit; exit code 2 if there is any fault. Repeated rows are told, not counted as faults: training takes them. Left out:
tokens (`loopos data preview`), for they need a model; what is measured (`measures`).
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any

from loopos.cli.answers import say, say_json, shown, table
from loopos.cli.columns import parse_columns, text_rules
from loopos.cli.quiet import hush_libraries
from loopos.cli.rows import measures
from loopos.cli.wording import COLUMNS, ENCODING, OptionWording
from loopos.config.faults import DataError, Fault
from loopos.data.decoding import TextRules, read_lines
from loopos.data.formats import Labelled
from loopos.data.kinds import Kind, kind_of, read_kind
from loopos.data.label_space import key_of, members_of
from loopos.data.labels import LabelSpace, infer_task
from loopos.data.plain_text import is_plain_text
from loopos.data.reading import left_out
from loopos.data.record import MAXIMUM_FAULTS
from loopos.data.rows import RowReader, read

_MOST_LISTED = 12
_FAULTY = 2
_WORDING = OptionWording([COLUMNS, ENCODING])
_SERVES = {
    "labelled": "trains fine_tuning",
    "texts": "no label column: loopos predict reads the texts; fine_tuning needs a label, chain_of_thought and "
    "pretraining learn a column text whole",
    "language": "trains chain_of_thought; asks in loopos generate --input and loopos winrate",
    "comparisons": "trains reward_model, and rlhf; its prompts serve ppo",
    "prompts": "prompts alone: they serve ppo, loopos generate --input and loopos winrate",
    "lines": "one text a line: prompts for ppo, loopos generate --input and loopos winrate, texts for loopos predict, "
    "or running text for pretraining",
}


@dataclass
class Findings:
    """All that the check found. `kind`: what the rows are; `labels`: rows by class, or for regression the least, mean
    and greatest value; `ranges`: least, median, mean and greatest by name; `near`: rows nearly the same as another.
    """

    source: str
    formats: list[str]
    kind: str | None = None
    serves: str = ""
    rows: int = 0
    used: int = 0
    columns: list[str] = field(default_factory=list)
    roles: dict[str, str] = field(default_factory=dict)
    task: str | None = None
    labels: dict[str, float] = field(default_factory=dict)
    characters: dict[str, float] = field(default_factory=dict)
    ranges: dict[str, dict[str, float]] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    repeated: dict[str, int] = field(default_factory=dict)
    near: dict[str, Any] = field(default_factory=dict)
    conflicts: list[dict[str, Any]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    num_faults: int = 0

    def add_faults(self, faults: Sequence[Fault], total: int) -> None:
        """Notes faults, `total` of them in all."""
        self.faults.extend(faults)
        self.num_faults += total


def run(source: str, columns: Sequence[str], *, encoding: str | None, as_json: bool) -> int:
    """Checks and prints. Raises `UserError` for a source that cannot be opened at all."""
    hush_libraries(verbose=False)
    found = check(source, parse_columns(columns), text_rules(encoding))
    if as_json:
        shown_faults = found.faults[:MAXIMUM_FAULTS]
        faults = [{"place": fault.place, **asdict(fault), "message": fault.text(_WORDING)} for fault in shown_faults]
        say_json({**asdict(found), "faults": faults})
    else:
        say(described(found))
    return _FAULTY if found.num_faults else 0


def check(source: str, columns: Mapping[str, str], rules: TextRules) -> Findings:
    """Reads all rows. Raises `DataError` where nothing can be read."""
    if not columns and is_plain_text(source, rules):
        return _check_lines(source, rules)
    reader = read(source, on_bad_row="skip", rules=rules)
    found = Findings(source, sorted({kind for _, kind in reader.location.files}) or [reader.location.kind])
    kind = _kind(reader, columns, found)
    if kind is None:
        return found
    found.kind, found.roles, found.serves = kind.name, dict(kind.roles), _SERVES[kind.family]
    try:
        examples, report = read_kind(reader, kind, columns)
    except DataError as error:
        found.used = 0
        found.add_faults(reader.report.faults or error.faults, reader.report.num_faults or len(error.faults))
        return found
    found.rows, found.used, found.said = report.read, report.used, list(report.said)
    found.said += [f"{count:,} dropped: {why}" for why, count in report.dropped.items()]
    found.said += left_out(report)
    found.add_faults(reader.report.faults, reader.report.num_faults)
    _measure(found, examples, "text" if isinstance(examples[0], Labelled) else "prompt")
    if kind.family == "labelled":
        _judge_labels(found, examples, kind.roles["label"])
    return found


def _check_lines(source: str, rules: TextRules) -> Findings:
    """A text file that is no table: its lines."""
    found = Findings(source, ["txt"], kind="lines", serves=_SERVES["lines"])
    with closing(read_lines(source, rules)) as numbered:
        lines = [(number, line.rstrip("\r")) for number, line in numbered]
    filled = [line for _, line in lines if line.strip()]
    found.rows = found.used = len(filled)
    if len(filled) < len(lines):
        found.said.append(f"{len(lines) - len(filled):,} blank lines")
    if filled:
        _measure(found, filled, "text")
    return found


def _kind(reader: RowReader, columns: Mapping[str, str], found: Findings) -> Kind | None:
    """What the rows are, or None with the fault noted. A first pass, for columns may differ by row."""
    names: dict[str, None] = {}
    for row in reader.rows():
        names.update(dict.fromkeys(row.values))
    found.columns, found.rows = list(names), reader.report.rows_read
    if not names:
        found.add_faults(reader.report.faults, reader.report.num_faults)
        return None
    try:
        return kind_of(found.columns, columns, found.source)
    except DataError as error:
        found.add_faults([*error.faults, *reader.report.faults], len(error.faults) + reader.report.num_faults)
        return None


def _measure(found: Findings, examples: Sequence[Any], what: str) -> None:
    """Lengths and counts, what repeats, nearly repeats or contradicts."""
    found.ranges = measures.ranges(examples)
    found.characters = found.ranges.pop("characters")
    found.counts = measures.counts(examples)
    found.repeated = measures.repeated(examples, what)
    found.near = measures.near(examples)
    found.conflicts = measures.conflicts(examples)


def _judge_labels(found: Findings, examples: Sequence[Labelled], column: str) -> None:
    try:
        space = infer_task(examples, column=column)
    except DataError as error:
        found.add_faults(error.faults, getattr(error, "total", len(error.faults)))
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
    lines = [f"{found.source}: {', '.join(found.formats)}, {found.rows:,} rows, {found.used:,} good"]
    if found.kind is not None:
        lines.append(f"kind      {found.kind}: {found.serves}")
    if found.columns:
        roles = ", ".join(f'{role} <- "{name}"' for role, name in found.roles.items()) or "none found"
        more = f", ... ({len(found.columns):,} in all)" if len(found.columns) > 2 * _MOST_LISTED else ""
        lines.append(f"columns   {', '.join(found.columns[: 2 * _MOST_LISTED])}{more}")
        lines.append(f"roles     {roles}")
    if found.characters:
        lines.append(f"length    {_numbers(found.characters)} (characters)")
    lines += [f"{'':10}{_numbers(each)} ({name})" for name, each in found.ranges.items()]
    if found.counts:
        lines.append(f"counts    {', '.join(f'{name} {shown(count)}' for name, count in found.counts.items())}")
    lines += _label_lines(found)
    lines += _repeat_lines(found)
    lines += [f"note      {sentence}" for sentence in found.said]
    lines.append(f"faults    {found.num_faults:,}" if found.num_faults else "faults    none")
    lines += [fault.text(_WORDING) for fault in found.faults[:MAXIMUM_FAULTS]]
    if found.num_faults > len(found.faults[:MAXIMUM_FAULTS]):
        lines.append(f"... and {found.num_faults - len(found.faults[:MAXIMUM_FAULTS])} more faults")
    return "\n".join(lines)


def _label_lines(found: Findings) -> list[str]:
    if found.task is None:
        return []
    listed = list(found.labels.items())
    share = [] if found.task == "regression" else [f"{count / found.used:.1%}" for _, count in listed]
    rows = [(name, count, *share[place : place + 1]) for place, (name, count) in enumerate(listed[:_MOST_LISTED])]
    more = [f"{'':10}and {len(listed) - _MOST_LISTED} more classes"] if len(listed) > _MOST_LISTED else []
    return [f"task      {found.task}", table(rows, indent=" " * 10), *more]


def _repeat_lines(found: Findings) -> list[str]:
    """What repeats, nearly repeats and contradicts."""
    if not found.repeated:
        return []
    (what, groups), (_, rows), *same = found.repeated.items()
    contradiction = "different labels" if what == "texts" else "answers or preferences that contradict each other"
    line = f"repeated  {groups:,} {what}, in {rows:,} rows; {len(found.conflicts):,} of them with {contradiction}"
    lines = [line + "".join(f"; {name}: {count:,}" for name, count in same)]
    lines += [f"{'':10}lines {_listed(each['lines'])}: {_cut(each['text'])!r}" for each in found.conflicts[:5]]
    if found.near["rows"]:
        pairs = "; ".join(f"{one} and {other}" for one, other in found.near["lines"] if one is not None)
        lines.append(
            f"near      {found.near['rows']:,} more rows are nearly the same as an earlier one"
            + (f" (lines {pairs}{', ...' if found.near['rows'] > len(found.near['lines']) else ''})" if pairs else "")
        )
    if found.near["compared"] < found.used - rows + groups:
        lines.append(f"{'':10}near rows were looked for among the first {found.near['compared']:,} different ones")
    return lines


def _numbers(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in values.items())


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:6])) + (", ..." if len(numbers) > 6 else "")


def _cut(text: str, limit: int = 50) -> str:
    return text if len(text) <= limit else text[:limit] + "..."
