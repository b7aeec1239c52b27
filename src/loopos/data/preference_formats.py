"""Formats of preference data: pairs, implicit pairs, judged pairs, groups, or only prompts.

Column names are those of TRL, LLaMA-Factory, Axolotl, ms-swift, OpenRLHF, Argilla and distilabel, without regard to
case. A format with a prompt column wins over one without; two that fit equally well are an error, because a guess could
train on the wrong one. Columns of `preference_layouts` win over both: they have other roles inside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loopos.data.columns import (
    COLUMN,
    Family,
    Fit,
    Overrides,
    Shape,
    candidates,
    check_overrides,
    detected,
    plain_name,
    roles_summary,
)
from loopos.data.context import CONTEXT_NAMES, CONTEXT_ROLES
from loopos.data.conversations import HISTORY_NAMES
from loopos.data.preference_layouts import Kind, Layout, layout_of
from loopos.data.row_fields import RowFields
from loopos.data.rows import Row
from loopos.data.tool_schemas import TOOL_NAMES

NAMES: Mapping[str, tuple[frozenset[str], ...]] = {
    "prompt": (
        frozenset({"prompt"}),
        frozenset({"question"}),
        frozenset({"instruction"}),
        frozenset({"problem"}),
        frozenset({"input", "query"}),
        frozenset({"messages", "conversations", "conversation"}),
    ),
    "chosen": (
        frozenset({"chosen"}),
        frozenset({"chosen_response"}),
        frozenset({"response_j"}),
        frozenset({"response", "output"}),
    ),
    "rejected": (frozenset({"rejected"}), frozenset({"rejected_response"}), frozenset({"response_k"})),
    "responses": (frozenset({"responses"}), frozenset({"completions"}), frozenset({"generations"})),
    "scores": (frozenset({"scores"}), frozenset({"ratings"})),
    "ranking": (frozenset({"ranking"}),),
    "margin": (frozenset({"margin"}),),
    "p_human": (frozenset({"p_human"}), frozenset({"p_chosen"}), frozenset({"probability"})),
    "tie": (frozenset({"tie"}),),
    "response_1": (
        frozenset({"response1", "response_1"}),
        frozenset({"response_a", "answer1", "answer_1", "answer_a", "completion_a", "output_1", "conversation_a"}),
    ),
    "response_2": (
        frozenset({"response2", "response_2"}),
        frozenset({"response_b", "answer2", "answer_2", "answer_b", "completion_b", "output_2", "conversation_b"}),
    ),
    "preference": (
        frozenset({"preference"}),
        frozenset({"preference.responses", "ranking.responses"}),
        frozenset({"preference.suggestion", "ranking.suggestion"}),
        frozenset({"winner", "comparison", "preferred"}),
    ),
    **CONTEXT_NAMES,
    "history": HISTORY_NAMES,
    "system": (frozenset({"system"}), frozenset({"system_prompt"})),
    "tools": TOOL_NAMES,
}
"""The names of each role's column in tiers, a better tier winning over a later one."""

_CERTAINTY = ("margin", "p_human", "tie")
_BESIDE = (*CONTEXT_ROLES, "history", "system", "tools")
_BESIDE_LAYOUT = ("system", "tools")
SHAPES: tuple[tuple[Shape[Kind], ...], ...] = (
    (
        Shape("pairs", ("prompt", "chosen", "rejected"), (*_CERTAINTY, *_BESIDE)),
        Shape("groups", ("prompt", "responses", "scores"), _BESIDE),
        Shape("groups", ("prompt", "responses", "ranking"), _BESIDE),
        Shape("judged pairs", ("prompt", "response_1", "response_2", "preference"), ("margin", *_BESIDE)),
    ),
    (
        Shape("implicit pairs", ("chosen", "rejected"), (*_CERTAINTY, "system", "tools")),
        Shape("implicit judged pairs", ("response_1", "response_2", "preference"), ("margin", "system", "tools")),
    ),
    (Shape("prompts", ("prompt",), _BESIDE),),
)
"""The formats in tiers, a better tier winning over a later one; the last is only for prompts."""

_PAIR_EXAMPLES = (
    '{"prompt", "chosen", "rejected"}, {"chosen", "rejected"}, {"prompt", "responses", "scores"}, '
    '{"prompt", "responses", "ranking"} or {"prompt", "response1", "response2", "preference"}'
)
_PROMPT_EXAMPLES = '{"prompt"}, {"question"}, {"instruction", "input"}, {"messages"} or {"chosen", "rejected"}'


@dataclass(frozen=True, slots=True)
class PreferenceFormat:
    """`columns`: role → column, or the place in it if the rows have a `layout`."""

    kind: Kind
    columns: Mapping[str, str]
    summary: str
    layout: Layout | None = None

    def fields(self, row: Row) -> RowFields:
        """The values of a row by role."""
        if self.layout is None:
            return RowFields(row, self.columns)
        values = {plain_name(name): value for name, value in row.values.items()}
        found = self.layout.read({**dict.fromkeys(self.layout.needed), **values})
        paths = {self.columns[role]: value for role, value in found.items() if role in self.columns}
        return RowFields(row, self.columns, {**row.values, **paths})


def detect(
    columns: Sequence[str], overrides: Overrides, *, source: str = "data", prompts: bool = False
) -> PreferenceFormat:
    """Find the format and the column of each of its roles.

    Args:
        columns: names of the existing columns.
        overrides: role to column, from `data.columns`; the format is then one that has all these roles.
        source: the file's name for diagnostics.
        prompts: whether prompts without responses will do.
    Raises:
        DataError: an override that fits no role or column, no format that fits, or several.
    """
    layout = layout_of([plain_name(name) for name in columns])
    if layout is not None and {role for role, column in overrides.items() if column is not None} <= set(
        _beside(layout)
    ):
        return _of_layout(layout, columns, overrides, source)
    fit = detected(_WITH_PROMPTS if prompts else _COMPARISONS, columns, overrides, source)
    return PreferenceFormat(fit.shape.kind, fit.columns, fit.summary)


def _beside(layout: Layout) -> list[str]:
    """The roles that columns beside a layout may have: those that it does not fill itself."""
    roles = (*_BESIDE_LAYOUT, *(("margin",) if layout.kind in ("pairs", "implicit pairs") else ()))
    return [role for role in roles if role not in layout.columns]


def _of_layout(layout: Layout, columns: Sequence[str], overrides: Overrides, source: str) -> PreferenceFormat:
    """The format of rows with a layout, and what stands beside it."""
    check_overrides(columns, overrides.items(), list(NAMES), source)
    found = {role: path for role, path in layout.columns.items() if overrides.get(role, path) is not None}
    free = [name for name in columns if plain_name(name) not in layout.needed]
    for role in _beside(layout):
        there = candidates(free, NAMES[role])
        column = overrides.get(role, there[0] if there else None)
        found |= {} if column is None else {role: column}
    return PreferenceFormat(layout.kind, found, f"format: {layout.name}, {roles_summary(layout.kind, found)}", layout)


def _rivals(fits: Sequence[Fit[Kind]]) -> tuple[str, tuple[str, str]]:
    """What several formats that fit are called, and the choice of a role that the first one alone has."""
    named = " and ".join("{" + ", ".join(fit.shape.needed) + "}" for fit in fits)
    role = next(role for role in fits[0].shape.needed if role not in fits[1].shape.roles)
    return named, (role, COLUMN)


_COMPARISONS = Family(NAMES, SHAPES[:-1], _PAIR_EXAMPLES, (("chosen", COLUMN), ("rejected", COLUMN)), _rivals)
_WITH_PROMPTS = Family(NAMES, SHAPES, _PROMPT_EXAMPLES, (("prompt", COLUMN),), _rivals)
