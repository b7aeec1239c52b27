"""Tokens on a terminal: learned ones in [brackets], context bare, cut ones in ~tildes~, separated by |.

Colors repeat what the marks show. Used by the previews of language models, comparisons and prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich.text import Text

from loopos.config.diagnostics import printable

LEARNED, CONTEXT, CUT = "learned", "context", "cut"
_STYLES = {LEARNED: "green", CONTEXT: "", CUT: "red strike"}
_MARKS = {LEARNED: ("[", "]"), CONTEXT: ("", ""), CUT: ("~", "~")}


def token_text(tokenizer: Any, token: int) -> str:
    """A token as readable text; if its bytes are no whole characters, as the vocabulary writes it."""
    text: str = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    if not text or "\N{REPLACEMENT CHARACTER}" in text:
        text = str(tokenizer.convert_ids_to_tokens(token))
    return printable(text.replace(" ", "·").replace("\n", "\\n").replace("\t", "\\t"))


def rendered(tokenizer: Any, ids: Sequence[int], token_fates: Sequence[str]) -> Text:
    """Tokens side by side, separated by |, each run of one fate in its marks and color."""
    line = Text()
    for fate, run_of in groupby(zip(ids, token_fates, strict=True), key=lambda pair: pair[1]):
        before, after = _MARKS[fate]
        joined_text = "|".join(token_text(tokenizer, token) for token, _ in run_of)
        line.append(f"{before}{joined_text}{after}", style=_STYLES[fate])
    return line
