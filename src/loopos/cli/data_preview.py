"""`loopos data preview`: the first training rows as the model will see them. Apart from `data`, which starts without
torch.

Prints the tokens of each row, which of them are learned or pooled, context or cut, its length, its label, weights or
preference, and why it is cut or dropped; then the counts of all rows: read = used + dropped. Marks carry all
information that colors do: learned and pooled tokens and responses are in [brackets], others bare, cut ones in
~tildes~.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.text import Text

from loopos.config.diagnostics import DataError, UserError, printable
from loopos.config.fine_tuning import FineTuningConfig
from loopos.config.methods import method_row
from loopos.config.ppo import PpoConfig
from loopos.config.preference import PreferenceConfig
from loopos.config.pretraining import PretrainingConfig
from loopos.config.reward_model import RewardModelConfig
from loopos.config.sft import SftConfig
from loopos.data.conversations import Conversation
from loopos.data.preference_tokens import (
    NO_ROOM,
    PROMPT_OVER,
    SAME_TOKENS,
    EncodedComparison,
    PreferenceEncoder,
    encode_comparisons,
    encode_prompts,
)
from loopos.data.preferences import Comparison, Pair
from loopos.data.prompts import Prompt, distinct_prompts
from loopos.data.rows import Row
from loopos.data.stepwise_tokens import EncodedStepwise, encode_stepwise
from loopos.data.supervised_rows import Example
from loopos.data.supervised_tokens import Supervised, encode_supervised
from loopos.data.template_checks import num_shared
from loopos.data.tokens import encode_labeled
from loopos.data.tool_schemas import call_names
from loopos.models.task_layout import default_pooling
from loopos.planning.work import (
    PromptInputs,
    StepwiseInputs,
    open_comparisons,
    open_inputs,
    open_pretraining,
    open_prompts,
    open_supervised,
)

POOLED, UNPOOLED = "pooled", "unpooled"
LEARNED, CONTEXT, CUT = "learned", "context", "cut"
_STYLES = {POOLED: "green", UNPOOLED: "", LEARNED: "green", CONTEXT: "", CUT: "red strike"}
_MARKS = {POOLED: ("[", "]"), UNPOOLED: ("", " "), LEARNED: ("[", "]"), CONTEXT: ("", ""), CUT: ("~", "~")}
_LEGEND = "[learned] · bare: context, not learned · ~cut~ · | separates tokens"
_COMPARISON_LEGEND = "[response] · bare: prompt of all responses, turns of others · ~cut~ · | separates tokens"
_STEP_LEGEND = "[token that scores a labeled step] · bare: context · ~cut~ · | separates tokens"
_PROMPT_LEGEND = "bare: prompt, which the policy answers · ~dropped~ · | separates tokens"
_INDENT = " " * 10


@dataclass(frozen=True, slots=True)
class ShownToken:
    """One token: its text, its id and its fate."""

    text: str
    token: int
    fate: str


def show(config: Any, *, num_rows: int, trust_remote_code: bool) -> None:
    """Prints the preview, by the kind of rows that each phase of the method reads. Raises `UserError`, as training
    would, after the rows that can be shown, and for a method that does not say what it reads.
    """
    console = Console(highlight=False, soft_wrap=True)
    for number, phase in enumerate(config.phases):
        reads = method_row(phase.computation.method).reads
        preview = next((function for kind, function in _PREVIEWS.items() if kind in reads), None)
        if preview is None:
            name = phase.computation.method
            raise UserError(f'the method "{name}" does not say what it reads, so that its rows cannot be shown')
        if number:
            console.print(Text("\nprompts that the policy answers", style="bold"))
            # Prompts of the preference data were just shown.
            num_rows = num_rows if config.data.prompts is not None else 0
        preview(phase, console, num_rows, trust_remote_code=trust_remote_code)


def _labeled(config: FineTuningConfig, console: Console, num_rows: int, *, trust_remote_code: bool) -> None:
    inputs = open_inputs(config, trust_remote_code=trust_remote_code)
    pooling = config.model.pooling if config.model.pooling != "auto" else default_pooling(inputs.architecture)
    shown = inputs.data.train[:num_rows]
    whole, _ = encode_labeled(inputs.tokenizer, shown, max_length=None)
    for example, encoded, uncut, target in zip(
        shown, inputs.train, whole, inputs.data.train_targets[:num_rows], strict=False
    ):
        console.print(_row_location(example.row))
        console.print(pooled_text(shown_tokens(inputs.tokenizer, uncut.ids, encoded.ids, pooling)))
        cut = f", {encoded.cut} cut at {inputs.max_length}" if encoded.cut else ""
        console.print(Text(f"{len(encoded.ids)} tokens{cut} · label {example.label!r} -> {target}\n"))
    console.print(Text(f"[pooled] by {pooling} · bare: read, not pooled · ~cut~"))
    console.print(Text(f"train: {inputs.train_report.summary()}"))
    if inputs.validation:
        console.print(Text(f"validation: {inputs.validation_report.summary()}"))
    for report in inputs.data.reports:
        console.print(Text(report.summary()))


def shown_tokens(tokenizer: Any, whole: Sequence[int], used: Sequence[int], pooling: str) -> Iterator[ShownToken]:
    """The tokens of one example in order. whole: ids before cutting; used: ids after it, a subsequence of `whole`."""
    pooled = {"first": {0}, "last": {len(used) - 1}}.get(pooling, set(range(len(used))))
    position = 0
    for kind, start, end, _, _ in SequenceMatcher(None, whole, used, autojunk=False).get_opcodes():
        assert kind in ("equal", "delete"), f"cutting only removes tokens, met {kind}"
        for token in whole[start:end]:
            fate = CUT if kind == "delete" else POOLED if position in pooled else UNPOOLED
            position += kind == "equal"
            yield ShownToken(token_text(tokenizer, token), token, fate)


def pooled_text(tokens: Iterator[ShownToken]) -> Text:
    """Tokens side by side, each with its marks and color."""
    line = Text()
    for token in tokens:
        before, after = _MARKS[token.fate]
        line.append(f"{before}{token.text}{after}", style=_STYLES[token.fate])
    return line


def token_text(tokenizer: Any, token: int) -> str:
    """A token as readable text; if its bytes are no whole characters, as the vocabulary writes it."""
    text: str = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    if not text or "\N{REPLACEMENT CHARACTER}" in text:
        text = str(tokenizer.convert_ids_to_tokens(token))
    return printable(text.replace(" ", "·").replace("\n", "\\n").replace("\t", "\\t"))


def marked_text(tokenizer: Any, ids: Sequence[int], token_fates: Sequence[str]) -> Text:
    """Tokens side by side, separated by |, each run of one fate in its marks and color."""
    line = Text()
    for fate, run_of in groupby(zip(ids, token_fates, strict=True), key=lambda pair: pair[1]):
        before, after = _MARKS[fate]
        joined_text = "|".join(token_text(tokenizer, token) for token, _ in run_of)
        line.append(f"{before}{joined_text}{after}", style=_STYLES[fate])
    return line


def _supervised(config: SftConfig, console: Console, num_rows: int, *, trust_remote_code: bool) -> None:
    inputs = open_supervised(config, trust_remote_code=trust_remote_code)
    encoder, section = inputs.encoder, config.data
    for example in inputs.data.train[:num_rows]:
        console.print(_row_location(example.row))
        try:
            # Without a length limit, so that cut tokens can be shown.
            (row,), _ = encode_supervised(
                encoder.tokenizer,
                [example],
                step_format=encoder.step_format,
                train_on=section.train_on,
                max_length=None,
                template=encoder.template,
            )
        except DataError as error:
            console.print(Text(f"dropped: {error}\n", style="red"))
            continue
        num_used, fate = _fate(row, encoder.max_length, section.over_length)
        console.print(marked_text(encoder.tokenizer, row.ids, fates(row.mask, num_used)))
        console.print(Text(printable(f"{_counts(row, num_used)}{fate}{_tools(example)}\n")))
    console.print(Text(_LEGEND))
    for sentence in (*inputs.data.summary, encoder.template.summary):
        console.print(Text(printable(sentence)))
    # Last, because it raises if too many rows are dropped, as training would.
    for name, examples in (("train", inputs.data.train), ("validation", inputs.data.validation)):
        if examples and (name == "train" or config.validates):
            console.print(Text(f"{name}: {_summary(encoder, examples)}"))


def _summary(encoder: Any, examples: Sequence[Example]) -> str:
    summary: str = encoder(examples)[1].summary()
    return summary


def _fate(row: Supervised, max_length: int | None, over_length: str) -> tuple[int, str]:
    """The number of tokens used from a row, and a note if it is too long."""
    if max_length is None or len(row.ids) <= max_length:
        return len(row.ids), ""
    if over_length == "cut":
        learned = any(row.mask[:max_length])
        return max_length, f" · {len(row.ids) - max_length} cut at {max_length}" + (
            "" if learned else " · dropped: no trained token"
        )
    why = "an error" if over_length == "error" else "dropped"
    return 0, f" · {why}: over max_length {max_length}"


def _counts(row: Supervised, num_used: int) -> str:
    """Length, learned tokens, and weights other than 1."""
    summary = f"{len(row.ids)} tokens, {sum(row.mask[:num_used])} learned"
    if row.weights is not None:
        others = sorted({weight for weight in row.weights[:num_used] if weight not in (0.0, 1.0)})
        summary += "".join(f", {row.weights[:num_used].count(weight)} with weight {weight:g}" for weight in others)
    return summary


def _tools(example: Example) -> str:
    """The tools of a conversation, and the calls of them in its turns."""
    if not isinstance(example, Conversation):
        return ""
    calls = [name for message in example.messages for name in call_names(message.more)]
    names = [str(tool["function"]["name"]) for tool in example.tools]
    return (f" · tools: {', '.join(names)}" if names else "") + (f" · calls: {', '.join(calls)}" if calls else "")


def fates(mask: Sequence[bool], num_used: int) -> list[str]:
    """The fate of each token; tokens after the first `num_used` are cut."""
    return [CUT if index >= num_used else LEARNED if learned else CONTEXT for index, learned in enumerate(mask)]


def _pretraining(config: PretrainingConfig, console: Console, num_rows: int, *, trust_remote_code: bool) -> None:
    pretrainer = open_pretraining(config, trust_remote_code=trust_remote_code)
    for number, chunk in enumerate(pretrainer.pieces[:num_rows], start=1):
        console.print(Text(f"chunk {number}, of document {chunk.index + 1}", style="bold"))
        mask = [position > 0 for position in range(len(chunk.ids))]
        console.print(marked_text(pretrainer.tokenizer, chunk.ids, fates(mask, len(mask))))
        console.print(Text(f"{len(chunk.ids)} tokens, {len(chunk.ids) - 1} learned\n"))
    console.print(Text(_LEGEND))
    for name, chunks in (("train", pretrainer.pieces), ("validation", pretrainer.validation_pieces)):
        tokens = sum(len(chunk.ids) for chunk in chunks)
        console.print(Text(f"{name}: {len(chunks):,} chunks of at most {pretrainer.max_length}, {tokens:,} tokens"))


def _comparisons(
    config: RewardModelConfig | PreferenceConfig, console: Console, num_rows: int, *, trust_remote_code: bool
) -> None:
    inputs = open_comparisons(config, trust_remote_code=trust_remote_code)
    if isinstance(inputs, StepwiseInputs):
        assert isinstance(config, RewardModelConfig), "only a reward model reads step labels"
        _stepwise(config, inputs, console, num_rows)
        return
    encoder = inputs.encoder
    if isinstance(config, PreferenceConfig) and config.online is not None:
        encoder, prompts = encoder.leaving_room(config.online.max_new_tokens), distinct_prompts(inputs.data.train)
        _show_prompts(config, console, encoder, prompts[:num_rows], config.online.max_new_tokens)
        report = encoder.prompts(prompts)[1]
        for sentence in (_PROMPT_LEGEND, *inputs.data.summary, encoder.template.summary, f"train: {report.summary()}"):
            console.print(Text(printable(sentence)))
        return
    for number, example in enumerate(inputs.data.train[:num_rows]):
        console.print(_row_location(example.row))
        try:
            # Without a length limit, so that cut tokens can be shown.
            (whole,), _ = encode_comparisons(encoder.tokenizer, [example], template=encoder.template, max_length=None)
        except DataError as error:
            console.print(Text(f"dropped: {error}\n", style="red"))
            continue
        thumbs = None if inputs.thumbs is None else inputs.thumbs[number]
        names = preferences_of(whole.pairs, len(whole.responses)) if thumbs is None else _thumbs(thumbs)
        _show(console, encoder, whole, example, config.data.over_length, names)
    console.print(Text(_COMPARISON_LEGEND))
    for sentence in (*inputs.data.summary, encoder.template.summary):
        console.print(Text(printable(sentence)))
    # Last, because it raises if too many rows are dropped, as training would.
    console.print(Text(f"train: {encoder.comparisons(inputs.data.train)[1].summary()}"))
    if config.validates and inputs.data.validation:
        console.print(Text(f"validation: {encoder.comparisons(inputs.data.validation)[1].summary()}"))


def _stepwise(config: RewardModelConfig, inputs: StepwiseInputs, console: Console, num_rows: int) -> None:
    """Answers with step labels."""
    encoder = inputs.encoder
    for example in inputs.data.train[:num_rows]:
        console.print(_row_location(example.row))
        try:
            (whole,), _ = encode_stepwise(
                encoder.tokenizer,
                [example],
                separator=inputs.rows.process.step_separator,
                template=encoder.template,
                max_length=None,
            )
        except DataError as error:
            console.print(Text(f"dropped: {error}\n", style="red"))
            continue
        _show_steps(console, encoder, whole, config.data.over_length)
    console.print(Text(_STEP_LEGEND))
    for sentence in (*inputs.data.summary, encoder.template.summary):
        console.print(Text(printable(sentence)))
    console.print(Text(f"train: {inputs.rows.encode(inputs.data.train)[1].summary()}"))
    if config.validates and inputs.data.validation:
        console.print(Text(f"validation: {inputs.rows.encode(inputs.data.validation)[1].summary()}"))


def _show_steps(console: Console, encoder: PreferenceEncoder, whole: EncodedStepwise, over_length: str) -> None:
    """One answer: the prompt, then its steps, each with the token that scores it and its label."""
    limit, is_over = encoder.max_length, encoder.max_length is not None and len(whole.ids) > encoder.max_length
    ends = [end for end in whole.ends if limit is None or end < limit] if over_length == "cut" or not is_over else []
    used = ends[-1] + 1 if ends else 0
    scored = {end for end, label in zip(whole.ends, whole.labels, strict=True) if label is not None}
    console.print(marked_text(encoder.tokenizer, whole.ids, fates([i in scored for i in range(len(whole.ids))], used)))
    labels = ", ".join("none" if label is None else f"{label:g}" for label in whole.labels)
    why = {"drop": "dropped", "error": "an error", "cut": f"cut after {len(ends)} steps"}[over_length]
    fate = f" · {why}: over max_length {limit}" if is_over else ""
    console.print(Text(f"{len(whole.ids)} tokens, {len(whole.ends)} steps · labels {labels}{fate}\n"))


def _thumbs(desirable: Sequence[bool]) -> list[tuple[str, str]]:
    """The name of each answer with a thumb."""
    return [("up" if each else "down", "") for each in desirable]


def _show(
    console: Console,
    encoder: PreferenceEncoder,
    whole: EncodedComparison,
    example: Comparison,
    over_length: str,
    names: Sequence[tuple[str, str]],
) -> None:
    """One comparison: the prompt, then its responses, each with its name, length and preference."""
    tokenizer = encoder.tokenizer
    num_used, fate = response_fates(whole, encoder.max_length, over_length)
    # A dropped comparison drops its prompt too.
    context = [CONTEXT if any(num_used) else CUT] * len(whole.prompt)
    if over_length == "cut_prompt" and encoder.max_length is not None:
        num_used, context, fate = _prompt_fates(encoder, whole, example)
    console.print(_line("prompt", marked_text(tokenizer, whole.prompt, context)))
    for number, ((name, judged), response, length) in enumerate(zip(names, whole.responses, num_used, strict=True)):
        own = set(whole.counted(number))
        marks = [CUT if at >= length else LEARNED if at in own else CONTEXT for at in range(len(response))]
        console.print(_line(name, marked_text(tokenizer, response, marks)))
        cut = f", {len(response) - length} cut" if 0 < length < len(response) else ""
        console.print(Text(f"{_INDENT}{len(response)} tokens{cut}{judged}"))
    if len(whole.pairs) > 1:
        console.print(_line("pairs", Text("; ".join(map(_pair, whole.pairs)))))
    console.print(Text(f"{_INDENT}{len(whole.prompt)} tokens of prompt, {whole.num_tokens} in all{fate}\n"))


def _prompt_fates(
    encoder: PreferenceEncoder, whole: EncodedComparison, example: Comparison
) -> tuple[list[int], list[str], str]:
    """Where a prompt may be cut from the left: the tokens used from each response, the fate of each token of the
    prompt, and a note.
    """
    lengths, size = list(map(len, whole.responses)), len(whole.prompt)
    try:
        (used,), report = encoder.comparisons([example])
    except DataError:
        return [0] * len(lengths), [CUT] * size, f" · dropped: {NO_ROOM}, over max_length {encoder.max_length}"
    if not report.cut:
        return lengths, [CONTEXT] * size, ""
    head = num_shared(whole.prompt, used.prompt)
    marks = [CONTEXT] * head + [CUT] * report.tokens_cut + [CONTEXT] * (size - head - report.tokens_cut)
    return lengths, marks[:size], f" · {report.tokens_cut} tokens of the prompt cut at {encoder.max_length}"


def response_fates(whole: EncodedComparison, max_length: int | None, over_length: str) -> tuple[list[int], str]:
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
    _show_prompts(config, console, inputs.encoder, inputs.data.train[:num_rows], config.generation.max_new_tokens)
    _account(console, inputs, shows_legend=num_rows > 0)


def _show_prompts(
    config: PpoConfig | PreferenceConfig,
    console: Console,
    encoder: PreferenceEncoder,
    prompts: Sequence[Prompt],
    new_tokens: int,
) -> None:
    """The tokens of prompts. encoder: with the limit that leaves room for `new_tokens`."""
    for example in prompts:
        console.print(_row_location(example.row))
        try:
            (ids,), _ = encode_prompts(encoder.tokenizer, [example], template=encoder.template, max_length=None)
        except DataError as error:
            console.print(Text(f"dropped: {error}\n", style="red"))
            continue
        is_over = encoder.max_length is not None and len(ids) > encoder.max_length
        console.print(marked_text(encoder.tokenizer, ids, [CUT if is_over else CONTEXT] * len(ids)))
        why = "an error" if config.data.over_length == "error" else "dropped"
        fate = f" · {why}: over {encoder.max_length}, the maximum that leaves room for a response" if is_over else ""
        console.print(Text(f"{len(ids)} tokens, answered by at most {new_tokens}{fate}\n"))


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


_PREVIEWS: Mapping[str, Callable[..., None]] = {
    "labeled": _labeled,
    "text": _pretraining,
    "prompts": _prompts,
    "comparisons": _comparisons,
    "judgments": _comparisons,
    "thumbs": _comparisons,
    "demonstrations": _supervised,
}
"""Kind of rows → what shows them."""
