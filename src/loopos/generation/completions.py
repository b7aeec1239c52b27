"""Completions while they grow: text, stop strings, the reason to finish, token deltas for streaming, and guides.

`sampling.py` chooses the tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from transformers import PreTrainedTokenizerBase

from loopos.generation.grammars import Grammar
from loopos.generation.settings import SamplingParams

# Decoders write this for incomplete UTF-8.
_UNFINISHED = "\ufffd"


def silent_tokens(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> frozenset[int]:
    """Ids that have no text: begin, end and pad tokens, unless a stop string contains them. All other special tokens
    are text, because step markers such as `<think>` are special tokens in many tokenizers.
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
    """The text of these tokens without `silent` ones (None: those of `silent_tokens`), with the tokens' own spaces."""
    without = silent_tokens(tokenizer) if silent is None else silent
    visible = [each for each in ids if each not in without]
    text = tokenizer.decode(visible, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


class GrowingText:
    """The text of a growing list of tokens, decoded incrementally.

    Each token is decoded together with a few tokens before it, so that decoders that depend on the previous token
    (leading spaces, byte fallback) give the same text as for the whole list. Incomplete UTF-8 sequences are buffered.
    `text`: the text so far. `stopped_at`: (start, end) of the first stop string, or None.
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
        """Flushes buffered bytes."""
        text = decoded(self._tokenizer, self._ids[self._context :], self._silent)
        if len(text) > len(self._context_text):
            self._append(text)
            if self.ends:
                self.ends[-1] = len(self.text)

    def whole(self, *, keep_stop: bool) -> str:
        """The text when no token follows, cut before the first stop string or, with `keep_stop`, after it."""
        self.finish()
        if self.stopped_at is None:
            return self.text
        start, end = self.stopped_at
        return self.text[: end if keep_stop else start]

    def final_length(self) -> int:
        """Length of the text that no later token can change; excludes a suffix that may become a stop string."""
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
        matches = [(start, start + len(stop)) for start, stop in found if start >= 0]
        if matches:
            self.stopped_at = min(matches)
        self._searched = max(self._searched, len(self.text) - self._longest_stop + 1)


FinishReason = Literal["stop", "stop string", "length", "guide", "cancelled", "failed"]
"""The last two occur only with a `Scheduler`: the completion was cancelled, or its logits were not finite."""


@dataclass(frozen=True)
class Completion:
    """One completion of a prompt.

    `token_ids`: all new tokens, including the stop token. `text`: without the stop token, cut before the stop string
    unless `keep_stop`. `logprobs`: of each token under softmax(logits / temperature); empty if not requested.
    `filtered_logprobs`: under the distribution that was sampled, None if it is the same. `forced`: indices of tokens
    that a guide wrote, whose logprob is 0.
    """

    prompt_index: int
    sample_index: int
    token_ids: list[int]
    text: str
    logprobs: list[float]
    filtered_logprobs: list[float] | None
    forced: tuple[int, ...]
    finish_reason: FinishReason


@dataclass(frozen=True)
class TokenDelta:
    """One token of a stream. `text` may be empty (incomplete UTF-8, or a possible stop string) or include buffered
    text. `finish_reason` is set only with the completion's last token.
    """

    prompt_index: int
    sample_index: int
    token: int
    text: str
    logprob: float
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class Verdict:
    """A guide's decision: keep the first `keep` tokens (None = all), force the text `written` next, or finish."""

    keep: int | None = None
    written: str = ""
    finish: bool = False


class Guide(Protocol):
    """Watches one completion and steers it."""

    def after(self, text: GrowingText, tokens: Sequence[int], *, ended: bool) -> Verdict | None:
        """Called after each sampled token, and after the last of the forced tokens. `ended`: the token was a stop
        token, which `text` does not contain.
        """
        ...


@dataclass(frozen=True, slots=True)
class SampleId:
    """Which completion of a call: the index of its prompt and its own among those of the prompt. key: of its stream of
    uniform numbers.
    """

    prompt_index: int
    sample_index: int
    key: int


class Running:
    """A completion in progress."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        sample: SampleId,
        prompt: list[int],
        settings: SamplingParams,
        *,
        choice: SamplingParams,
        limit: int,
        stop_ids: frozenset[int],
    ) -> None:
        """choice: `settings.of_choice()`, the same object for all rows where it is equal. limit: maximum new tokens."""
        self._tokenizer, self._settings, self._stop_ids = tokenizer, settings, stop_ids
        self.prompt_index, self.sample_index, self.key = sample.prompt_index, sample.sample_index, sample.key
        self.prompt, self.choice, self.limit = prompt, choice, limit
        self.draws = 0
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._logprobs: list[float] = []
        self._filtered: list[float] = []
        self._forced: list[int] = []
        self._written: deque[int] = deque()
        self._text: GrowingText | None = None
        self._guide: Guide | None = None
        self.grammar: Grammar | None = None
        self._sent = 0
        self._tracked = False

    def watch(self, text: bool, guide: Guide | None) -> None:
        """Keeps the text up to date, for stop strings, streams and guides."""
        self._guide = guide
        if text or guide is not None:
            self._text = GrowingText(self._tokenizer, self._settings.stop)

    def take(self, token: int, logprob: float | None, filtered: float | None) -> int | None:
        """Appends the sampled token, or the next forced one instead. Returns the length to truncate the row to, if the
        guide took tokens back.
        """
        self._tracked = logprob is not None
        if self._written:
            self._append_forced(self._written.popleft())
        else:
            self.tokens.append(token)
            if self.grammar is not None:
                self.grammar.take(token)
            if logprob is not None:
                self._logprobs.append(logprob)
            if filtered is not None:
                self._filtered.append(filtered)
            elif logprob is not None:
                self._filtered.append(logprob)
        return self._check_end()

    def delta(self) -> TokenDelta:
        """What the last token added to the stream."""
        assert self._text is not None
        sure = self._final_text() if self.finish_reason else self._text.text[: self._text.final_length()]
        new, self._sent = sure[self._sent :], len(sure)
        return TokenDelta(
            self.prompt_index, self.sample_index, self.tokens[-1], new, self._logprobs[-1], self.finish_reason
        )

    def completion(self) -> Completion:
        assert self.finish_reason is not None, "the completion is not finished"
        return Completion(
            self.prompt_index,
            self.sample_index,
            self.tokens,
            self._final_text(),
            self._logprobs,
            self._filtered if self._filtered and self.choice.shaped and not self.choice.greedy else None,
            tuple(self._forced),
            self.finish_reason,
        )

    def _final_text(self) -> str:
        if self._text is None:
            return decoded(self._tokenizer, self.tokens[: -1 if self.finish_reason == "stop" else None])
        return self._text.whole(keep_stop=self._settings.keep_stop)

    def _append_forced(self, token: int) -> None:
        self._forced.append(len(self.tokens))
        self.tokens.append(token)
        self._logprobs += [0.0] * (len(self.tokens) - len(self._logprobs)) if self._tracked else []
        self._filtered += [0.0] * (len(self.tokens) - len(self._filtered)) if self._tracked else []

    def _check_end(self) -> int | None:
        """Checks whether the last token ends the completion. Returns the length to truncate the row to, if the guide
        takes tokens back.
        """
        ended = self.tokens[-1] in self._stop_ids
        if self._text is not None and not ended:
            self._text.add(self.tokens[-1])
        if self._guide is not None and not self._written:
            assert self._text is not None
            verdict = self._guide.after(self._text, self.tokens, ended=ended)
            if verdict is not None:
                return self._apply(verdict)
        if ended:
            self.finish_reason = "stop"
        elif self._text is not None and self._text.stopped_at is not None:
            self.finish_reason = "stop string"
        elif len(self.tokens) >= self.limit:
            self.finish_reason = "length"
        return None

    def _apply(self, verdict: Verdict) -> int | None:
        self._written.extend(self._tokenizer.encode(verdict.written, add_special_tokens=False))
        cut = None
        if verdict.keep is not None and verdict.keep < len(self.tokens):
            cut = len(self.prompt) + verdict.keep
            self._truncate(verdict.keep)
        if verdict.finish:
            self.finish_reason = "guide"
        elif len(self.tokens) >= self.limit:
            self.finish_reason = "length"
        elif cut is not None:
            # The next token to feed must be known already: the row's last token has been fed.
            assert self._written, "a guide that takes tokens back must write others"
            self._append_forced(self._written.popleft())
            further = self._check_end()
            assert further is None, "a guide took back what it had just written"
        return cut

    def _truncate(self, keep: int) -> None:
        for values in (self.tokens, self._logprobs, self._filtered):
            del values[keep:]
        self._forced = [index for index in self._forced if index < keep]
        self._text = GrowingText(self._tokenizer, self._settings.stop)
        for token in self.tokens:
            self._text.add(token)
