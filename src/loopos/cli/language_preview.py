"""`loopos data preview` for language models: which tokens are learned, which are context, which are cut.

Prints the tokens of each row, its length, weights other than 1, and why it is cut or dropped; then the counts of all
rows: read = used + dropped. Marks carry all information that colors do: runs of learned tokens are in [brackets],
context is bare, cut tokens are in ~tildes~.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from loopos.cli.token_marks import CONTEXT, CUT, LEARNED, rendered
from loopos.config.diagnostics import DataError, printable
from loopos.config.pretraining import PretrainingConfig
from loopos.config.sft import SftConfig
from loopos.data.supervised_rows import Example
from loopos.data.supervised_tokens import Supervised, encode_supervised
from loopos.planning.work import open_pretraining, open_supervised

_LEGEND = "[learned] · bare: context, not learned · ~cut~ · | separates tokens"


def run(config: SftConfig | PretrainingConfig, *, num_rows: int, trust_remote_code: bool) -> int:
    """Prints the preview. Raises `UserError`, as training would, after the rows that can be shown."""
    console = Console(highlight=False, soft_wrap=True)
    if isinstance(config, PretrainingConfig):
        _pretraining(config, console, num_rows, trust_remote_code=trust_remote_code)
    else:
        _supervised(config, console, num_rows, trust_remote_code=trust_remote_code)
    return 0


def _supervised(config: SftConfig, console: Console, num_rows: int, *, trust_remote_code: bool) -> None:
    inputs = open_supervised(config, trust_remote_code=trust_remote_code)
    encoder, section = inputs.encoder, config.data
    for example in inputs.data.train[:num_rows]:
        line = f":{example.row.line}" if example.row.line is not None else f" (row {example.row.index})"
        console.print(Text(printable(f"{example.row.source}{line}"), style="bold"))
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
        console.print(rendered(encoder.tokenizer, row.ids, fates(row.mask, num_used)))
        console.print(Text(f"{_counts(row, num_used)}{fate}\n"))
    console.print(Text(_LEGEND))
    for sentence in (*inputs.data.summary, encoder.template.summary):
        console.print(Text(printable(sentence)))
    # Last, because it raises if too many rows are dropped, as training would.
    for name, examples in (("train", inputs.data.train), ("validation", inputs.data.validation)):
        if examples and (name == "train" or config.validates):
            console.print(Text(f"{name}: {_account(encoder, examples)}"))


def _account(encoder: Any, examples: Sequence[Example]) -> str:
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


def fates(mask: Sequence[bool], num_used: int) -> list[str]:
    """The fate of each token; tokens after the first `num_used` are cut."""
    return [CUT if index >= num_used else LEARNED if learned else CONTEXT for index, learned in enumerate(mask)]


def _pretraining(config: PretrainingConfig, console: Console, num_rows: int, *, trust_remote_code: bool) -> None:
    pretrainer = open_pretraining(config, trust_remote_code=trust_remote_code)
    for number, chunk in enumerate(pretrainer.pieces[:num_rows], start=1):
        console.print(Text(f"chunk {number}, of document {chunk.index + 1}", style="bold"))
        mask = [position > 0 for position in range(len(chunk.ids))]
        console.print(rendered(pretrainer.tokenizer, chunk.ids, fates(mask, len(mask))))
        console.print(Text(f"{len(chunk.ids)} tokens, {len(chunk.ids) - 1} learned\n"))
    console.print(Text(_LEGEND))
    for name, chunks in (("train", pretrainer.pieces), ("validation", pretrainer.validation_pieces)):
        tokens = sum(len(chunk.ids) for chunk in chunks)
        console.print(Text(f"{name}: {len(chunks):,} chunks of at most {pretrainer.max_length}, {tokens:,} tokens"))
