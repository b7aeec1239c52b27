"""Formats of preference data: pairs, implicit pairs, judged pairs, groups, or only prompts.

Column names are those of TRL, LLaMA-Factory, Axolotl and OpenRLHF, without regard to case. A format with a prompt
column wins over one without; two that fit equally well are an error, because a guess could train on the wrong one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from loopos.data.columns import COLUMN, Family, Fit, Overrides, Shape, detected
from loopos.data.context import CONTEXT_NAMES, CONTEXT_ROLES
from loopos.data.tool_schemas import TOOL_NAMES

Kind: TypeAlias = Literal["pairs", "groups", "judged pairs", "implicit pairs", "prompts"]

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
        frozenset({"preference.responses"}),
        frozenset({"winner", "comparison", "preferred"}),
    ),
    **CONTEXT_NAMES,
    "system": (frozenset({"system"}), frozenset({"system_prompt"})),
    "tools": TOOL_NAMES,
}
"""The names of each role's column in tiers, a better tier winning over a later one."""

_CERTAINTY = ("margin", "p_human", "tie")
_BESIDE = (*CONTEXT_ROLES, "system", "tools")
SHAPES: tuple[tuple[Shape[Kind], ...], ...] = (
    (
        Shape("pairs", ("prompt", "chosen", "rejected"), (*_CERTAINTY, *_BESIDE)),
        Shape("groups", ("prompt", "responses", "scores"), _BESIDE),
        Shape("groups", ("prompt", "responses", "ranking"), _BESIDE),
        Shape("judged pairs", ("prompt", "response_1", "response_2", "preference"), ("margin", *_BESIDE)),
    ),
    (Shape("implicit pairs", ("chosen", "rejected"), (*_CERTAINTY, "system", "tools")),),
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
    """`columns`: role → column."""

    kind: Kind
    columns: Mapping[str, str]
    summary: str


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
    fit = detected(_WITH_PROMPTS if prompts else _COMPARISONS, columns, overrides, source)
    return PreferenceFormat(fit.shape.kind, fit.columns, fit.summary)


def _rivals(fits: Sequence[Fit[Kind]]) -> tuple[str, tuple[str, str]]:
    """What several formats that fit are called, and the choice of a role that the first one alone has."""
    named = " and ".join("{" + ", ".join(fit.shape.needed) + "}" for fit in fits)
    role = next(role for role in fits[0].shape.needed if role not in fits[1].shape.roles)
    return named, (role, COLUMN)


_COMPARISONS = Family(NAMES, SHAPES[:-1], _PAIR_EXAMPLES, (("chosen", COLUMN), ("rejected", COLUMN)), _rivals)
_WITH_PROMPTS = Family(NAMES, SHAPES, _PROMPT_EXAMPLES, (("prompt", COLUMN),), _rivals)
