"""What a language model is asked: the words of the command line, lines of text, rows of a data file.

Enters: texts, or the name of a file. Leaves: `Asked`s in order. A data file is read by the data loader; of each row the
part before the last answer counts, so that rows without an answer serve as well. Left out: templates and tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from loopos.cli.outcome import note
from loopos.cli.predict import read_texts
from loopos.config.diagnostics import DataError, UserError
from loopos.data import preference_formats, rows
from loopos.data.context import with_context
from loopos.data.conversations import ASSISTANT, Conversation, Message, Question
from loopos.data.decoding import PLAIN_RULES, TextRules
from loopos.data.demonstrations import Demonstration
from loopos.data.preference_formats import PreferenceFormat
from loopos.data.prompts import Prompt, PromptContent, prompt_key, prompt_of
from loopos.data.reading import FormatReport, Unusable, left_out, read_examples
from loopos.data.row_fields import RowFields
from loopos.data.rows import Row, RowReader
from loopos.data.step_format import NAMED_FORMATS
from loopos.data.supervised_rows import Completion, SupervisedFormat, detect, example_of
from loopos.data.supervised_tokens import prompt_messages

_SYSTEM = ("system", "developer")


@dataclass(frozen=True, slots=True)
class Asked:
    """`text`: for people. `problem`: the messages that the template renders, or a text that is continued as it is."""

    text: str
    problem: tuple[Message, ...] | Question | Completion

    @property
    def words(self) -> PromptContent:
        """The messages, or the text that is continued."""
        if isinstance(self.problem, Completion):
            return self.problem.prompt
        return self.problem.messages if isinstance(self.problem, Question) else self.problem

    @property
    def recorded(self) -> str | list[dict[str, object]]:
        """The prompt as a record of the answer holds it, so that it can be asked again: a text, or the messages where
        there are more than one of the user's.
        """
        words = self.words
        if isinstance(words, str):
            return words
        if len(words) == 1 and words[0].as_template() == {"role": "user", "content": words[0].content}:
            return words[0].content
        return [message.as_template() for message in words]

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


def of_text(text: str, index: int, *, raw: bool) -> Asked:
    """The prompt of a text: a user's message, or with `raw` the beginning of a text that goes on."""
    if raw:
        return Asked(text, Completion(text, "", Row({}, "prompt", None, index)))
    return Asked(text, (Message("user", text),))


def read_prompts(source: str, columns: Mapping[str, str], *, raw: bool, rules: TextRules = PLAIN_RULES) -> list[Asked]:
    """The prompts of standard input ("-") or a .txt file, one a line, or of the rows of a data file: rows that a
    language model trains on, prompts, comparisons, and what `loopos generate` writes. Of several rows with responses
    to one prompt the first counts.

    Raises `DataError` for a blank line, a file of no known format, and rows that cannot be used.
    """
    texts = read_texts(source, columns, rules)
    if texts is not None:
        return [of_text(text, index, raw=raw) for index, text in enumerate(texts)]

    def from_row(row: Row, form: SupervisedFormat | PreferenceFormat) -> Asked | Unusable:
        if isinstance(form, PreferenceFormat):
            found = prompt_of(row, form, as_text=raw)
            return found if isinstance(found, Unusable) else of_prompt(found)
        fields = RowFields(row, form.columns)
        asked = _asked(fields, form, raw=raw)
        return (
            asked
            if asked is not None
            else Unusable(fields.problems[0][0], [diagnostic for _, diagnostic in fields.problems])
        )

    found: tuple[list[Asked], SupervisedFormat | PreferenceFormat, FormatReport]
    reader = rows.read(source, rules=rules)
    found = read_examples(reader, lambda names, index: _detect(names, columns, index), from_row)
    asked, form, report = found
    for sentence in left_out(report):
        note(f"{source}: {sentence}")
    if not isinstance(form, PreferenceFormat) or (form.kind == "prompts" and not is_sampled(reader)):
        return asked
    distinct: dict[str, Asked] = {}
    for each in asked:
        distinct.setdefault(prompt_key(each.words), each)
    if len(distinct) < len(asked):
        note(f"{source}: {len(asked)} rows with {len(distinct)} different prompts")
    return list(distinct.values())


def of_prompt(prompt: Prompt) -> Asked:
    """The prompt that a row of prompts or comparisons holds."""
    words = prompt.prompt
    if isinstance(words, str):
        return Asked(words, Completion(words, "", prompt.row))
    return Asked(words[-1].content, Question(words, prompt.tools) if prompt.tools else words)


def is_sampled(reader: RowReader) -> bool:
    """Whether the rows are what `loopos generate -n` writes: several for a prompt."""
    first = next(iter(reader.rows()), None)
    return first is not None and {"prompt", "text", "sample"} <= set(first.values)


def _detect(names: Sequence[str], columns: Mapping[str, str], source: str) -> SupervisedFormat | PreferenceFormat:
    """The format of the rows. Conversations need no answer here, and a text beside a prompt is what a model said to it;
    where rows are none that a language model trains on, they are prompts or comparisons.
    """
    try:
        form = detect(names, columns, source=source)
    except DataError as error:
        form, refused = None, error
    if form is not None and form.kind not in ("conversations", "text"):
        return form
    # Prompts know the role by another name.
    renamed = {"prompt" if role == "problem" else role: column for role, column in columns.items()}
    try:
        return preference_formats.detect(names, renamed, source=source, prompts=True)
    except DataError:
        if form is None:
            raise refused from None
        return form


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
            last = max(position for position, message in enumerate(messages) if message.role == ASSISTANT)
            asked_messages = messages[:last]
            if tools:
                return Asked(asked_messages[-1].content if asked_messages else "", Question(asked_messages, tools))
        case Demonstration():
            asked_messages = tuple(prompt_messages(example))
        case _:
            asked_messages = ()
    told = asked_messages[-1].content if asked_messages else ""
    return Asked(told, asked_messages)
