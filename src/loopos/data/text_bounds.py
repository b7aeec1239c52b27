"""Texts that are far longer than a model reads → their beginnings, which give the same first tokens.

Enters: a tokenizer, a text, how many tokens of it are wanted. Leaves: the text, or a beginning of it that has more
tokens than that, the same ones. Tokenising 100 MB takes more than 20 GB of memory, to keep 256 tokens of it.

Why the tokens are equal: the text is cut before a blank that stands between two ASCII letters or digits. The
vocabulary is searched for a token that holds a letter or digit followed by a blank. Where there is none, no token
spans the cut; every merge of BPE makes a token of the vocabulary, so that no merge ever spanned it either, and both
sides are merged as if the other were not there. The likeliest split of a unigram model parts there as well, and
WordPiece never joins words. Where there is such a token, or another kind of tokenizer, texts are never cut.
Left out: how long a row may be (`tokens`, `supervised_tokens`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cached_property

from transformers import PreTrainedTokenizerBase

SHORT_CHARACTERS = 1 << 17
"""Texts up to this are tokenised whole, so that what is lost of them is counted exactly (characters)."""
CHARACTERS_PER_TOKEN = 32
"""Characters of the first try for each token that is wanted, doubled until it has that many."""
CHUNK_CHARACTERS = 1 << 22
"""Characters that are tokenised at a time, longer texts alone: some 200 bytes of memory each."""
_CUT = re.compile(r"[A-Za-z0-9](?= [A-Za-z0-9])")
_SPANS_CUT = re.compile(r"[A-Za-z0-9][ Ġ▁]")
_SEARCHED = 1 << 16
# What lies behind the tokens that are wanted: more than the longest look ahead of any splitting into words.
_MARGIN_TOKENS = 16
_KINDS = ("BPE", "Unigram", "WordPiece", "WordLevel")


class TextBound:
    """Cuts texts for one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def is_safe(self) -> bool:
        """Whether the tokens before a cut are those of the whole text: by the vocabulary, read once."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None or type(backend.model).__name__ not in _KINDS:
            return False
        return not any(_SPANS_CUT.search(token) for token in self.tokenizer.get_vocab())

    def beginning(self, text: str, num_tokens: int | None, *, short: int | None = None) -> str:
        """The beginning of a long text that has more than `num_tokens` tokens, those of the whole text; the text itself
        where it is short, may not be cut, or has nowhere to cut it. None: all tokens are wanted. short: characters up
        to which a text is left whole; `SHORT_CHARACTERS` when absent.
        """
        short = SHORT_CHARACTERS if short is None else short
        if num_tokens is None or len(text) <= short or not self.is_safe:
            return text
        size = max(CHARACTERS_PER_TOKEN * num_tokens, short)
        while size < len(text):
            cut = _CUT.search(text, size, size + _SEARCHED)
            if cut is not None:
                begun = text[: cut.end()]
                if self.count(begun) > num_tokens + _MARGIN_TOKENS:
                    return begun
            size *= 2
        return text

    def count(self, text: str) -> int:
        """The tokens of a text, without special ones."""
        batch = self.tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return len(batch["input_ids"])


def spans(sizes: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Begin and end of runs of neighbours: at most `most` of them, and at most `CHUNK_CHARACTERS` where one alone does
    not have more. sizes: characters of each.
    """
    first, total = 0, 0
    for place, size in enumerate(sizes):
        if place > first and (place - first == most or total + size > CHUNK_CHARACTERS):
            yield first, place
            first, total = place, 0
        total += size
    if first < len(sizes):
        yield first, len(sizes)
