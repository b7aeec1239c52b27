"""The text of a completion as it grows, and the stop strings in it.

Enters: token ids one at a time. Leaves: text that will not change any more, the place of a stop string, and where each
token ends in the text. Left out: stop tokens and limits (`engine.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

# What a decoder writes for bytes that are not (yet) a character.
_UNFINISHED = "\ufffd"


def silent_tokens(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> frozenset[int]:
    """The ids that are no text: the begin, end and pad tokens, but for those that a stop string holds. All other
    special tokens are text: step markers such as `<think>` are special tokens in many tokenizers.
    """
    silent = (
        (tokenizer.bos_token, tokenizer.bos_token_id),
        (tokenizer.eos_token, tokenizer.eos_token_id),
        (tokenizer.pad_token, tokenizer.pad_token_id),
    )
    return frozenset(
        int(number) for token, number in silent if token is not None and not any(token in string for string in stop)
    )


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], silent: frozenset[int] | None = None) -> str:
    """The text of these tokens without `silent` ones (None: those of `silent_tokens`), spaces as the tokens have
    them.
    """
    without = silent_tokens(tokenizer) if silent is None else silent
    kept = [each for each in ids if each not in without]
    text = tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


class GrowingText:
    """The text of a growing list of tokens, decoded a few tokens at a time.

    A token is decoded together with the tokens since the last but one end of a piece, so that decoders which look at
    the token before (leading spaces, byte fallback) give what they give for the whole list. Bytes that do not yet make
    a character are held back. `text` is what is there; `stopped_at` the (start, end) of the first stop string, or None.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop, self._silent = tokenizer, tuple(stop), silent_tokens(tokenizer, stop)
        self._longest_stop = max(map(len, self._stop), default=0)
        self._ids: list[int] = []
        self._context, self._read = 0, 0
        self._context_text = ""
        self._searched = 0
        self.text = ""
        self.ends: list[int] = []
        self.stopped_at: tuple[int, int] | None = None

    def add(self, token: int) -> None:
        """Appends one token; `ends` gets the length of the text after it."""
        self._ids.append(token)
        text = decoded(self._tokenizer, self._ids[self._context :], self._silent)
        if len(text) > len(self._context_text) and not text.endswith(_UNFINISHED):
            self._append(text)
        self.ends.append(len(self.text))

    def finish(self) -> None:
        """Takes what was held back as it is."""
        text = decoded(self._tokenizer, self._ids[self._context :], self._silent)
        if len(text) > len(self._context_text):
            self._append(text)
            if self.ends:
                self.ends[-1] = len(self.text)

    def final_length(self) -> int:
        """How much of the text no later token can take back: not the beginning of what may become a stop string."""
        if self.stopped_at is not None:
            return len(self.text)
        for length in range(min(self._longest_stop - 1, len(self.text)), 0, -1):
            end = self.text[-length:]
            if any(stop.startswith(end) for stop in self._stop):
                return len(self.text) - length
        return len(self.text)

    def _append(self, text: str) -> None:
        self.text += text[len(self._context_text) :]
        self._context, self._read = self._read, len(self._ids)
        self._context_text = decoded(self._tokenizer, self._ids[self._context : self._read], self._silent)
        if self._stop and self.stopped_at is None:
            self._search()

    def _search(self) -> None:
        found = [(self.text.find(stop, self._searched), stop) for stop in self._stop]
        places = [(start, start + len(stop)) for start, stop in found if start >= 0]
        if places:
            self.stopped_at = min(places)
        self._searched = max(self._searched, len(self.text) - self._longest_stop + 1)
