"""The generation engine: prompts → completions with continuous batching, all at once, streamed, or in an open session.

At most `max_rows` rows decode together; a finished row is reused for the next prompt. The engine uses the model's own
weights, so it generates with a model in training. `scheduler.py` is the loop, `beam.py` beam search, `steps.py`
reasoning in steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loopos.config.diagnostics import UserError
from loopos.generation.completions import Completion, Guide, Running, SampleId, TokenDelta
from loopos.generation.decoders import runner_of
from loopos.generation.grammars import Grammars
from loopos.generation.rows import Rows
from loopos.generation.sampling import stream_key
from loopos.generation.scheduler import Scheduler
from loopos.generation.settings import SamplingParams
from loopos.models.language_ensemble import LanguageEnsemble, members_of, positions_of


class Engine:
    """Generation with a causal language model of transformers, or an ensemble of several.

    `path`: "cached" (batched rows over LoopOS's cache) or "plain" (row by row with transformers' cache). `reason`: why
    the plain path is used. `embeds`: whether hidden states exist, which an ensemble lacks. `max_rows`: rows that decode
    together. `prefill_tokens`: maximum prompt tokens per forward.
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
        self.end_tokens = end_tokens(members_of(model), tokenizer)
        self.max_positions = positions_of(model)
        self.vocab_size = int(members_of(model)[0].config.get_text_config().vocab_size)
        self._grammars = Grammars(tokenizer, self.vocab_size)
        self._prefix_rows: Rows | None = None
        self._reuses_prefixes, self._busy = False, False

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        settings: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
        *,
        n: int = 1,
        logprobs: bool = True,
        guide: Callable[[int, int], Guide] | None = None,
    ) -> list[Completion]:
        """n completions of every prompt, in order: all of the first prompt, then all of the second.

        settings: one for all prompts, or one per prompt. `guide(prompt index, sample index)` creates the guide that
        steers that completion. Raises `UserError` for an empty prompt, a prompt longer than the model's positions, and
        unknown token ids.
        """
        runs = self.begin(prompts, settings, n=n, guide=guide)
        with self._session(len(runs), with_logprobs=logprobs) as session:
            session.join(_longest_first(runs))
            while session.step():
                pass
        return [running.completion() for running in runs]

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        settings: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
        *,
        n: int = 1,
    ) -> Iterator[TokenDelta]:
        """The same completions, token by token. The text deltas of a completion concatenate to its text.

        Until the stream ends or is closed, the engine is busy.
        """
        runs = self.begin(prompts, settings, n=n, watch_text=True)
        with self._session(len(runs)) as session:
            session.join(_longest_first(runs))
            while touched := session.step():
                for running in touched:
                    yield running.delta()

    @contextmanager
    def session(self, *, admitted_tokens: int | None = None, spares_others: bool = False) -> Iterator[Scheduler]:
        """A scheduler that accepts prompts at any time, for servers. Within the context the engine is busy and the
        model's weights may be in the kernel layout. The arguments are those of `Scheduler`.
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
            raise RuntimeError("the engine is busy: finish or close the other stream or session first")
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
        """The mean of the last layer's hidden states over each sequence's tokens, `[N, d]` fp32. Call within a
        `session`, between its steps. Raises `UserError` as `limit` does, and for an ensemble.
        """
        assert self._busy, "no session is open: the model is not set for generation"
        for sequence in sequences:
            self.limit(sequence, 1)
        with self.without_gradients():
            return self._runner.embed(sequences)

    @contextmanager
    def reuse_prefixes(self) -> Iterator[None]:
        """Within the context, rows keep their tokens, and later calls reuse shared prefixes: turns of a chat, steps of
        a search. The weights must not be changed or read meanwhile: they are in the kernel layout.
        """
        self._reuses_prefixes = True
        try:
            with self._runner.layout(self.max_rows):
                yield
        finally:
            self._reuses_prefixes, self._prefix_rows = False, None

    @contextmanager
    def serving(self, num_rows: int) -> Iterator[None]:
        """Within the context the model is prepared to generate `num_rows` rows."""
        with self._runner.ready(min(num_rows, self.max_rows)), self.without_gradients():
            yield

    @property
    def summary(self) -> str:
        """The path and the reason for it, in one line."""
        return f"generation: {self.path}" + (f" ({self.reason})" if self.reason else "")

    @property
    def path(self) -> str:
        """The decode path in use."""
        return self._runner.path

    @path.setter
    def path(self, path: str) -> None:
        self._runner.path = path

    def without_gradients(self) -> torch.inference_mode | torch.no_grad:
        """The context in which the model's forwards run."""
        return self._runner.without_gradients()

    def rows(self, num_rows: int) -> Rows:
        """New rows of the chosen path."""
        return self._runner.rows(num_rows)

    def limit(self, prompt: Sequence[int], max_new_tokens: int) -> int:
        """Maximum new tokens after a prompt; the last one is never fed, so it needs no position. Raises `UserError`."""
        if not prompt:
            raise UserError("empty prompt: expected at least one token, such as the begin token")
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
        settings: SamplingParams | Sequence[SamplingParams],
        *,
        n: int = 1,
        watch_text: bool = False,
        guide: Callable[[int, int], Guide] | None = None,
    ) -> list[Running]:
        """n completions of every prompt without tokens, in the order of `generate`, with the same errors. watch_text:
        keep their text up to date, for streaming.
        """
        assert n >= 1, n
        each = [settings] * len(prompts) if isinstance(settings, SamplingParams) else list(settings)
        assert len(each) == len(prompts), f"{len(prompts)} prompts, {len(each)} settings"
        runs: list[Running] = []
        same: Counter[tuple[int, tuple[int, ...]]] = Counter()
        choices: dict[SamplingParams, SamplingParams] = {}
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
                identity = SampleId(index, sample, key)
                running = Running(self.tokenizer, identity, ids, setting, choice=choice, limit=limit, stop_ids=stop_ids)
                running.watch(watch_text or bool(setting.stop), guide(index, sample) if guide else None)
                if setting.json_schema is not None:
                    assert guide is None, "a guide writes tokens that a grammar may forbid"
                    running.grammar = self._grammars.begin(setting.json_schema, stop_ids)
                runs.append(running)
        return runs

    def _stop_ids(self, settings: SamplingParams) -> frozenset[int]:
        """Tokens that end a completion."""
        return frozenset((*settings.stop_token_ids, *(self.end_tokens if settings.stop_at_end else ())))

    def _rows_for(self, num_rows: int) -> Rows:
        if self._prefix_rows is not None:
            return self._prefix_rows
        rows = self.rows(self.max_rows if self._reuses_prefixes else num_rows)
        if self._reuses_prefixes:
            self._prefix_rows = rows
        return rows


def _longest_first(runs: Sequence[Running]) -> list[Running]:
    """Short completions then fill the rows that become free, and no long one runs last on its own."""
    return sorted(runs, key=lambda running: -running.limit)


def end_tokens(members: Sequence[PreTrainedModel], tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """End-of-sequence tokens: of every member's generation config, and of the tokenizer."""
    tokens = [tokenizer.eos_token_id]
    for member in members:
        actual = getattr(member.generation_config, "eos_token_id", None)
        tokens += actual if isinstance(actual, list) else [actual]
    return frozenset(token for token in tokens if token is not None)
