"""The text of a completion as it grows, and the stop strings in it.

Enters: token ids one at a time. Leaves: text that will not change any more, the place of a stop string, and where each
token ends in the text. Left out: stop tokens and limits (`engine.py`).

A completion: while it runs, and when it is done.

Enters: one chosen token after another. Leaves: `Completion` and, for streaming, `Piece`. Here is decided when a
completion ends, and what a guide's verdict does to it. Left out: choosing the tokens (`sampling.py`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from transformers import PreTrainedTokenizerBase

from loopos.generation.settings import SamplingSettings

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


FinishReason = Literal["stop token", "stop string", "length", "guide", "cancelled", "failed"]
"""The last two end a completion of a `Scheduler` alone: it was cancelled, or the model gave it no token to choose."""


@dataclass(frozen=True)
class Completion:
    """What a prompt became.

    `token_ids`: all new tokens, the stop token included. `text`: theirs, without the stop token, cut before the stop
    string unless `keep_stop`. `logprobs`: of each token under softmax(logits / temperature), empty where not asked for;
    `filtered_logprobs`: under the distribution that was drawn from, None where it is the same. `actual`: places of
    tokens that a guide wrote; their logprob is 0.
    """

    prompt_index: int
    sample_index: int
    token_ids: list[int]
    text: str
    logprobs: list[float]
    filtered_logprobs: list[float] | None
    actual: tuple[int, ...]
    finish_reason: FinishReason


@dataclass(frozen=True)
class Piece:
    """One token of a stream. `text` may be empty (a character's first bytes, what may become a stop string) or hold
    what was held back before. `finish_reason` is None but for the completion's last token.
    """

    prompt_index: int
    sample_index: int
    token: int
    text: str
    logprob: float
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class Verdict:
    """What a guide wants: keep the first `keep` tokens (None = all), write `written` next, or end here."""

    keep: int | None = None
    written: str = ""
    finish: bool = False


class Guide(Protocol):
    """Watches one completion and steers it."""

    def after(self, text: GrowingText, tokens: Sequence[int], *, ended: bool) -> Verdict | None:
        """Called after each chosen token, and after the last of the tokens that it had written. `ended`: the token was
        a stop token (which `text` does not hold).
        """
        ...


class Running:
    """A completion that is being made."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_index: int,
        sample_index: int,
        prompt: list[int],
        settings: SamplingSettings,
        *,
        choice: SamplingSettings,
        limit: int,
        key: int,
        stop_ids: frozenset[int],
    ) -> None:
        """choice: what `settings.of_choice()` is, the same object for all rows where it is equal; limit: the most new
        tokens; key: of its stream of uniform numbers.
        """
        self._tokenizer, self._settings, self._stop_ids = tokenizer, settings, stop_ids
        self.prompt_index, self.sample_index = prompt_index, sample_index
        self.prompt, self.choice, self.limit, self.key = prompt, choice, limit, key
        self.draws = 0
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._logprobs: list[float] = []
        self._filtered: list[float] = []
        self._actual: list[int] = []
        self._written: deque[int] = deque()
        self._text: GrowingText | None = None
        self._guide: Guide | None = None
        self._told = 0
        self._tracked = False

    def watch(self, text: bool, guide: Guide | None) -> None:
        """Keeps the text up to date (stop strings, streams, guides need it)."""
        self._guide = guide
        if text or guide is not None:
            self._text = GrowingText(self._tokenizer, self._settings.stop)

    def take(self, token: int, logprob: float | None, filtered: float | None) -> int | None:
        """Appends the chosen token, or the one that the guide wrote in its place. Returns the length that the row must
        be cut to where tokens were taken back.
        """
        self._tracked = logprob is not None
        if self._written:
            self._append_actual(self._written.popleft())
        else:
            self.tokens.append(token)
            if logprob is not None:
                self._logprobs.append(logprob)
            if filtered is not None:
                self._filtered.append(filtered)
            elif logprob is not None:
                self._filtered.append(logprob)
        return self._judge()

    def piece(self) -> Piece:
        """What the last token added to the stream."""
        assert self._text is not None
        sure = self._final_text() if self.finish_reason else self._text.text[: self._text.final_length()]
        new, self._told = sure[self._told :], len(sure)
        return Piece(self.prompt_index, self.sample_index, self.tokens[-1], new, self._logprobs[-1], self.finish_reason)

    def completion(self) -> Completion:
        assert self.finish_reason is not None, "a completion that is still being made"
        return Completion(
            self.prompt_index,
            self.sample_index,
            self.tokens,
            self._final_text(),
            self._logprobs,
            self._filtered if self._filtered and self.choice.shaped and not self.choice.greedy else None,
            tuple(self._actual),
            self.finish_reason,
        )

    def _final_text(self) -> str:
        if self._text is None:
            return decoded(self._tokenizer, self.tokens[: -1 if self.finish_reason == "stop token" else None])
        self._text.finish()
        if self._text.stopped_at is None:
            return self._text.text
        start, end = self._text.stopped_at
        return self._text.text[: end if self._settings.keep_stop else start]

    def _append_actual(self, token: int) -> None:
        self._actual.append(len(self.tokens))
        self.tokens.append(token)
        self._logprobs += [0.0] * (len(self.tokens) - len(self._logprobs)) if self._tracked else []
        self._filtered += [0.0] * (len(self.tokens) - len(self._filtered)) if self._tracked else []

    def _judge(self) -> int | None:
        """Whether the last token ends the completion; the length to cut the row to, if the guide takes tokens back."""
        ended = self.tokens[-1] in self._stop_ids
        if self._text is not None and not ended:
            self._text.add(self.tokens[-1])
        if self._guide is not None and not self._written:
            assert self._text is not None
            verdict = self._guide.after(self._text, self.tokens, ended=ended)
            if verdict is not None:
                return self._obey(verdict)
        if ended:
            self.finish_reason = "stop token"
        elif self._text is not None and self._text.stopped_at is not None:
            self.finish_reason = "stop string"
        elif len(self.tokens) >= self.limit:
            self.finish_reason = "length"
        return None

    def _obey(self, verdict: Verdict) -> int | None:
        self._written.extend(self._tokenizer.encode(verdict.written, add_special_tokens=False))
        cut = None
        if verdict.keep is not None and verdict.keep < len(self.tokens):
            cut = len(self.prompt) + verdict.keep
            self._forget(verdict.keep)
        if verdict.finish:
            self.finish_reason = "guide"
        elif len(self.tokens) >= self.limit:
            self.finish_reason = "length"
        elif cut is not None:
            # The next token to feed must be there already: the row's last one has been fed before.
            assert self._written, "a guide that takes tokens back writes others"
            self._append_actual(self._written.popleft())
            further = self._judge()
            assert further is None, "a guide took back what it had just written"
        return cut

    def _forget(self, keep: int) -> None:
        for values in (self.tokens, self._logprobs, self._filtered):
            del values[keep:]
        self._actual = [place for place in self._actual if place < keep]
        self._text = GrowingText(self._tokenizer, self._settings.stop)
        for token in self.tokens:
            self._text.add(token)
