"""The generation engine: prompts → completions, many at a time.

Enters: prompts as token ids, settings for all or for each. Leaves: completions in the prompts' order, or their tokens
one by one, or a session that prompts join at any time. At most `max_rows` rows decode together; a finished row's place
is taken by the next prompt. The model's own weights are used, in whatever state training has left them. Left out: the
loop itself (`session.py`), text → prompt tokens (`data`), beams (`beam.py`), reasoning in steps (`steps.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loopos.config.diagnostics import UserError
from loopos.generation.completions import Completion, Guide, Piece, Running
from loopos.generation.decoders import runner_of
from loopos.generation.rows import Rows
from loopos.generation.sampling import stream_key
from loopos.generation.scheduler import Scheduler
from loopos.generation.settings import SamplingSettings
from loopos.models.language_ensemble import LanguageEnsemble, members_of, positions_of


class Engine:
    """Generation with a causal language model of transformers, or an ensemble of several.

    `path` is "cached" (rows together over our cache) or "plain" (row by row with transformers' cache), and `reason`
    says why the plain path was taken. `embeds`: whether there are hidden states, which an ensemble lacks. `max_rows`:
    rows that decode together; `prefill_tokens`: the most prompt tokens in one forward.
    """

    def __init__(
        self,
        model: PreTrainedModel | LanguageEnsemble,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_rows: int = 64,
        prefill_tokens: int = 2048,
    ) -> None:
        if max_rows < 1 or prefill_tokens < 1:
            raise UserError(f"max_rows {max_rows} and prefill_tokens {prefill_tokens}: expected 1 or more")
        self.model, self.tokenizer = model, tokenizer
        self.max_rows, self.prefill_tokens = max_rows, prefill_tokens
        self._runner = runner_of(model)
        self.reason = self._runner.why_plain
        self.embeds = not isinstance(model, LanguageEnsemble)
        self.end_tokens = _end_tokens(members_of(model), tokenizer)
        self.max_positions = positions_of(model)
        self.vocab_size = int(members_of(model)[0].config.get_text_config().vocab_size)
        self._kept: Rows | None = None
        self._keeping, self._busy = False, False

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        settings: SamplingSettings | Sequence[SamplingSettings] = SamplingSettings(),
        *,
        n: int = 1,
        logprobs: bool = True,
        guide: Callable[[int, int], Guide] | None = None,
    ) -> list[Completion]:
        """n completions of every prompt, in order: all of the first prompt, then all of the second.

        settings: one for all prompts, or one a prompt. `guide(prompt index, sample index)` makes what watches and
        steers that completion. Raises `UserError` for an empty prompt, one longer than the model has positions for,
        and token ids that the model has not.
        """
        every = self.begin(prompts, settings, n=n, guide=guide)
        with self._session(len(every), with_logprobs=logprobs) as session:
            session.join(_longest_first(every))
            while session.step():
                pass
        return [running.completion() for running in every]

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        settings: SamplingSettings | Sequence[SamplingSettings] = SamplingSettings(),
        *,
        n: int = 1,
    ) -> Iterator[Piece]:
        """The same completions, token by token as they come; a row's pieces of text make up its completion's text.

        Until the stream ends or is closed, the model is set for generation and serves nothing else.
        """
        every = self.begin(prompts, settings, n=n, watch_text=True)
        with self._session(len(every)) as session:
            session.join(_longest_first(every))
            while touched := session.step():
                for running in touched:
                    yield running.piece()

    @contextmanager
    def session(self, *, admitted_tokens: int | None = None, spares_others: bool = False) -> Iterator[Scheduler]:
        """Rows that prompts join and leave at any time: what a server runs on. Within, the model is set for generation,
        its weights may be in the kernel's layout, and it serves nothing else. The arguments are those of `Scheduler`.
        """
        with self._session(self.max_rows, admitted_tokens=admitted_tokens, spares_others=spares_others) as session:
            yield session

    @contextmanager
    def _session(
        self,
        num_prompts: int,
        *,
        with_logprobs: bool = True,
        admitted_tokens: int | None = None,
        spares_others: bool = False,
    ) -> Iterator[Scheduler]:
        if self._busy:
            raise RuntimeError("the engine is in use: finish or close the other stream first")
        num_rows = min(num_prompts, self.max_rows)
        self._busy = True
        try:
            with self._runner.ready(num_rows):
                yield Scheduler(
                    self,
                    self._rows_for(num_rows),
                    with_logprobs=with_logprobs,
                    admitted_tokens=admitted_tokens,
                    spares_others=spares_others,
                )
        finally:
            self._busy = False

    def embed(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """The mean of the last layer's hidden states over each sequence's tokens, `[N, d]` fp32. To be called within a
        `session`, between its steps. Raises `UserError` as `limit`, and for an ensemble.
        """
        assert self._busy, "no session is open: the model is not set for generation"
        for sequence in sequences:
            self.limit(sequence, 1)
        with self.without_gradients():
            return self._runner.embed(sequences)

    @contextmanager
    def prefixes_kept(self) -> Iterator[None]:
        """Within, what a row holds is found again by later calls whose prompts begin like it: the turns of a chat, the
        steps of a search. The weights must not change meanwhile, nor be read: they are in the kernel's layout.
        """
        self._keeping = True
        try:
            with self._runner.layout(self.max_rows):
                yield
        finally:
            self._keeping, self._kept = False, None

    @contextmanager
    def serving(self, num_rows: int) -> Iterator[None]:
        """The model set for generation of so many rows, and then as it was."""
        with self._runner.ready(min(num_rows, self.max_rows)), self.without_gradients():
            yield

    @property
    def summary(self) -> str:
        """The path, and why, in words."""
        return f"generation: {self.path}" + (f" ({self.reason})" if self.reason else "")

    @property
    def path(self) -> str:
        """The path that is taken."""
        return self._runner.path

    @path.setter
    def path(self, path: str) -> None:
        self._runner.path = path

    def without_gradients(self) -> torch.inference_mode | torch.no_grad:
        """What the model's forwards run under."""
        return self._runner.without_gradients()

    def rows(self, num_rows: int) -> Rows:
        """New rows of the path that the probe chose."""
        return self._runner.rows(num_rows)

    def limit(self, prompt: Sequence[int], max_new_tokens: int) -> int:
        """Tokens that may follow a prompt: the last one is never fed, so it needs no position. Raises `UserError`."""
        if not prompt:
            raise UserError("an empty prompt: expected at least one token (a begin token, if nothing else)")
        for token in (max(prompt), min(prompt)):
            if not 0 <= token < self.vocab_size:
                raise UserError(f"token {token} in a prompt: the model has {self.vocab_size} tokens")
        if self.max_positions is None:
            return max_new_tokens
        if len(prompt) > self.max_positions:
            raise UserError(f"a prompt of {len(prompt)} tokens: the model has {self.max_positions} positions")
        return min(max_new_tokens, self.max_positions + 1 - len(prompt))

    def begin(
        self,
        prompts: Sequence[Sequence[int]],
        settings: SamplingSettings | Sequence[SamplingSettings],
        *,
        n: int = 1,
        watch_text: bool = False,
        guide: Callable[[int, int], Guide] | None = None,
    ) -> list[Running]:
        """n completions of every prompt that have no token yet, in the order of `generate`, whose errors it raises.
        watch_text: their text is to be had piece by piece.
        """
        assert n >= 1, n
        each = [settings] * len(prompts) if isinstance(settings, SamplingSettings) else list(settings)
        assert len(each) == len(prompts), f"{len(prompts)} prompts, {len(each)} settings"
        begun: list[Running] = []
        same: Counter[tuple[int, tuple[int, ...]]] = Counter()
        choices: dict[SamplingSettings, SamplingSettings] = {}
        for index, (prompt, setting) in enumerate(zip(prompts, each, strict=True)):
            limit, ids = self.limit(prompt, setting.max_new_tokens), list(prompt)
            unknown = [token for token in setting.logit_bias if token >= self.vocab_size]
            if unknown:
                raise UserError(f"logit_bias for token {unknown[0]}: the model has {self.vocab_size} tokens")
            choice, stop_ids = setting.of_choice(), self._stop_ids(setting)
            choice = choices.setdefault(choice, choice)
            for sample in range(n):
                key = stream_key(setting.seed, ids, same[setting.seed, tuple(ids)])
                same[setting.seed, tuple(ids)] += 1
                running = Running(
                    self.tokenizer, index, sample, ids, setting, choice=choice, limit=limit, key=key, stop_ids=stop_ids
                )
                running.watch(watch_text or bool(setting.stop), guide(index, sample) if guide else None)
                begun.append(running)
        return begun

    def _stop_ids(self, settings: SamplingSettings) -> frozenset[int]:
        """Tokens that end a completion."""
        return frozenset((*settings.stop_token_ids, *(self.end_tokens if settings.stop_at_end else ())))

    def _rows_for(self, num_rows: int) -> Rows:
        if self._kept is not None:
            return self._kept
        rows = self.rows(self.max_rows if self._keeping else num_rows)
        if self._keeping:
            self._kept = rows
        return rows


def _longest_first(every: Sequence[Running]) -> list[Running]:
    """Short ones then fill the places around the long, and no long one is left alone at the end."""
    return sorted(every, key=lambda running: -running.limit)


def _end_tokens(members: Sequence[PreTrainedModel], tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end a sequence: those of every member, by its generation config, and the tokenizer's."""
    tokens = [tokenizer.eos_token_id]
    for member in members:
        actual = getattr(member.generation_config, "eos_token_id", None)
        tokens += actual if isinstance(actual, list) else [actual]
    return frozenset(token for token in tokens if token is not None)
