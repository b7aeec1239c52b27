"""Columns → what the rows of a data set for language models are: demonstrations, conversations, instructions,
completions or plain text.

Enters: names of columns and, from `data.columns`, the user's own choice. Leaves: a `SupervisedFormat` with the sentence
that says it. The names are those that TRL, LLaMA-Factory and Axolotl read by default, without regard to case. Plain
text is the last resort; two other formats that both fit are a fault, for a guess could train on the wrong one.
Left out: how the format is found (`format_detection`), the rows themselves (`demonstrations`, `conversations`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from loopos.data.columns import COLUMN
from loopos.data.context import CONTEXT_NAMES, CONTEXT_ROLES
from loopos.data.format_detection import Family, Fit, Overrides, Shape, detected
from loopos.data.tool_schemas import TOOL_NAMES

Kind: TypeAlias = Literal["demonstrations", "conversations", "instructions", "completions", "text"]

NAMES: Mapping[str, tuple[frozenset[str], ...]] = {
    "problem": (
        frozenset({"problem"}),
        frozenset({"question"}),
        frozenset({"prompt"}),
        frozenset({"input", "query"}),
    ),
    "reasoning": (
        frozenset({"reasoning"}),
        frozenset({"steps", "reasoning_steps"}),
        frozenset({"rationale", "chain_of_thought", "cot"}),
        frozenset({"solution"}),
    ),
    "answer": (frozenset({"answer", "final_answer"}),),
    "messages": (frozenset({"messages"}), frozenset({"conversations", "conversation"})),
    "instruction": (frozenset({"instruction"}),),
    **CONTEXT_NAMES,
    "output": (frozenset({"output"}), frozenset({"response"})),
    "history": (frozenset({"history"}),),
    "prompt": (frozenset({"prompt"}),),
    "completion": (frozenset({"completion"}),),
    "text": (frozenset({"text"}),),
    "system": (frozenset({"system"}), frozenset({"system_prompt"})),
    "tools": TOOL_NAMES,
}
"""The names of each role's column in tiers, a better tier winning over a later one."""

SHAPES: tuple[tuple[Shape[Kind], ...], ...] = (
    (
        Shape("conversations", ("messages",), ("system", "tools")),
        Shape(
            "demonstrations",
            ("problem", "answer"),
            ("reasoning", *CONTEXT_ROLES, "system"),
            stand_ins={"answer": "reasoning"},
        ),
        Shape("instructions", ("instruction", "output"), (*CONTEXT_ROLES, "history", "system", "tools")),
        Shape("completions", ("prompt", "completion"), ("tools",)),
    ),
    (Shape("text", ("text",)),),
)
"""The formats in tiers, a better tier winning over a later one."""

_EXAMPLES = (
    '{"problem", "reasoning", "answer"}, {"messages"}, {"conversations"}, {"instruction", "output"}, '
    '{"prompt", "completion"} or {"text"}'
)


@dataclass(frozen=True, slots=True)
class SupervisedFormat:
    """`columns`: role → column. Demonstrations without the role answer keep it behind "####" in their reasoning."""

    kind: Kind
    columns: Mapping[str, str]
    said: str


def detect(
    columns: Sequence[str],
    overrides: Overrides,
    *,
    remembered: Mapping[str, str | None] | None = None,
    source: str = "data",
) -> SupervisedFormat:
    """Finds the format and the column of each of its roles.

    Args:
        columns: names of the columns that are there.
        overrides: role to column, from `data.columns`, None for no column; the format then has all these roles.
        remembered: the overrides that the model was trained with, which serve where there are no others and the source
            has all their columns.
        source: the file's name for faults.
    Raises:
        DataError: an override that fits no role or column, no format that fits, or several.
    """
    if remembered and not overrides and all(name is None or name in columns for name in remembered.values()):
        overrides = remembered
    fit = detected(_FAMILY, columns, overrides, source)
    return SupervisedFormat(fit.shape.kind, fit.columns, fit.said)


def _rivals(fits: Sequence[Fit[Kind]]) -> tuple[str, tuple[str, str]]:
    """What several formats that fit are called, and the choice of the first one's first column."""
    return " and ".join(fit.shape.kind for fit in fits), next(iter(fits[0].columns.items()))


_FAMILY = Family(NAMES, SHAPES, _EXAMPLES, (("problem", COLUMN), ("answer", COLUMN)), _rivals)
