"""Prompts for a language model: from the command line, lines of text, or rows of a data file.

A prompt is the part of a row before its last answer, so rows without an answer work too.
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
from loopos.data.demonstrations import Demonstration, expected_answer
from loopos.data.preference_formats import PreferenceFormat
from loopos.data.prompts import Prompt, PromptContent, prompt_key, prompt_of
from loopos.data.reading import DataReport, Unusable, left_out, read_examples
from loopos.data.row_fields import RowFields
from loopos.data.rows import Row, RowReader
from loopos.data.step_format import NAMED_FORMATS
from loopos.data.supervised_rows import Completion, SupervisedFormat, detect, example_of
from loopos.data.supervised_tokens import prompt_messages
from loopos.data.tool_schemas import Tool

_SYSTEM = ("system", "developer")
# Roles of columns that say something about the answer: they stay with the row.
_BESIDE_PROMPTS = ("answer", "reasoning", "output", "completion", "chosen", "rejected", "margin", "tie", "p_human")


@dataclass(frozen=True, slots=True)
class PromptInput:
    """One prompt. `text`: for people. `problem`: messages for the chat template, or a text to continue as it is. `row`:
    the row of data that it comes from, None without one; `columns`: those of them that hold the prompt. `expected`: the
    answer that the row expects.
    """

    text: str
    problem: tuple[Message, ...] | Question | Completion
    row: Row | None = None
    columns: tuple[str, ...] = ()
    expected: str | None = None

    @property
    def tools(self) -> tuple[Tool, ...]:
        """The tools that the model may call."""
        return self.problem.tools if isinstance(self.problem, Question) else ()

    @property
    def content(self) -> PromptContent:
        """The messages, or the text to continue."""
        if isinstance(self.problem, Completion):
            return self.problem.prompt
        return self.problem.messages if isinstance(self.problem, Question) else self.problem

    @property
    def recorded(self) -> str | list[dict[str, object]]:
        """The prompt as output records store it, so that it can be read as input again: a text, or the messages where
        there is more than one user message.
        """
        content = self.content
        if isinstance(content, str):
            return content
        if len(content) == 1 and content[0].as_template() == {"role": "user", "content": content[0].content}:
            return content[0].content
        return [message.as_template() for message in content]

    def with_system(self, system: str | None) -> PromptInput:
        """The same prompt after a system message. Raises `UserError` if it already has one, or has no messages."""
        if system is None:
            return self
        messages = self.messages
        if messages is None or (messages and messages[0].role in _SYSTEM):
            why = "has no messages" if messages is None else "already has a system message"
            raise UserError(f"--system: the prompt {self.text[:60]!r} {why}; leave out --system")
        messages = (Message("system", system), *messages)
        problem = replace(self.problem, messages=messages) if isinstance(self.problem, Question) else messages
        return replace(self, problem=problem)

    @property
    def messages(self) -> tuple[Message, ...] | None:
        """The messages; None for a text to continue as it is."""
        if isinstance(self.problem, Completion):
            return None
        return self.problem.messages if isinstance(self.problem, Question) else self.problem


def of_text(text: str, index: int, *, raw: bool) -> PromptInput:
    """The prompt of a text: a user message, or with `raw` a text to continue."""
    if raw:
        return PromptInput(text, Completion(text, "", Row({}, "prompt", None, index)))
    return PromptInput(text, (Message("user", text),))


def read_prompts(
    source: str, columns: Mapping[str, str], *, raw: bool, rules: TextRules = PLAIN_RULES
) -> list[PromptInput]:
    """The prompts of standard input ("-") or a .txt file, one per line, or of a data file: training rows, prompts,
    comparisons, or the output of `loopos generate`. Of several sampled responses to one prompt only the first is read.

    Raises `DataError` for a blank line, a file of unknown format, and rows that cannot be used.
    """
    texts = read_texts(source, columns, rules)
    if texts is not None:
        return [of_text(text, index, raw=raw) for index, text in enumerate(texts)]

    def from_row(row: Row, form: SupervisedFormat | PreferenceFormat) -> PromptInput | Unusable:
        found = _of_row(row, form, raw=raw)
        if isinstance(found, Unusable):
            return found
        columns = tuple(column for role, column in form.columns.items() if role not in _BESIDE_PROMPTS)
        return replace(found, row=row, columns=columns, expected=_expected(row, form))

    found: tuple[list[PromptInput], SupervisedFormat | PreferenceFormat, DataReport]
    reader = rows.read(source, rules=rules)
    found = read_examples(reader, lambda names, index: _detect(names, columns, index), from_row)
    prompts, form, report = found
    for sentence in left_out(report):
        note(f"{source}: {sentence}")
    if not isinstance(form, PreferenceFormat) or (form.kind == "prompts" and not is_sampled(reader)):
        return prompts
    distinct: dict[str, PromptInput] = {}
    for each in prompts:
        distinct.setdefault(prompt_key(each.content), each)
    if len(distinct) < len(prompts):
        note(f"{source}: {len(prompts)} rows with {len(distinct)} different prompts")
    return list(distinct.values())


def _of_row(row: Row, form: SupervisedFormat | PreferenceFormat, *, raw: bool) -> PromptInput | Unusable:
    fields = RowFields(row, form.columns)
    if form.kind == "demonstrations" and isinstance(fields.content("problem"), list):
        # A problem in messages, with an answer to check: rows of verl and TRL.
        form = PreferenceFormat("prompts", {"prompt": form.columns["problem"]}, form.summary)
    if isinstance(form, PreferenceFormat):
        found = prompt_of(row, form, as_text=raw)
        return found if isinstance(found, Unusable) else of_prompt(found)
    prompt = _row_prompt(fields, form, raw=raw)
    if prompt is None:
        return Unusable(fields.problems[0][0], [diagnostic for _, diagnostic in fields.problems])
    return prompt


def _expected(row: Row, form: SupervisedFormat | PreferenceFormat) -> str | None:
    """The answer that checkers compare with: of a problem, or a column `answer`."""
    if form.kind == "demonstrations":
        return expected_answer(RowFields(row, form.columns))
    answer = next((value for name, value in row.values.items() if name.lower() == "answer"), None)
    return None if answer is None else str(answer)


def of_prompt(prompt: Prompt) -> PromptInput:
    """The prompt of a row of prompts or comparisons."""
    content = prompt.prompt
    if isinstance(content, str):
        return PromptInput(content, Completion(content, "", prompt.row))
    return PromptInput(content[-1].content, Question(content, prompt.tools) if prompt.tools else content)


def is_sampled(reader: RowReader) -> bool:
    """Whether the rows are output of `loopos generate -n`: several per prompt."""
    first = next(iter(reader.rows()), None)
    return first is not None and {"prompt", "text", "sample"} <= set(first.values)


def _detect(names: Sequence[str], columns: Mapping[str, str], source: str) -> SupervisedFormat | PreferenceFormat:
    """The format of the rows. Here conversations need no answer, and a text next to a prompt is a model's response.
    Rows that are no training rows are read as prompts or comparisons.
    """
    try:
        form = detect(names, columns, source=source)
    except DataError as error:
        form, refused = None, error
    if form is not None and form.kind not in ("conversations", "text"):
        return form
    # The prompt formats use another name for this role.
    renamed = {"prompt" if role == "problem" else role: column for role, column in columns.items()}
    try:
        return preference_formats.detect(names, renamed, source=source, prompts=True)
    except DataError:
        if form is None:
            raise refused from None
        return form


def _row_prompt(fields: RowFields, form: SupervisedFormat, *, raw: bool) -> PromptInput | None:
    """The prompt of a row; None, with `fields.problems` filled, if it has none."""
    if form.kind in ("demonstrations", "text"):
        text = with_context(fields, "problem") if form.kind == "demonstrations" else fields.text("text")
        system = fields.optional_text("system")
        if fields.problems:
            return None
        prompt = of_text(text.strip() if form.kind == "demonstrations" else text, fields.row.index, raw=raw)
        return prompt if raw else prompt.with_system(system)
    example = example_of(fields, form, NAMED_FORMATS["lines"])
    if example is None:
        return None
    match example:
        case Completion(prompt=text):
            return PromptInput(text, example)
        case Conversation(messages=messages, tools=tools):
            last = max(position for position, message in enumerate(messages) if message.role == ASSISTANT)
            before = messages[:last]
            if tools:
                return PromptInput(before[-1].content if before else "", Question(before, tools))
        case Demonstration():
            before = tuple(prompt_messages(example))
        case _:
            before = ()
    text = before[-1].content if before else ""
    return PromptInput(text, before)
