"""`loopos data preview`: the first training rows as the model will see them.

Prints the tokens of each row, which of them are pooled or cut, its length and its encoded label; then the counts of all
rows: read = used + dropped. Marks carry all information that colors do: pooled tokens are in [brackets], others bare,
cut ones in ~tildes~. Language models: `language_preview`; comparisons and prompts: `preference_preview`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from loopos.cli import configs
from loopos.cli.quiet import hush_libraries
from loopos.cli.token_marks import token_text
from loopos.config.diagnostics import printable
from loopos.config.methods import method_row

POOLED, UNPOOLED, CUT = "pooled", "unpooled", "cut"
_STYLES = {POOLED: "green", UNPOOLED: "", CUT: "red strike"}
_MARKS = {POOLED: ("[", "]"), UNPOOLED: ("", " "), CUT: ("~", "~")}


@dataclass(frozen=True, slots=True)
class ShownToken:
    """One token: its text, its id and its fate."""

    text: str
    token: int
    fate: str


def run(path: Path, overrides: Sequence[str], *, num_rows: int, trust_remote_code: bool, verbose: bool) -> int:
    """Prints the preview. Raises `UserError`, as training would."""
    config: Any = configs.read(path, overrides).config
    hush_libraries(verbose=verbose)
    reads = method_row(config.computation.method).reads
    if "comparisons" in reads or "prompts" in reads:
        from loopos.cli import preference_preview

        return preference_preview.run(config, num_rows=num_rows, trust_remote_code=trust_remote_code)
    if "labeled" not in reads:
        from loopos.cli import language_preview

        return language_preview.run(config, num_rows=num_rows, trust_remote_code=trust_remote_code)
    from loopos.data.reading import account
    from loopos.data.tokens import encode_labeled
    from loopos.models.task_layout import default_pooling
    from loopos.planning.work import open_inputs

    inputs = open_inputs(config, trust_remote_code=trust_remote_code)
    pooling = config.model.pooling if config.model.pooling != "auto" else default_pooling(inputs.architecture)
    console = Console(highlight=False, soft_wrap=True)
    shown = inputs.data.train[:num_rows]
    whole, _ = encode_labeled(inputs.tokenizer, shown, max_length=None)
    for example, encoded, uncut, target in zip(
        shown, inputs.train, whole, inputs.data.train_targets[:num_rows], strict=False
    ):
        line = f":{example.row.line}" if example.row.line is not None else f" (row {example.row.index})"
        console.print(Text(printable(f"{example.row.source}{line}"), style="bold"))
        console.print(rendered(shown_tokens(inputs.tokenizer, uncut.ids, encoded.ids, pooling)))
        cut = f", {encoded.cut} cut at {inputs.max_length}" if encoded.cut else ""
        console.print(Text(f"{len(encoded.ids)} tokens{cut} · label {example.label!r} -> {target}\n"))
    console.print(Text(f"[pooled] by {pooling} · bare: read, not pooled · ~cut~"))
    console.print(Text(f"train: {inputs.train_report.summary()}"))
    if inputs.validation:
        console.print(Text(f"validation: {inputs.validation_report.summary()}"))
    for report in inputs.data.reports:
        console.print(Text(account(report)))
    return 0


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


def rendered(tokens: Iterator[ShownToken]) -> Text:
    """Tokens side by side, each with its marks and color."""
    line = Text()
    for token in tokens:
        before, after = _MARKS[token.fate]
        line.append(f"{before}{token.text}{after}", style=_STYLES[token.fate])
    return line
