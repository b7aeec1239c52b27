"""Columns → what the rows of a data set for language models are: demonstrations, conversations, instructions,
completions or plain text.

Enters: names of columns and, from `data.columns`, the user's own choice. Leaves: a `SupervisedFormat` with the sentence
that says it. The names are those that TRL, LLaMA-Factory and Axolotl read by default, without regard to case. Plain
text is the last resort; two other formats that both fit are a fault, for a guess could train on the wrong one.
Left out: the rows themselves (`demonstrations`, `conversations`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from loopos.config.faults import DataError, Fault
from loopos.data.columns import ambiguous, candidates, check_overrides, listed

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
    "input": (frozenset({"input"}),),
    "output": (frozenset({"output"}), frozenset({"response"})),
    "history": (frozenset({"history"}),),
    "prompt": (frozenset({"prompt"}),),
    "completion": (frozenset({"completion"}),),
    "text": (frozenset({"text"}),),
    "system": (frozenset({"system"}), frozenset({"system_prompt"})),
}
"""The names of each role's column in tiers, a better tier winning over a later one."""

ROLES: Mapping[Kind, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "conversations": (("messages",), ("system",)),
    "demonstrations": (("problem", "answer"), ("reasoning", "system")),
    "instructions": (("instruction", "output"), ("input", "history", "system")),
    "completions": (("prompt", "completion"), ()),
    "text": (("text",), ()),
}
"""The roles that each format must have, and may have."""

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


def detect(columns: Sequence[str], overrides: Mapping[str, str], *, source: str = "data") -> SupervisedFormat:
    """Finds the format and the column of each of its roles.

    Args:
        columns: names of the columns that are there.
        overrides: role to column, from `data.columns`; the format is then one that has all these roles.
        source: the file's name for faults.
    Raises:
        DataError: an override that fits no role or column, no format that fits, or several.
    """
    check_overrides(columns, overrides.items(), list(NAMES), source)
    kinds = [kind for kind, (needed, more) in ROLES.items() if set(overrides) <= {*needed, *more}]
    if not kinds:
        given = f"the roles {', '.join(overrides)} together"
        wanted = "roles of one format: " + "; ".join(", ".join([*needed, *more]) for needed, more in ROLES.values())
        raise DataError([Fault(source, None, None, "data.columns", given, wanted)])
    unsure: dict[Kind, Fault] = {}
    fitting = [form for kind in kinds if (form := _fit(kind, columns, overrides, source, unsure)) is not None]
    better = [form for form in fitting if form.kind != "text"] or fitting
    if len(better) == 1:
        if better[0].kind in unsure:
            raise DataError([unsure[better[0].kind]])
        return better[0]
    if better:
        given = f"columns of {len(better)} formats: {' and '.join(form.kind for form in better)} ({listed(columns)})"
        role, column = next(iter(better[0].columns.items()))
        hint = f'name the columns of one: data.columns: {{"{role}": "{column}"}}'
        raise DataError([Fault(source, None, None, "data.columns", given, "one format", hint)])
    missing = f" (with {', '.join(overrides)} given)" if overrides else ""
    given = f"no columns that make a known format{missing}; there: {listed(columns)}"
    hint = 'name the columns: data.columns: {"problem": "COLUMN", "answer": "COLUMN"}'
    raise DataError([Fault(source, None, None, "data.columns", given, f"columns such as {_EXAMPLES}", hint)])


def _fit(
    kind: Kind, columns: Sequence[str], overrides: Mapping[str, str], source: str, unsure: dict[Kind, Fault]
) -> SupervisedFormat | None:
    """The format with its columns, or None where a needed column is not there. A role with two columns that fit
    equally well is noted in `unsure`.
    """
    needed, more = ROLES[kind]
    free = [name for name in columns if name not in overrides.values()]
    found = dict(overrides)
    for role in (*needed, *more):
        if role in found:
            continue
        fitting = candidates(free, NAMES[role])
        if len(fitting) > 1:
            unsure.setdefault(kind, ambiguous(role, fitting, columns, source))
        if fitting:
            found[role] = fitting[0]
            free.remove(fitting[0])
    missing = set(needed) - set(found)
    if missing and not (kind == "demonstrations" and missing == {"answer"} and "reasoning" in found):
        return None
    ordered = {role: found[role] for role in (*needed, *more) if role in found}
    said = f"format: {kind} (" + ", ".join(f'{role} <- "{column}"' for role, column in ordered.items()) + ")"
    return SupervisedFormat(kind, ordered, said)
