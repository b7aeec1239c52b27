"""Build the text of a question from its column and the columns that belong to it (context, input, choices).

LLaMA-Factory's `input` goes below the instruction. A whole-number answer is the index of a choice and becomes its
letter.
"""

from __future__ import annotations

import string
from collections.abc import Mapping

from loopos.data.record import is_number, kind_name, shown, structure_of
from loopos.data.row_fields import RowFields

CONTEXT_ROLES = ("input", "context", "choices")
"""The roles whose text follows a question, in this order."""

CONTEXT_NAMES: Mapping[str, tuple[frozenset[str], ...]] = {
    "input": (frozenset({"input"}),),
    "context": (
        frozenset({"context"}),
        frozenset({
            "contexts", "passage", "passages", "document", "documents", "paragraph", "article", "background",
            "evidence", "schema", "sql_context", "reference_text", "source_text",
        }),
    ),
    "choices": (frozenset({"choices"}), frozenset({"options"})),
}  # fmt: skip
"""The names of their columns in tiers."""

_CONTEXT_EXPECTED = "a text, or a list of texts"
_CHOICES_EXPECTED = "a list of texts, or an object with a text for each letter"


def with_context(fields: RowFields, role: str) -> str:
    """The text of a role that must be there, with what the row holds beside it below."""
    parts = [fields.text(role), *context_parts(fields)]
    return "\n".join(parts)


def context_parts(fields: RowFields) -> list[str]:
    """What a row holds beside its question, in order; nothing for columns that are not there, null or blank."""
    actual = fields.optional_text("input")
    parts = [actual] if actual is not None else []
    context = _context(fields)
    parts += [context] if context else []
    choices = fields.structure("choices")
    if isinstance(choices, str):
        parts += [choices] if choices.strip() else []
    else:
        parts += [f"{letter}. {text}" for letter, text in _lettered(fields)]
    return parts


def chosen_letter(fields: RowFields, answer: str) -> str:
    """The answer as a letter if it is a whole number, the index of a choice from 0."""
    choices = _lettered(fields) if fields.has("choices") and not fields.problems else []
    if not choices or not answer.isdecimal():
        return answer
    texts = [text.strip() for _, text in choices]
    if answer in [letter for letter, _ in choices]:
        return answer
    index = int(answer)
    is_index = index < len(choices)
    if answer in texts and not (is_index and texts[index] != answer):
        return answer
    expected, hint = f"a letter, or an index from 0 to {len(choices) - 1}", "write the letter of the right choice"
    if answer in texts or not is_index:
        actual = f"{answer}, which is the text of one choice and the index of another" if is_index else answer
        fields.add("answer is not one of the choices", fields.field("answer"), actual, expected, hint)
        return ""
    return choices[index][0]


def _context(fields: RowFields) -> str:
    """A text as it stands; several, each below the one before."""
    value = fields.value("context")
    if isinstance(value, str) and isinstance(listed := structure_of(value), list):
        value = listed
    if isinstance(value, str) or value is None:
        return fields.optional_text("context") or ""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "\n".join(item for item in value if item.strip())
    _add(fields, "context", value, _CONTEXT_EXPECTED)
    return ""


def _lettered(fields: RowFields) -> list[tuple[str, str]]:
    """Letters and texts of the choices, whichever way they are written."""
    value = fields.structure("choices")
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        # ARC and CommonsenseQA: {"text": [...], "label": [...]}
        texts, letters = value["text"], value.get("label")
    elif isinstance(value, dict):
        texts, letters = list(value.values()), list(value)
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        texts = [item.get("text") for item in value]
        letters = [item.get("label") for item in value]
    elif isinstance(value, list):
        texts, letters = value, None
    else:
        if value is not None and not isinstance(value, str):
            _add(fields, "choices", value, _CHOICES_EXPECTED)
        return []
    texts = [str(text) if is_number(text) else text for text in texts]
    if letters is None or all(letter is None for letter in letters):
        letters = list(string.ascii_uppercase[: len(texts)])
    fits = len(letters) == len(texts) and all(isinstance(item, str) and item.strip() for item in (*texts, *letters))
    if not fits:
        _add(fields, "choices", value, _CHOICES_EXPECTED)
        return []
    return list(zip(letters, texts, strict=True))


def _add(fields: RowFields, role: str, value: object, expected: str) -> None:
    hint = f'to leave it out: data.columns: {{"{role}": null}}'
    fields.add(f"{role} does not fit", fields.field(role), f"{shown(value)} ({kind_name(value)})", expected, hint)
