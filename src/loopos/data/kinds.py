"""Detect what the rows of a source are: labeled examples, language-model rows, comparisons, prompts or texts.

Each kind is detected as its method detects it; if several fit, the more specific one wins:

    steps > comparisons > answers with a thumb > demonstrations, conversations, instructions, completions > labeled
    > prompts > texts

But a question and an answer with a column "label" are a labeled pair of texts, a label is a thumb only where most of
its values are thumbs, and a text next to a prompt is a generated response. `data check` and the items of
studies are read so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from loopos.config.diagnostics import DataError, Diagnostic
from loopos.data import formats, preference_formats, stepwise, supervised_rows, thumbs
from loopos.data.columns import LABEL_TIERS, TEXT_TIERS, candidates, likely, listed, plain_name
from loopos.data.formats import read_labeled
from loopos.data.preferences import read_comparisons
from loopos.data.prompts import read_prompts
from loopos.data.reading import DataReport
from loopos.data.rows import Row, RowReader
from loopos.data.step_format import NAMED_FORMATS
from loopos.data.supervised_rows import read_supervised

Family: TypeAlias = Literal["labeled", "texts", "language", "comparisons", "steps", "thumbs", "prompts"]

_OF_COMPARISONS = frozenset({"chosen", "rejected", "responses", "response_j", "response_k"})
_EXPECTED = (
    "text and label (fine_tuning); messages, prompt and completion, or instruction and output (sft); problem, "
    "reasoning and answer (chain_of_thought); prompt, chosen and rejected (reward_model, dpo); prompt, completion and "
    "label (kto); or prompt (ppo)"
)


@dataclass(frozen=True, slots=True)
class Kind:
    """`family`: which reader reads the rows; `name`: what people call them; `roles`: role → column."""

    family: Family
    name: str
    roles: Mapping[str, str]


def kind_of(rows: Sequence[Row], overrides: Mapping[str, str], source: str) -> Kind:
    """What rows are. Raise `DataError` if they are none of what any method reads, or several."""
    columns = list(dict.fromkeys(name for row in rows for name in row.values))
    refused: dict[str, DataError] = {}

    def attempt(name: str, detect: Callable[[], Any]) -> Any:
        try:
            return detect()
        except DataError as error:
            refused[name] = error
            return None

    compared = attempt("comparisons", lambda: preference_formats.detect(columns, overrides, source=source))
    steps = stepwise.detect_steps(columns, overrides, source)
    if steps is not None:
        judged = stepwise.detect(columns, overrides, source)
        return Kind("steps", judged.kind, judged.columns)
    language = attempt("language", lambda: supervised_rows.detect(columns, overrides, source=source))
    labeled = attempt("labeled", lambda: formats.detect(columns, overrides, require_label=False, source=source))
    prompts = attempt("prompts", lambda: preference_formats.detect(columns, overrides, source=source, prompts=True))
    if compared is not None:
        return Kind("comparisons", compared.kind, compared.columns)
    if any(plain_name(name) in _OF_COMPARISONS for name in columns) and not overrides:
        raise refused["comparisons"]
    judged = attempt("thumbs", lambda: thumbs.detect(columns, overrides, source))
    if judged is not None and _are_thumbs(rows, judged.columns):
        return Kind("thumbs", judged.kind, judged.columns)
    has_label = labeled is not None and labeled.label is not None
    is_pair_with_label = has_label and language is not None and language.kind == "demonstrations"
    is_pair_with_label = is_pair_with_label and plain_name(labeled.label) in ("label", "labels")
    if language is not None and language.kind != "text" and not is_pair_with_label:
        return Kind("language", language.kind, language.columns)
    if prompts is not None and not has_label and any(plain_name(name) == "text" for name in columns):
        return Kind("prompts", "samples", prompts.columns)
    if labeled is not None and (has_label or prompts is None or plain_name(labeled.text) == "text"):
        served = {"text": labeled.text, "text_pair": labeled.text_pair, "label": labeled.label}
        roles = {role: name for role, name in served.items() if name is not None}
        return Kind("labeled" if has_label else "texts", "labeled" if has_label else "texts", roles)
    if language is not None:
        return Kind("language", language.kind, language.columns)
    if prompts is not None:
        return Kind("prompts", "prompts", prompts.columns)
    raise _no_kind(columns, overrides, refused, source)


def _are_thumbs(rows: Sequence[Row], roles: Mapping[str, str]) -> bool:
    """Whether the label of an answer is a thumb, and not the class of a pair of texts."""
    label, answer = roles["label"], roles.get("completion")
    if answer is not None and plain_name(label) == "label" and plain_name(answer) != "completion":
        return False
    values = [row.values.get(label) for row in rows]
    return 2 * sum(thumbs.is_thumb(value) for value in values) > len(values)


def read_kind(reader: RowReader, kind: Kind, overrides: Mapping[str, str]) -> tuple[list[Any], DataReport]:
    """The examples, read as the method that trains on them reads them. Raises `DataError`."""
    match kind.family:
        case "labeled" | "texts":
            return read_labeled(reader, overrides, require_label=kind.family == "labeled")
        case "language":
            examples, report = read_supervised(reader, overrides, step_format=NAMED_FORMATS["think"])
            return list(examples), report
        case "comparisons":
            compared, report = read_comparisons(reader, overrides)
            return list(compared), report
        case "thumbs":
            answers, report = thumbs.read_thumbs(reader, overrides)
            return list(answers), report
        case "steps":
            judged, report = stepwise.read_judgments(reader, overrides)
            return list(judged), report
        case "prompts":
            prompts, report = read_prompts(reader, overrides)
            return list(prompts), report


def _no_kind(
    columns: Sequence[str], overrides: Mapping[str, str], refused: Mapping[str, DataError], source: str
) -> DataError:
    """The error of the reader that the user's own roles are meant for; without any, of all of them in one."""
    if overrides:
        known = {
            "labeled": set(formats.ROLES),
            "comparisons": set(preference_formats.NAMES),
            "thumbs": set(thumbs.NAMES),
            "language": set(supervised_rows.NAMES),
        }
        meant = max(known, key=lambda name: len(set(overrides) & known[name]))
        return refused[meant]
    if candidates(columns, LABEL_TIERS) or likely(columns, TEXT_TIERS) is not None:
        return refused["labeled"]
    doubtful = [error for error in refused.values() if "columns may be the" in str(error) or "formats:" in str(error)]
    if doubtful:
        return doubtful[0]
    actual = f"no columns of a known kind of data; there: {listed(columns)}"
    hint = "name them, as in --columns text=COLUMN --columns label=COLUMN. In CSV the first line must be the header"
    return DataError([Diagnostic(source, None, None, "columns", actual, f"columns such as {_EXPECTED}", hint)])
