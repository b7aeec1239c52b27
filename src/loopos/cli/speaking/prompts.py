"""What a language model is asked: the words of the command line, lines of text, rows of a data file.

Enters: texts, or the name of a file. Leaves: `Asked`s in order. A data file is read by the data loader; of each row the
part before the last answer counts, so that rows without an answer serve as well. Left out: templates and tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from loopos.cli.measuring.predict import read_texts
from loopos.cli.outcome import note
from loopos.config.faults import DataError, UserError
from loopos.data import rows
from loopos.data.columns import candidates
from loopos.data.context import CONTEXT_ROLES, with_context
from loopos.data.conversations import ASSISTANT, Conversation, Message, Question
from loopos.data.demonstrations import Demonstration
from loopos.data.reading import FormatReport, Unusable, left_out, read_examples
from loopos.data.row_fields import RowFields
from loopos.data.rows import Row
from loopos.data.step_format import NAMED_FORMATS
from loopos.data.supervised_formats import NAMES, SupervisedFormat, detect
from loopos.data.supervised_parts import before_answer
from loopos.data.supervised_rows import Completion, example_of

_SYSTEM = ("system", "developer")


@dataclass(frozen=True, slots=True)
class Asked:
    """`text`: for people. `problem`: the messages that the template renders, or a text that is continued as it is."""

    text: str
    problem: tuple[Message, ...] | Question | Completion

    def with_system(self, system: str | None) -> Asked:
        """The same after the system's words. Raises `UserError` where it has others, or no messages."""
        if system is None:
            return self
        messages = self.messages
        if messages is None or (messages and messages[0].role in _SYSTEM):
            why = "is no message" if messages is None else "has a system message of its own"
            raise UserError(f"--system: the prompt {self.text[:60]!r} {why}; leave out --system")
        messages = (Message("system", system), *messages)
        problem = replace(self.problem, messages=messages) if isinstance(self.problem, Question) else messages
        return replace(self, problem=problem)

    @property
    def messages(self) -> tuple[Message, ...] | None:
        """The messages that are asked; None for a text that is continued as it is."""
        if isinstance(self.problem, Completion):
            return None
        return self.problem.messages if isinstance(self.problem, Question) else self.problem


def of_text(text: str, place: int, *, raw: bool) -> Asked:
    """The prompt of a text: a user's message, or with `raw` the beginning of a text that goes on."""
    if raw:
        return Asked(text, Completion(text, "", Row({}, "prompt", None, place)))
    return Asked(text, (Message("user", text),))


def read_prompts(source: str, columns: Mapping[str, str], *, raw: bool) -> list[Asked]:
    """The prompts of standard input ("-") or a .txt file, one a line, or of the rows of a data file.

    Raises `DataError` for a blank line, a file of no known format, and rows that cannot be used.
    """
    texts = read_texts(source, columns)
    if texts is not None:
        return [of_text(text, place, raw=raw) for place, text in enumerate(texts)]

    def from_row(row: Row, form: SupervisedFormat) -> Asked | Unusable:
        fields = RowFields(row, form.columns)
        asked = _asked(fields, form, raw=raw)
        return asked if asked is not None else Unusable(fields.problems[0][0], [fault for _, fault in fields.problems])

    found: tuple[list[Asked], SupervisedFormat, FormatReport]
    found = read_examples(rows.read(source), lambda names, place: _detect(names, columns, place), from_row)
    for sentence in left_out(found[2]):
        note(f"{source}: {sentence}")
    return found[0]


def _detect(names: Sequence[str], columns: Mapping[str, str], source: str) -> SupervisedFormat:
    """The format of the rows; where there is none, a column of problems alone."""
    try:
        return detect(names, columns, source=source)
    except DataError:
        found = candidates(names, [*NAMES["problem"], *NAMES["instruction"]])
        chosen = columns.get("problem", found[0] if len(found) == 1 and not columns else None)
        if chosen is None or chosen not in names:
            raise
        roles = {"problem": chosen, **_beside(names, columns, chosen)}
        served = ", ".join(f'{role} <- "{column}"' for role, column in roles.items())
        return SupervisedFormat("demonstrations", roles, f"format: problems ({served})")


def _beside(names: Sequence[str], columns: Mapping[str, str], problem: str) -> dict[str, str]:
    """The columns that stand below a problem, as in training: those that were chosen, or one that fits."""
    found = {role: columns[role] for role in (*CONTEXT_ROLES, "system") if role in columns}
    free = [name for name in names if name != problem and name not in found.values()]
    for role in (*CONTEXT_ROLES, "system"):
        fitting = candidates(free, NAMES[role])
        if role not in found and len(fitting) == 1:
            found[role] = fitting[0]
    return found


def _asked(fields: RowFields, form: SupervisedFormat, *, raw: bool) -> Asked | None:
    """What a row asks; None, with `fields.problems` filled, where it asks nothing."""
    if form.kind in ("demonstrations", "text"):
        text = with_context(fields, "problem") if form.kind == "demonstrations" else fields.text("text")
        system = fields.optional_text("system")
        if fields.problems:
            return None
        asked = of_text(text.strip() if form.kind == "demonstrations" else text, fields.row.index, raw=raw)
        return asked if raw else asked.with_system(system)
    example = example_of(fields, form, NAMED_FORMATS["lines"])
    if example is None:
        return None
    match example:
        case Completion(prompt=text):
            return Asked(text, example)
        case Conversation(messages=messages, tools=tools):
            last = max(place for place, message in enumerate(messages) if message.role == ASSISTANT)
            asked_messages = messages[:last]
            if tools:
                return Asked(asked_messages[-1].content if asked_messages else "", Question(asked_messages, tools))
        case Demonstration():
            asked_messages = tuple(before_answer(example))
        case _:
            asked_messages = ()
    told = asked_messages[-1].content if asked_messages else ""
    return Asked(told, asked_messages)
