"""`loopos data preview` for comparisons and prompts.

Prints, for each comparison, the tokens of the prompt and of each response, chosen or rejected, with probability and
margin, and what is cut or dropped; for PPO the prompts; then the counts of all rows: read = used + dropped. Marks are
those of `token_marks`: responses are in [brackets].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from loopos.cli.token_marks import CONTEXT, CUT, LEARNED, rendered
from loopos.config.diagnostics import DataError, printable
from loopos.config.methods import method_row
from loopos.config.ppo import PpoConfig
from loopos.config.reward_model import RewardModelConfig
from loopos.data.preference_tokens import (
    PROMPT_OVER,
    SAME_TOKENS,
    EncodedComparison,
    encode_comparisons,
    encode_prompts,
)
from loopos.data.preferences import Pair
from loopos.data.rows import Row
from loopos.planning.work import PromptInputs, open_comparisons, open_prompts

_COMPARISON_LEGEND = "[response] · bare: prompt, shared by all responses · ~cut~ · | separates tokens"
_PROMPT_LEGEND = "bare: prompt, which the policy answers · ~dropped~ · | separates tokens"
_INDENT = " " * 10


def run(config: Any, *, num_rows: int, trust_remote_code: bool) -> int:
    """Prints the preview. Raises `UserError`, as training would, after the rows that can be shown."""
    console = Console(highlight=False, soft_wrap=True)
    *earlier, last = config.phases
    for phase in earlier:
        _comparisons(phase, console, num_rows, trust_remote_code=trust_remote_code)
        console.print(Text("\nprompts that the policy answers", style="bold"))
        # Prompts of the preference data were just shown.
        num_rows = num_rows if config.data.prompts is not None else 0
    preview = _prompts if "prompts" in method_row(last.computation.method).reads else _comparisons
    preview(last, console, num_rows, trust_remote_code=trust_remote_code)
    return 0


def _comparisons(config: RewardModelConfig, console: Console, num_rows: int, *, trust_remote_code: bool) -> None:
    inputs = open_comparisons(config, trust_remote_code=trust_remote_code)
    encoder = inputs.encoder
    for example in inputs.data.train[:num_rows]:
        console.print(_row_location(example.row))
        try:
            # Without a length limit, so that cut tokens can be shown.
            (whole,), _ = encode_comparisons(encoder.tokenizer, [example], template=encoder.template, max_length=None)
        except DataError as error:
            console.print(Text(f"dropped: {error}\n", style="red"))
            continue
        _show(console, encoder.tokenizer, whole, encoder.max_length, config.data.over_length)
    console.print(Text(_COMPARISON_LEGEND))
    for sentence in (*inputs.data.summary, encoder.template.summary):
        console.print(Text(printable(sentence)))
    # Last, because it raises if too many rows are dropped, as training would.
    console.print(Text(f"train: {encoder.comparisons(inputs.data.train)[1].summary()}"))
    if config.validates and inputs.data.validation:
        console.print(Text(f"validation: {encoder.comparisons(inputs.data.validation)[1].summary()}"))


def _show(console: Console, tokenizer: Any, whole: EncodedComparison, max_length: int | None, over_length: str) -> None:
    """One comparison: the prompt, then its responses, each with its length and its preference."""
    num_used, fate = fates(whole, max_length, over_length)
    # A dropped comparison drops its prompt too.
    context = CONTEXT if any(num_used) else CUT
    console.print(_line("prompt", rendered(tokenizer, whole.prompt, [context] * len(whole.prompt))))
    names = preferences_of(whole.pairs, len(whole.responses))
    for (name, judged), response, length in zip(names, whole.responses, num_used, strict=True):
        marks = [LEARNED] * length + [CUT] * (len(response) - length)
        console.print(_line(name, rendered(tokenizer, response, marks)))
        cut = f", {len(response) - length} cut" if 0 < length < len(response) else ""
        console.print(Text(f"{_INDENT}{len(response)} tokens{cut}{judged}"))
    if len(whole.responses) > 2:
        console.print(_line("pairs", Text("; ".join(map(_pair, whole.pairs)))))
    console.print(Text(f"{_INDENT}{len(whole.prompt)} tokens of prompt, {whole.num_tokens} in all{fate}\n"))


def fates(whole: EncodedComparison, max_length: int | None, over_length: str) -> tuple[list[int], str]:
    """The number of tokens used from each response, and a note if the comparison is too long."""
    lengths = list(map(len, whole.responses))
    none = [0] * len(lengths)
    if max_length is None or len(whole.prompt) + max(lengths) <= max_length:
        return lengths, ""
    if over_length != "cut":
        why = "an error" if over_length == "error" else "dropped"
        return none, f" · {why}: over max_length {max_length}"
    room = max_length - len(whole.prompt)
    if room <= 0:
        return none, f" · dropped: {PROMPT_OVER}"
    if len({tuple(response[:room]) for response in whole.responses}) < len(lengths):
        return none, f" · dropped: {SAME_TOKENS}, cut at {max_length}"
    return [min(length, room) for length in lengths], f" · cut at {max_length}"


def preferences_of(pairs: Sequence[Pair], num_responses: int) -> list[tuple[str, str]]:
    """The name and the preference of each response: chosen or rejected for two; a number for more, whose preferences
    `_pair` shows.
    """
    if num_responses > 2:
        return [(f"response {number}", "") for number in range(1, num_responses + 1)]
    (pair,) = pairs
    judged = f" · preferred with probability {pair.probability:g}, margin {pair.margin:g}"
    if pair.probability == 0.5:
        judged = f" · a tie: either with probability 0.5, margin {pair.margin:g}"
    named = {pair.better: ("chosen", judged), pair.worse: ("rejected", "")}
    return [named[index] for index in range(2)]


def _pair(pair: Pair) -> str:
    """One pair of many responses as text."""
    between = f"{pair.better + 1} {'=' if pair.probability == 0.5 else '>'} {pair.worse + 1}"
    return f"{between} (probability {pair.probability:g}, margin {pair.margin:g})"


def _prompts(config: PpoConfig, console: Console, num_rows: int, *, trust_remote_code: bool) -> None:
    inputs = open_prompts(config, trust_remote_code=trust_remote_code)
    encoder = inputs.encoder
    for example in inputs.data.train[:num_rows]:
        console.print(_row_location(example.row))
        try:
            (ids,), _ = encode_prompts(encoder.tokenizer, [example], template=encoder.template, max_length=None)
        except DataError as error:
            console.print(Text(f"dropped: {error}\n", style="red"))
            continue
        is_over = encoder.max_length is not None and len(ids) > encoder.max_length
        console.print(rendered(encoder.tokenizer, ids, [CUT if is_over else CONTEXT] * len(ids)))
        why = "an error" if config.data.over_length == "error" else "dropped"
        fate = f" · {why}: over {encoder.max_length}, the maximum that leaves room for a response" if is_over else ""
        console.print(Text(f"{len(ids)} tokens, answered by at most {config.generation.max_new_tokens}{fate}\n"))
    _account(console, inputs, shows_legend=num_rows > 0)


def _account(console: Console, inputs: PromptInputs, *, shows_legend: bool) -> None:
    encoder = inputs.encoder
    for sentence in (*([_PROMPT_LEGEND] if shows_legend else []), *inputs.data.summary, encoder.template.summary):
        console.print(Text(printable(sentence)))
    console.print(Text(f"train: {encoder.prompts(inputs.data.train)[1].summary()}"))
    if inputs.validation:
        console.print(Text(f"validation: {encoder.prompts(inputs.validation)[1].summary()}"))


def _row_location(row: Row) -> Text:
    line = f":{row.line}" if row.line is not None else f" (row {row.index})"
    return Text(printable(f"{row.source}{line}"), style="bold")


def _line(name: str, summary: Text) -> Text:
    """`summary` after its name, in one column with the others."""
    return Text(f"{name:<{len(_INDENT)}}").append_text(summary)
