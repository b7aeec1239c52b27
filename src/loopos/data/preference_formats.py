"""Columns → what the rows of a preference data set are: pairs, pairs with an implicit prompt, groups; or prompts alone.

Enters: names of columns and, from `data.columns`, the user's own choice. Leaves: a `PreferenceFormat` with the sentence
that says it. The names are those that TRL, LLaMA-Factory, Axolotl and OpenRLHF read, without regard to case. A format
with a prompt column wins over one without; two that fit equally well are a fault, for a guess could train on the wrong
one. Left out: the rows themselves (`preferences`, `prompts`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from loopos.config.faults import DataError, Fault
from loopos.data.columns import ambiguous, candidates, check_overrides, listed

Kind: TypeAlias = Literal["pairs", "groups", "implicit pairs", "prompts"]

NAMES: Mapping[str, tuple[frozenset[str], ...]] = {
    "prompt": (
        frozenset({"prompt"}),
        frozenset({"question"}),
        frozenset({"instruction"}),
        frozenset({"problem"}),
        frozenset({"input", "query"}),
        frozenset({"messages", "conversations", "conversation"}),
    ),
    "chosen": (frozenset({"chosen"}), frozenset({"chosen_response"}), frozenset({"response_j"})),
    "rejected": (frozenset({"rejected"}), frozenset({"rejected_response"}), frozenset({"response_k"})),
    "responses": (frozenset({"responses"}), frozenset({"completions"})),
    "scores": (frozenset({"scores"}),),
    "ranking": (frozenset({"ranking"}),),
    "margin": (frozenset({"margin"}),),
    "p_human": (frozenset({"p_human"}), frozenset({"p_chosen"}), frozenset({"probability"})),
    "tie": (frozenset({"tie"}),),
    "input": (frozenset({"input"}),),
    "system": (frozenset({"system"}), frozenset({"system_prompt"})),
}
"""The names of each role's column in tiers, a better tier winning over a later one."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The roles that a format must have, and may have."""

    kind: Kind
    needed: tuple[str, ...]
    more: tuple[str, ...]

    @property
    def roles(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.needed, *self.more)


_CERTAINTY = ("margin", "p_human", "tie")
SHAPES: tuple[tuple[Shape, ...], ...] = (
    (
        Shape("pairs", ("prompt", "chosen", "rejected"), (*_CERTAINTY, "input", "system")),
        Shape("groups", ("prompt", "responses", "scores"), ("input", "system")),
        Shape("groups", ("prompt", "responses", "ranking"), ("input", "system")),
    ),
    (Shape("implicit pairs", ("chosen", "rejected"), (*_CERTAINTY, "system")),),
    (Shape("prompts", ("prompt",), ("input", "system")),),
)
"""The formats in tiers, a better tier winning over a later one; the last is for those who ask for prompts alone."""

_PAIR_EXAMPLES = (
    '{"prompt", "chosen", "rejected"}, {"chosen", "rejected"}, {"prompt", "responses", "scores"} or '
    '{"prompt", "responses", "ranking"}'
)
_PROMPT_EXAMPLES = '{"prompt"}, {"question"}, {"instruction", "input"}, {"messages"} or {"chosen", "rejected"}'


@dataclass(frozen=True, slots=True)
class PreferenceFormat:
    """`columns`: role → column."""

    kind: Kind
    columns: Mapping[str, str]
    said: str


def detect(
    columns: Sequence[str], overrides: Mapping[str, str], *, source: str = "data", prompts: bool = False
) -> PreferenceFormat:
    """Finds the format and the column of each of its roles.

    Args:
        columns: names of the columns that are there.
        overrides: role to column, from `data.columns`; the format is then one that has all these roles.
        source: the file's name for faults.
        prompts: whether prompts without responses will do.
    Raises:
        DataError: an override that fits no role or column, no format that fits, or several.
    """
    check_overrides(columns, overrides.items(), list(NAMES), source)
    known = SHAPES if prompts else SHAPES[:-1]
    tiers = [[shape for shape in tier if set(overrides) <= set(shape.roles)] for tier in known]
    if not any(tiers):
        given = f"the roles {', '.join(overrides)} together"
        wanted = "roles of one format: " + "; ".join(", ".join(shape.roles) for tier in known for shape in tier)
        raise DataError([Fault(source, None, None, "data.columns", given, wanted)])
    unsure: dict[Shape, Fault] = {}
    for tier in tiers:
        found = [(shape, roles) for shape in tier if (roles := _fit(shape, columns, overrides, source, unsure))]
        if len(found) > 1:
            raise DataError([_several([shape for shape, _ in found], columns, source)])
        if found:
            shape, roles = found[0]
            if shape in unsure:
                raise DataError([unsure[shape]])
            served = ", ".join(f'{role} <- "{column}"' for role, column in roles.items())
            return PreferenceFormat(shape.kind, roles, f"format: {shape.kind} ({served})")
    missing = f" (with {', '.join(overrides)} given)" if overrides else ""
    given = f"no columns that make a known format{missing}; there: {listed(columns)}"
    named = '"prompt": "COLUMN"' if prompts else '"chosen": "COLUMN", "rejected": "COLUMN"'
    hint = f"name the columns: data.columns: {{{named}}}"
    wanted = f"columns such as {_PROMPT_EXAMPLES if prompts else _PAIR_EXAMPLES}"
    raise DataError([Fault(source, None, None, "data.columns", given, wanted, hint)])


def _several(shapes: Sequence[Shape], columns: Sequence[str], source: str) -> Fault:
    """The fault of columns that make several formats, with a role that one of them alone has."""
    named = " and ".join("{" + ", ".join(shape.needed) + "}" for shape in shapes)
    given = f"columns of {len(shapes)} formats: {named} ({listed(columns)})"
    role = next(role for role in shapes[0].needed if role not in shapes[1].roles)
    hint = f'name the columns of one: data.columns: {{"{role}": "COLUMN"}}'
    return Fault(source, None, None, "data.columns", given, "one format", hint)


def _fit(
    shape: Shape, columns: Sequence[str], overrides: Mapping[str, str], source: str, unsure: dict[Shape, Fault]
) -> dict[str, str] | None:
    """The column of each role that has one, or None where a needed column is not there. A role with two columns that
    fit equally well is noted in `unsure`.
    """
    free = [name for name in columns if name not in overrides.values()]
    found = dict(overrides)
    for role in shape.roles:
        fitting = [] if role in found else candidates(free, NAMES[role])
        if len(fitting) > 1:
            unsure.setdefault(shape, ambiguous(role, fitting, columns, source))
        if fitting:
            found[role] = fitting[0]
            free.remove(fitting[0])
    if not set(shape.needed) <= set(found):
        return None
    return {role: found[role] for role in shape.roles if role in found}
