"""The generation engine: prompts → completions, many at a time.

Enters: prompts as token ids, settings for all or for each. Leaves: completions in the prompts' order, or their tokens
one by one. At most `max_rows` rows decode together; a finished row's place is taken by the next prompt. The model's own
weights are used, in whatever state training has left them. Left out: text → prompt tokens (`data`), beams (`beam.py`),
reasoning in steps (`steps.py`).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loopos.config.faults import UserError
from loopos.generation.cache import IMPLEMENTATION
from loopos.generation.completions import Completion, Guide, Piece, Running
from loopos.generation.placing import fill
from loopos.generation.road import probed
from loopos.generation.rows import (
    PLAIN,
    CachedRows,
    PlainRows,
    Rows,
    prepared,
    serving,
    without_gradients,
)
from loopos.generation.sampling import History, choose
from loopos.generation.settings import SamplingSettings
from loopos.generation.streams import stream_key, uniforms


class Engine:
    """Generation with a causal language model of transformers.

    `path` is "cached" (rows together over our cache) or "plain" (row by row with transformers' cache), and `reason`
    says why the plain path was taken. `max_rows`: rows that decode together; `prefill_tokens`: the most prompt tokens
    in one forward.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_rows: int = 64,
        prefill_tokens: int = 2048,
    ) -> None:
        if max_rows < 1 or prefill_tokens < 1:
            raise UserError(f"max_rows {max_rows} and prefill_tokens {prefill_tokens}: wanted 1 or more")
        self.model, self.tokenizer = model, tokenizer
        self.max_rows, self.prefill_tokens = max_rows, prefill_tokens
        self._road = probed(model)
        self.reason = self._road.why_plain
        self.path = "plain" if self.reason else "cached"
        self.end_tokens = _end_tokens(model, tokenizer)
        config = model.config.get_text_config()
        self.max_positions: int | None = getattr(config, "max_position_embeddings", None)
        self.vocab_size = int(config.vocab_size)
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
        waiting = self._waiting(prompts, settings, n, watch_text=False, guide=guide)
        every = list(waiting)
        with self.serving(len(waiting)):
            for _ in self._run(waiting, with_logprobs=logprobs):
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
        waiting = self._waiting(prompts, settings, n, watch_text=True, guide=None)
        steps = self._run(waiting, with_logprobs=True)
        with (
            self._road.layout(self.model, min(len(waiting), self.max_rows)),
            prepared(self.model, self._attention),
            closing(steps),
        ):
            while True:
                # Between two tokens the caller has its own gradient mode.
                with without_gradients(self._attention):
                    touched = next(steps, None)
                if touched is None:
                    return
                for running in touched:
                    yield running.piece()

    @contextmanager
    def prefixes_kept(self) -> Iterator[None]:
        """Within, what a row holds is found again by later calls whose prompts begin like it: the turns of a chat, the
        steps of a search. The weights must not change meanwhile, nor be read: they are in the kernel's layout.
        """
        self._keeping = True
        try:
            with self._road.layout(self.model, self.max_rows):
                yield
        finally:
            self._keeping, self._kept = False, None

    @contextmanager
    def serving(self, num_rows: int) -> Iterator[None]:
        """The model set for generation of so many rows, and then as it was."""
        with self._road.layout(self.model, min(num_rows, self.max_rows)), serving(self.model, self._attention):
            yield

    @property
    def said(self) -> str:
        """The path, and why, in words."""
        return f"generation: {self.path}" + (f" ({self.reason})" if self.reason else "")

    @property
    def _attention(self) -> str:
        return IMPLEMENTATION if self.path == "cached" else PLAIN

    def rows(self, num_rows: int) -> Rows:
        """New rows of the path that the probe chose."""
        if self.path == "plain":
            return PlainRows(self.model, num_rows)
        return CachedRows(self.model, num_rows)

    def limit(self, prompt: Sequence[int], max_new_tokens: int) -> int:
        """Tokens that may follow a prompt: the last one is never fed, so it needs no position. Raises `UserError`."""
        if not prompt:
            raise UserError("an empty prompt: wanted at least one token (a begin token, if nothing else)")
        for token in (max(prompt), min(prompt)):
            if not 0 <= token < self.vocab_size:
                raise UserError(f"token {token} in a prompt: the model has {self.vocab_size} tokens")
        if self.max_positions is None:
            return max_new_tokens
        if len(prompt) > self.max_positions:
            raise UserError(f"a prompt of {len(prompt)} tokens: the model has {self.max_positions} positions")
        return min(max_new_tokens, self.max_positions + 1 - len(prompt))

    def _waiting(
        self,
        prompts: Sequence[Sequence[int]],
        settings: SamplingSettings | Sequence[SamplingSettings],
        n: int,
        *,
        watch_text: bool,
        guide: Callable[[int, int], Guide] | None,
    ) -> deque[Running]:
        assert n >= 1, n
        each = [settings] * len(prompts) if isinstance(settings, SamplingSettings) else list(settings)
        assert len(each) == len(prompts), f"{len(prompts)} prompts, {len(each)} settings"
        waiting: deque[Running] = deque()
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
                waiting.append(running)
        return waiting

    def _stop_ids(self, settings: SamplingSettings) -> frozenset[int]:
        """Tokens that end a completion. A stop string that is itself a special token never shows in the text."""
        special = [
            self.tokenizer.convert_tokens_to_ids(stop)
            for stop in settings.stop
            if stop in self.tokenizer.all_special_tokens
        ]
        return frozenset((*settings.stop_token_ids, *special, *(self.end_tokens if settings.stop_at_end else ())))

    def _run(self, waiting: deque[Running], *, with_logprobs: bool) -> Generator[list[Running], None, None]:
        """Decodes until all is done; after each choice, the rows that got a token."""
        if self._busy:
            raise RuntimeError("the engine is in use: finish or close the other stream first")
        if not waiting:
            return
        # The longest first: short ones then fill the places around them, and no long one is left alone at the end.
        waiting = deque(sorted(waiting, key=lambda running: -running.limit))
        self._busy = True
        try:
            rows = self._rows_for(waiting)
            active: list[Running] = []
            while waiting or active:
                free = min(len(rows.fed) - len(active), len(waiting))
                if free:
                    begun = [waiting.popleft() for _ in range(free)]
                    places = range(len(active), len(active) + free)
                    logits = fill(rows, places, [r.prompt for r in begun], most_tokens=self.prefill_tokens)
                    active += begun
                else:
                    begun = active
                    logits = rows.step([running.tokens[-1] for running in active])
                self._take(logits, begun, rows, len(active) - len(begun), with_logprobs)
                yield list(begun)
                _close_gaps(rows, active)
        finally:
            self._busy = False

    def _rows_for(self, waiting: Sequence[Running]) -> Rows:
        if self._kept is not None:
            return self._kept
        rows = self.rows(self.max_rows if self._keeping else min(self.max_rows, len(waiting)))
        if self._keeping:
            self._kept = rows
        return rows

    def _take(
        self, logits: Tensor, chosen_for: Sequence[Running], rows: Rows, first_row: int, with_logprobs: bool
    ) -> None:
        """One token for each; logits `[N, V]`, row first_row + i of `rows` belongs to chosen_for[i]."""
        groups: dict[SamplingSettings, list[int]] = {}
        if all(running.choice is chosen_for[0].choice for running in chosen_for):
            groups[chosen_for[0].choice] = list(range(len(chosen_for)))
        else:
            for place, running in enumerate(chosen_for):
                groups.setdefault(running.choice, []).append(place)
        for settings, places in groups.items():
            members = [chosen_for[place] for place in places]
            choice = choose(
                logits if len(groups) == 1 else logits[torch.tensor(places, device=logits.device)],
                settings,
                history=_history(members, logits.device) if settings.needs_history else None,
                uniforms=None if settings.greedy else _draws(members).to(logits.device),
                with_logprobs=with_logprobs,
            )
            tokens = choice.tokens.tolist()
            logprobs = _floats(choice.logprobs, len(tokens))
            drawn = _floats(choice.filtered_logprobs, len(tokens))
            for place, running, token, full, left in zip(places, members, tokens, logprobs, drawn, strict=True):
                kept = running.take(token, full, left)
                if kept is not None:
                    rows.cut(first_row + place, kept)


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end a sequence: the model's, by its generation config, and the tokenizer's."""
    given = getattr(model.generation_config, "eos_token_id", None)
    tokens = given if isinstance(given, list) else [given]
    return frozenset(token for token in (*tokens, tokenizer.eos_token_id) if token is not None)


def _floats(values: Tensor | None, number: int) -> Sequence[float | None]:
    return [None] * number if values is None else values.tolist()


def _draws(members: Sequence[Running]) -> Tensor:
    """The next uniform number of each, `[B]`."""
    numbers = uniforms([running.key for running in members], [running.draws for running in members])
    for running in members:
        running.draws += 1
    return numbers


def _history(members: Sequence[Running], device: torch.device) -> History:
    return History.of([running.prompt for running in members], [running.tokens for running in members], device)


def _close_gaps(rows: Rows, active: list[Running]) -> None:
    """Takes the finished out: the last row moves into each gap, so that the rows that decode stay the first ones."""
    for place in range(len(active) - 1, -1, -1):
        if active[place].finish_reason is None:
            continue
        last = active.pop()
        if last.finish_reason is None:
            rows.copy(len(active), place, len(rows.fed[len(active)]))
            active[place] = last
