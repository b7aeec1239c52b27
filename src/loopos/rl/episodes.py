"""Episodes: a model plays an environment for many rows at once, over turns of its own and results of tools.

The ids of an episode are its prompt, then turns and suffixes in order: `ids` holds what follows the prompt, `mask` what
of it the model wrote. Tokens are only appended, never rendered again. Episodes share the engine's rows: one that waits
for its tools gives its place to another, and a sample depends only on the tokens before it and its seed.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from loopos.config.diagnostics import UserError
from loopos.config.environments import EnvironmentSection
from loopos.data.conversations import ASSISTANT, Message
from loopos.data.record import shown
from loopos.data.spelled_tokens import SpelledTokens
from loopos.data.template_checks import TemplateRefusal
from loopos.data.templates import ChatTemplate
from loopos.data.tool_calls import parse_turn
from loopos.data.tool_schemas import call_id
from loopos.data.tool_turns import ToolTurns, calling, result_message
from loopos.generation.completions import Completion, Running
from loopos.generation.engine import Engine
from loopos.generation.scheduler import Scheduler
from loopos.generation.settings import SamplingParams
from loopos.rl.contained_environments import instances_of
from loopos.rl.environments import EnvironmentClass
from loopos.rl.tool_runs import FAILURES, CallLimits, Instance, Outcome, in_order, run_calls
from loopos.rl.workers.protocol import Request

EpisodeEnd: TypeAlias = Literal["answer", "done", "length", "turns", "seconds", "stuck"]
"""The model wrote a turn without a call; the environment is done; a limit on tokens, turns or seconds; a tool that
still runs, or broke a limit of its process.
"""
_MOST_THREADS = 32


@dataclass(frozen=True)
class Episode:
    """One episode. `ids`: tokens after the prompt, `[L]`; `mask`: True = the model wrote it; `logprobs`: under softmax
    (logits / temperature), 0 for what it did not write. `messages`: all of them, as text. `calls`: calls of tools,
    malformed ones included; `failures`: how many failed, by kind, and the limit that the reward broke. `reward`: the
    environment's, None without one, and where a limit ended its process.
    """

    prompt_ids: list[int]
    ids: list[int]
    mask: list[bool]
    logprobs: list[float]
    messages: tuple[Message, ...]
    num_prompt_messages: int
    turns: int
    calls: int
    failures: Mapping[str, int]
    finish_reason: EpisodeEnd
    reward: float | None

    @property
    def ended(self) -> bool:
        """Whether the episode came to its end, and no limit cut it."""
        return self.finish_reason in ("answer", "done")

    @property
    def text(self) -> str:
        """The last message of the model."""
        return next((each.content for each in reversed(self.messages) if each.role == ASSISTANT), "")


@dataclass(frozen=True)
class EpisodeCompletion(Completion):
    """An episode as a completion of its prompt: its tokens, those of tools included, and the last message's text."""

    episode: Episode


@dataclass
class _Playing:
    """An episode in progress."""

    instance: Instance
    source: str
    prompt: list[int]
    messages: list[Message]
    settings: SamplingParams
    limit: int
    began: float
    num_prompt_messages: int
    ids: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    turns: int = 0
    calls: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    end: EpisodeEnd | None = None

    def append(self, ids: Sequence[int], logprobs: Sequence[float] | None) -> None:
        """logprobs: None for tokens that the model did not write."""
        self.ids += ids
        self.mask += [logprobs is not None] * len(ids)
        self.logprobs += [0.0] * len(ids) if logprobs is None else logprobs


class EpisodePlayer:
    """Plays episodes of one environment with one engine."""

    def __init__(self, engine: Engine, template: ChatTemplate, section: EnvironmentSection) -> None:
        """Raises `UserError` for a class that is no environment, a template that writes no tools or changes earlier
        text, and where `isolation` is not possible.
        """
        self.engine, self.section = engine, section
        self.environment = EnvironmentClass(section.name)
        self.template = template
        self.turns: ToolTurns | None = None
        # Without tools an episode is one turn, which any template writes.
        if self.environment.tools:
            self.turns = ToolTurns(template, self.environment.schemas, parser=section.tool_parser)
            self.turns.check_prefix()
        self._prompts = self.turns or SpelledTokens(template)
        self._instances = instances_of(self.environment, section)

    def close(self) -> None:
        """Ends what the environment's objects are made by."""
        self._instances.close()

    def play(
        self,
        rows: Sequence[Mapping[str, object]],
        settings: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
        *,
        sources: Sequence[str] = (),
    ) -> list[Episode]:
        """An episode of each row, in order.

        Args:
            settings: of every turn, for all rows or one for each; `max_new_tokens` limits a turn, `max_tokens` of the
                section an episode. With one for all, the same prompt several times gives different samples.
            sources: of the rows, for messages; their numbers if empty.
        Raises:
            UserError: what `reset` or `reward` raises, prompts that the model cannot take, and stop strings.
        """
        each = [settings] * len(rows) if isinstance(settings, SamplingParams) else settings
        if any(one.stop for one in each):
            raise UserError("stop strings cut a turn before its end token; an environment needs whole turns")
        ends = self.template.stop_tokens
        each = [replace(one, stop_token_ids=tuple(sorted({*one.stop_token_ids, *ends}))) for one in each]
        with ExitStack() as instances:
            sources = sources or [f"row {number + 1}" for number in range(len(rows))]
            playing = self._begun(rows, each, sources, instances)
            if isinstance(settings, SamplingParams):
                _give_own_seeds(playing)
            self._play(playing)
            return [self._episode(ended) for ended in playing]

    def _play(self, playing: Sequence[_Playing]) -> None:
        """Plays all to their ends."""
        owners: dict[Running, _Playing] = {}
        waiting: dict[Future[list[Outcome]], _Playing] = {}
        with ThreadPoolExecutor(_MOST_THREADS, "environment") as pool, self.engine.session() as session:
            for begun in playing:
                self._write(begun, session, owners)
            while owners or waiting:
                for running in session.step():
                    if running.finish_reason is not None:
                        self._after_turn(owners.pop(running), running, pool, waiting)
                if waiting:
                    # Only without a row to decode is there time to wait.
                    done, _ = wait(waiting, None if not owners else 0, FIRST_COMPLETED)
                    # In the order of the rows, so that the same episodes decode together in every run.
                    for future in [each for each in waiting if each in done]:
                        self._after_calls(waiting.pop(future), future.result(), session, owners)

    def answer(self, request: Request) -> list[EpisodeCompletion]:
        """An episode of every sample of the request's tasks, in order. Raises `UserError`, as `play`."""
        assert request.tasks is not None, "an environment plays tasks"
        n, tasks = request.n, [task for task in request.tasks for _ in range(request.n)]
        settings = [
            replace(one, seed=_seed(one.seed, number)) for one in request.settings for number in range(request.n)
        ]
        episodes = self.play([task.row for task in tasks], settings, sources=[task.source for task in tasks])
        return [
            EpisodeCompletion(
                *divmod(number, n),
                token_ids=each.ids,
                text=each.text,
                logprobs=each.logprobs,
                filtered_logprobs=None,
                forced=(),
                finish_reason="stop" if each.ended else "length",
                episode=each,
            )
            for number, each in enumerate(episodes)
        ]

    def _begun(
        self,
        rows: Sequence[Mapping[str, object]],
        settings: Sequence[SamplingParams],
        sources: Sequence[str],
        instances: ExitStack,
    ) -> list[_Playing]:
        """The episodes before their first turns. instances: closes them."""

        def begun(row: Mapping[str, object], source: str) -> tuple[Instance, list[Message]]:
            instance, messages = self._instances.begin(row, source)
            instances.callback(instance.close)
            return instance, messages

        playing = []
        found = in_order(begun, rows, sources, workers=self._instances.workers)
        for (instance, messages), chosen, source in zip(found, settings, sources, strict=True):
            try:
                prompt = self._prompts.prompt(messages)
            except TemplateRefusal as refusal:
                raise UserError(f"environment {self.environment.name}: {refusal}\n    for {source}") from refusal
            limit = self.engine.limit(prompt, self.section.max_tokens)
            now = time.monotonic()
            playing.append(_Playing(instance, source, prompt, messages, chosen, limit, now, len(messages)))
        return playing

    def _write(self, playing: _Playing, session: Scheduler, owners: dict[Running, _Playing]) -> None:
        """Lets the model write the next turn."""
        room = playing.limit - len(playing.ids)
        settings = replace(playing.settings, max_new_tokens=min(playing.settings.max_new_tokens, room))
        (running,) = session.add([[*playing.prompt, *playing.ids]], settings)
        owners[running] = playing

    def _after_turn(
        self,
        playing: _Playing,
        running: Running,
        pool: ThreadPoolExecutor,
        waiting: dict[Future[list[Outcome]], _Playing],
    ) -> None:
        completion = running.completion()
        playing.append(completion.token_ids, completion.logprobs)
        playing.turns += 1
        found = parse_turn(self.turns.scan, completion.text) if self.turns is not None else None
        if found is None or not (found.calls or found.malformed):
            playing.messages.append(Message(ASSISTANT, completion.text))
            playing.end = "answer" if completion.finish_reason == "stop" else "length"
            return
        calls, malformed = tuple(found.calls), tuple(found.malformed)
        message = calling(calls, found.content, first=playing.calls) if calls else Message(ASSISTANT, found.content)
        playing.messages.append(message)
        if completion.finish_reason != "stop":
            playing.end = "length"
        elif playing.turns >= self.section.max_turns:
            playing.end = "turns"
        elif self._is_late(playing):
            playing.end = "seconds"
        else:
            section = self.section
            limits = CallLimits(section.tool_seconds, section.max_result_characters)
            waiting[pool.submit(run_calls, self.environment, playing.instance, calls, malformed, limits)] = playing

    def _after_calls(
        self, playing: _Playing, outcomes: Sequence[Outcome], session: Scheduler, owners: dict[Running, _Playing]
    ) -> None:
        for outcome in outcomes:
            playing.messages.append(result_message(outcome.name, outcome.text, call_id(playing.calls)))
            playing.calls += 1
            playing.failures[outcome.failure] += bool(outcome.failure)
        if any(outcome.stuck for outcome in outcomes):
            playing.end = "stuck"
        elif playing.instance.done:
            playing.end = "done"
        elif self._is_late(playing):
            playing.end = "seconds"
        if playing.end is not None:
            return
        suffix = self._suffix(outcomes, playing.source)
        if playing.limit - len(playing.ids) - len(suffix) < 1:
            playing.end = "length"
            return
        playing.append(suffix, None)
        self._write(playing, session, owners)

    def _suffix(self, outcomes: Sequence[Outcome], source: str) -> list[int]:
        assert self.turns is not None, "calls without tools"
        try:
            return self.turns.suffix([(outcome.name, outcome.text) for outcome in outcomes])
        except TemplateRefusal as refusal:
            texts = ", ".join(shown(outcome.text) for outcome in outcomes)
            raise UserError(f"{refusal}\n    for the results {texts} of {source}") from refusal

    def _is_late(self, playing: _Playing) -> bool:
        most = self.section.max_seconds
        return most is not None and time.monotonic() - playing.began > most

    def _episode(self, playing: _Playing) -> Episode:
        assert playing.end is not None, "an episode without an end"
        reward, failure = playing.instance.reward(playing.messages)
        playing.failures[failure] += bool(failure)
        return Episode(
            prompt_ids=playing.prompt,
            ids=playing.ids,
            mask=playing.mask,
            logprobs=playing.logprobs,
            messages=tuple(playing.messages),
            num_prompt_messages=playing.num_prompt_messages,
            turns=playing.turns,
            calls=playing.calls,
            failures={kind: playing.failures[kind] for kind in FAILURES if playing.failures[kind]},
            finish_reason=playing.end,
            reward=reward,
        )


def _give_own_seeds(playing: Sequence[_Playing]) -> None:
    """Seeds by the number of times that a prompt came before."""
    same: Counter[tuple[int, ...]] = Counter()
    for each in playing:
        number = same[tuple(each.prompt)]
        same[tuple(each.prompt)] += 1
        each.settings = replace(each.settings, seed=_seed(each.settings.seed, number))


def _seed(seed: int, number: int) -> int:
    """The seed of the sample `number` of one prompt; turns differ by the tokens before them."""
    if not number:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest(), "little") >> 1


def episode_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    """Means over episodes: turns, calls, failed calls by kind, and tokens of model and tools."""
    count = len(episodes)
    wrote = sum(sum(each.mask) for each in episodes)
    metrics = {
        "turns": sum(each.turns for each in episodes) / count,
        "tool_calls": sum(each.calls for each in episodes) / count,
        "tool_failures": sum(sum(each.failures.values()) for each in episodes) / count,
        "model_tokens": wrote / count,
        "tool_tokens": (sum(len(each.ids) for each in episodes) - wrote) / count,
    }
    for kind in FAILURES:
        metrics[f"tool_failures_{kind}"] = sum(each.failures.get(kind, 0) for each in episodes) / count
    return metrics
