"""`loopos data check`: what a data file contains, read as training reads it, and what is wrong with it. Apart
from `data`, whose help needs no pydantic.

Reports the kind of data and the methods that train on it; columns, labels, lengths, turns; rows that repeat, nearly
repeat or contradict each other; and all problems up to a limit. The exit code is 2 if there is any problem. Repeated
rows are reported, but are no problem: training accepts them. Token lengths need a model: see `loopos data preview`.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any

from loopos.cli.answers import say, say_json, shown, table
from loopos.cli.options import parse_columns, text_rules
from loopos.cli.outcome import COLUMNS, ENCODING, OptionWording
from loopos.config.diagnostics import DataError, Diagnostic
from loopos.data.annotation_exports import flat_rows
from loopos.data.conversations import ASSISTANT, Conversation
from loopos.data.decoding import TextRules, read_lines
from loopos.data.demonstrations import Demonstration
from loopos.data.formats import Labeled
from loopos.data.kinds import Kind, kind_of, read_kind
from loopos.data.label_space import key_of, members_of
from loopos.data.labels import LabelSpace, infer_task
from loopos.data.near_duplicates import near_duplicates
from loopos.data.preferences import Comparison
from loopos.data.prompts import Prompt, PromptContent, prompt_text
from loopos.data.record import MAXIMUM_DIAGNOSTICS
from loopos.data.repeats import AnyExample, key_of_prompt, key_of_row
from loopos.data.rows import Row, RowReader, is_plain_text, read
from loopos.data.stepwise import Stepwise
from loopos.data.supervised_rows import Completion, PlainText
from loopos.data.thumbs import Thumbs

Range = dict[str, float]


def spread(numbers: Iterable[float]) -> Range:
    """Least, median, mean and greatest."""
    ordered = sorted(numbers)
    return {
        "least": ordered[0],
        "median": statistics.median(ordered),
        "mean": round(statistics.fmean(ordered), 1),
        "most": ordered[-1],
    }


def text_of(example: AnyExample) -> str:
    """The text of an example that is compared and shown: its text or texts, or its prompt."""
    match example:
        case Labeled(text=text, text_pair=pair):
            return text if pair is None else f"{text}\n{pair}"
        case Demonstration(problem=problem):
            return problem
        case Conversation(messages=messages):
            return "\n".join(message.content for message in messages)
        case Completion(prompt=prompt, completion=completion):
            return f"{prompt}\n{completion}"
        case PlainText(text=text):
            return text
        case str():
            return example
        case _:
            return prompt_text(example.prompt)


def ranges(examples: Sequence[Any]) -> dict[str, Range]:
    """Ranges of lengths and counts over examples of one kind, by name."""
    found: dict[str, list[float]] = defaultdict(list)
    for example in examples:
        found["characters"].append(len(text_of(example)))
        match example:
            case Demonstration(steps=steps, answer=answer):
                found["steps"].append(len(steps))
                found["answer characters"].append(len(answer))
            case Conversation(messages=messages):
                found["turns"].append(sum(message.role == ASSISTANT for message in messages))
                found["messages"].append(len(messages))
            case Completion(completion=completion):
                found["completion characters"].append(len(completion))
            case Comparison(responses=responses):
                found["responses"].append(len(responses))
                found["response characters"] += [_size(response) for response in responses]
            case Thumbs(comparison=comparison):
                found["response characters"] += [_size(response) for response in comparison.responses]
            case Stepwise(steps=steps):
                found["steps"].append(len(steps))
            case Prompt(prompt=prompt) if not isinstance(prompt, str):
                found["messages"].append(len(prompt))
            case _:
                pass
    return {name: spread(numbers) for name, numbers in found.items()}


def counts(examples: Sequence[Any]) -> dict[str, float]:
    """Counts over examples of one kind, by name."""
    first = examples[0]
    prompts: dict[str, float] = {"different prompts": len({key_of_prompt(each) for each in examples})}
    if isinstance(first, Comparison):
        pairs = [(each, pair) for each in examples for pair in each.pairs]
        decided = [(each, pair) for each, pair in pairs if pair.probability != 0.5]
        longer = sum(_size(each.responses[pair.better]) > _size(each.responses[pair.worse]) for each, pair in decided)
        fractions = {"the longer response is preferred": round(longer / len(decided), 3)} if decided else {}
        return {**prompts, "pairs": len(pairs), "ties": len(pairs) - len(decided), **fractions}
    if isinstance(first, Thumbs):
        up = [desirable for each in examples for desirable in each.desirable]
        return {**prompts, "up": sum(up), "down": len(up) - sum(up)}
    if any(isinstance(each, Conversation) for each in examples):
        chats = [each for each in examples if isinstance(each, Conversation)]
        with_system = sum(each.messages[0].role in ("system", "developer") for each in chats)
        return {**prompts, "with a system message": with_system}
    if isinstance(first, Stepwise):
        labels = [label for each in examples for label in each.labels]
        judged = [label for label in labels if label is not None]
        right = round(statistics.fmean(label > 0.5 for label in judged), 3)
        return {**prompts, "steps": len(labels), "labeled steps": len(judged), "right steps": right}
    if isinstance(first, Demonstration):
        return {**prompts, "without steps": sum(not each.steps for each in examples)}
    return {} if isinstance(first, Labeled | str) else prompts


def repeated(examples: Sequence[Any], what: str) -> dict[str, int]:
    """The number of texts (or prompts) that occur more than once, of their rows, and of exact repetitions."""
    groups = [group for group in grouped(examples) if len(group) > 1]
    found = {f"{what}s": len(groups), "rows": sum(len(group) for group in groups)}
    if what == "prompt" and not isinstance(examples[0], Prompt):
        found["rows that say the same"] = len(examples) - len({key_of_row(each) for each in examples})
    return found


def grouped(examples: Sequence[Any]) -> list[list[Any]]:
    """Examples grouped by their prompt, in the order of the first of each group."""
    groups: dict[Hashable, list[Any]] = {}
    for example in examples:
        groups.setdefault(key_of_prompt(example), []).append(example)
    return list(groups.values())


def conflicts(examples: Sequence[Any]) -> list[dict[str, Any]]:
    """Rows that contradict each other: one text with several labels, one problem with several answers, one pair of
    responses preferred both ways, or one answer with both thumbs.
    """
    found = []
    for group in grouped(examples):
        values: dict[str, Any] = {}
        for example in group:
            if isinstance(example, Labeled) and example.label is not None:
                values[repr(example.label)] = example.label
            elif isinstance(example, Demonstration):
                values[example.answer] = example.answer
        name = "labels" if isinstance(group[0], Labeled) else "answers"
        if isinstance(group[0], Comparison):
            name, values = "preferences", _turned(group)
        if isinstance(group[0], Thumbs):
            name, values = "thumbs", _both_ways(group)
        if len(values) > (0 if name == "thumbs" else 1):
            lines = [line_of(example) for example in group]
            found.append({"text": text_of(group[0]), name: list(values.values()), "lines": lines})
    return found


def near(examples: Sequence[Any]) -> dict[str, Any]:
    """Rows whose text nearly equals that of an earlier row without being equal; the lines of the first pairs."""
    firsts = [group[0] for group in grouped(examples)]
    found = near_duplicates([text_of(each) for each in firsts])
    pairs = [[line_of(firsts[other]), line_of(firsts[index])] for index, other in found.pairs]
    return {"rows": len(pairs), "compared": found.compared, "lines": pairs[:5]}


def line_of(example: Any) -> int | None:
    """The line of an example, or its row number if its file has no lines."""
    if isinstance(example, str):
        return None
    row: Row = example.row
    return row.line if row.line is not None else row.index


def _turned(group: Sequence[Comparison]) -> dict[str, str]:
    """The responses that are better in one row and worse in another row with the same pair."""
    ranked = {
        (_plain(each.responses[pair.better]), _plain(each.responses[pair.worse]))
        for each in group
        for pair in each.pairs
        if pair.probability != 0.5
    }
    both = sorted({better for better, worse in ranked if (worse, better) in ranked})
    return {each: each for each in both}


def _both_ways(group: Sequence[Thumbs]) -> dict[str, str]:
    """The answers that are up in one row and down in another with the same prompt."""
    rated = {
        (_plain(response), desirable)
        for each in group
        for response, desirable in zip(each.comparison.responses, each.desirable, strict=True)
    }
    return {answer: answer for answer, up in sorted(rated) if up and (answer, False) in rated}


def _plain(content: PromptContent) -> str:
    return prompt_text(content).strip()


def _size(content: PromptContent) -> int:
    return len(content) if isinstance(content, str) else sum(len(message.content) for message in content)


_MOST_LISTED = 12
_FAULTY = 2
_WORDING = OptionWording([COLUMNS, ENCODING])
_SERVES = {
    "labeled": "trains fine_tuning",
    "texts": "no label column: loopos predict reads the texts; fine_tuning needs a label; sft and pretraining "
    "learn whole texts from a column text",
    "language": "trains sft and chain_of_thought; its prompts work in loopos generate --input and loopos winrate",
    "comparisons": "trains reward_model, dpo and its relatives, kto and rlhf; its prompts work for ppo",
    "thumbs": "trains kto; its prompts work for ppo",
    "steps": "trains reward_model as a process reward model, and rlhf; its prompts work for ppo",
    "prompts": "only prompts: for ppo, loopos generate --input and loopos winrate",
    "lines": "one text per line: prompts for ppo, loopos generate --input and loopos winrate, texts for loopos "
    "predict, or running text for pretraining",
}


@dataclass
class CheckReport:
    """Result of the check. `kind`: kind of the rows; `labels`: rows per class, or for regression the smallest, mean
    and largest value; `ranges`: smallest, median, mean and largest by name; `near`: near-duplicate rows.
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
    summary: list[str] = field(default_factory=list)
    diagnostics: list[Diagnostic] = field(default_factory=list)
    num_diagnostics: int = 0

    def add_diagnostics(self, diagnostics: Sequence[Diagnostic], total: int) -> None:
        """Adds diagnostics, of which there are `total`."""
        self.diagnostics.extend(diagnostics)
        self.num_diagnostics += total


def run(source: str, columns: Sequence[str], *, encoding: str | None, as_json: bool) -> int:
    """Checks and prints. Raises `UserError` for a source that cannot be opened."""
    found = check(source, parse_columns(columns), text_rules(encoding))
    if as_json:
        shown_diagnostics = found.diagnostics[:MAXIMUM_DIAGNOSTICS]
        diagnostics = [
            {"place": diagnostic.location, **asdict(diagnostic), "message": diagnostic.text(_WORDING)}
            for diagnostic in shown_diagnostics
        ]
        result = asdict(found)
        del result["diagnostics"]
        # The names that scripts read.
        result |= {"said": result.pop("summary"), "num_faults": result.pop("num_diagnostics"), "faults": diagnostics}
        say_json(result)
    else:
        say(described(found))
    return _FAULTY if found.num_diagnostics else 0


def check(source: str, columns: Mapping[str, str], rules: TextRules) -> CheckReport:
    """Reads all rows. Raises `DataError` if nothing can be read."""
    if not columns and is_plain_text(source, rules):
        return _check_lines(source, rules)
    reader = read(source, on_bad_row="skip", rules=rules)
    found = CheckReport(source, sorted({kind for _, kind in reader.location.files}) or [reader.location.kind])
    kind = _kind(reader, columns, found)
    if kind is None:
        return found
    found.kind, found.roles, found.serves = kind.name, dict(kind.roles), _SERVES[kind.family]
    try:
        examples, report = read_kind(reader, kind, columns)
    except DataError as error:
        found.used = 0
        found.add_diagnostics(
            reader.report.diagnostics or error.diagnostics, reader.report.num_diagnostics or len(error.diagnostics)
        )
        return found
    found.rows, found.used, found.summary = report.read, report.used, list(report.notes)
    found.summary.append(report.summary())
    found.add_diagnostics(reader.report.diagnostics, reader.report.num_diagnostics)
    _measure(found, examples, "text" if isinstance(examples[0], Labeled) else "prompt")
    if kind.family == "labeled":
        _judge_labels(found, examples, kind.roles["label"])
    return found


def _check_lines(source: str, rules: TextRules) -> CheckReport:
    """A text file that is no table: its lines."""
    found = CheckReport(source, ["txt"], kind="lines", serves=_SERVES["lines"])
    with closing(read_lines(source, rules)) as numbered:
        lines = [(number, line.rstrip("\r")) for number, line in numbered]
    filled = [line for _, line in lines if line.strip()]
    found.rows = found.used = len(filled)
    if len(filled) < len(lines):
        found.summary.append(f"{len(lines) - len(filled):,} blank lines")
    if filled:
        _measure(found, filled, "text")
    return found


def _kind(reader: RowReader, columns: Mapping[str, str], found: CheckReport) -> Kind | None:
    """The kind of the rows; None, with a diagnostic added, if unknown. A first pass, because columns may differ by
    row.
    """
    rows = flat_rows(list(reader.rows()))
    found.columns, found.rows = (
        list(dict.fromkeys(name for row in rows for name in row.values)),
        reader.report.rows_read,
    )
    if not found.columns:
        found.add_diagnostics(reader.report.diagnostics, reader.report.num_diagnostics)
        return None
    try:
        return kind_of(rows, columns, found.source)
    except DataError as error:
        found.add_diagnostics(
            [*error.diagnostics, *reader.report.diagnostics], len(error.diagnostics) + reader.report.num_diagnostics
        )
        return None


def _measure(found: CheckReport, examples: Sequence[Any], what: str) -> None:
    """Lengths and counts; rows that repeat, nearly repeat or contradict each other."""
    found.ranges = ranges(examples)
    found.characters = found.ranges.pop("characters")
    found.counts = counts(examples)
    found.repeated = repeated(examples, what)
    found.near = near(examples)
    found.conflicts = conflicts(examples)


def _judge_labels(found: CheckReport, examples: Sequence[Labeled], column: str) -> None:
    try:
        space = infer_task(examples, column=column)
    except DataError as error:
        found.add_diagnostics(error.diagnostics, getattr(error, "total", len(error.diagnostics)))
        return
    found.task = space.task
    found.summary.append(space.summary)
    found.labels = _label_counts(space, examples)


def _label_counts(space: LabelSpace, examples: Sequence[Labeled]) -> dict[str, float]:
    if space.task == "regression":
        values = [float(str(example.label)) for example in examples]
        return {"least": min(values), "mean": statistics.fmean(values), "greatest": max(values)}
    counts: Counter[str] = Counter()
    for example in examples:
        members = (members_of(example.label) or []) if space.task == "multi_label" else [example.label]
        counts.update(key for member in members if (key := key_of(member, space.label_kind)) is not None)
    return {name: counts[key] for key, name in zip(space.keys, space.class_names, strict=True)}


def described(found: CheckReport) -> str:
    """The report as lines of text."""
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
    lines += [f"note      {sentence}" for sentence in found.summary]
    lines.append(f"problems  {found.num_diagnostics:,}" if found.num_diagnostics else "problems  none")
    lines += [diagnostic.text(_WORDING) for diagnostic in found.diagnostics[:MAXIMUM_DIAGNOSTICS]]
    if found.num_diagnostics > len(found.diagnostics[:MAXIMUM_DIAGNOSTICS]):
        lines.append(f"... and {found.num_diagnostics - len(found.diagnostics[:MAXIMUM_DIAGNOSTICS])} more problems")
    return "\n".join(lines)


def _label_lines(found: CheckReport) -> list[str]:
    if found.task is None:
        return []
    listed = list(found.labels.items())
    fraction = [] if found.task == "regression" else [f"{count / found.used:.1%}" for _, count in listed]
    rows = [(name, count, *fraction[index : index + 1]) for index, (name, count) in enumerate(listed[:_MOST_LISTED])]
    more = [f"{'':10}and {len(listed) - _MOST_LISTED} more classes"] if len(listed) > _MOST_LISTED else []
    return [f"task      {found.task}", table(rows, indent=" " * 10), *more]


def _repeat_lines(found: CheckReport) -> list[str]:
    """Lines about rows that repeat, nearly repeat or contradict each other."""
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
        lines.append(f"{'':10}near duplicates were searched among the first {found.near['compared']:,} distinct rows")
    return lines


def _numbers(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in values.items())


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:6])) + (", ..." if len(numbers) > 6 else "")


def _cut(text: str, limit: int = 50) -> str:
    return text if len(text) <= limit else text[:limit] + "..."
