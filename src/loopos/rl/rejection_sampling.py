"""On-policy data: n responses of a model to every prompt, then a score for each. Both resume to the bit.

Two phases, so that the model and the judge are never in memory together, and a judge that fails costs no responses:

    OUTPUT.progress/responses.jsonl   a line per prompt: {"samples": [{"text", "num_tokens", "ended"}, …]}
    OUTPUT.progress/scores.jsonl      a line per prompt: {"scores": [1.0, null, …]}
    OUTPUT.progress/rows.jsonl        the output, until it is complete

Prompts are sampled and judged in chunks of fixed prompts: in half precision a response may depend on the rows beside
it, and a resumed chunk has the same ones. What is made of the scores is in `selection`, metrics in
`evaluation.sample_metrics`.
"""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

from loopos.config.diagnostics import UserError
from loopos.config.rewards import RewardFunctionSection
from loopos.data.digest import prompts_digest, records_digest, text_digest, tokenizer_digest
from loopos.data.prompts import PromptContent, prompt_text
from loopos.data.rows import Row
from loopos.data.step_format import StepFormat
from loopos.data.supervised_tokens import NothingLeft
from loopos.data.tool_schemas import Tool
from loopos.evaluation.checkers import Sample, checker
from loopos.evaluation.checkers import judge as checked
from loopos.evaluation.grading import Grader
from loopos.evaluation.reasoning import Reasoner
from loopos.evaluation.reward_predictor import RewardPredictor, judged_content
from loopos.evaluation.teacher_logprobs import TeacherLogprobs
from loopos.generation.settings import SamplingParams
from loopos.models.language_ensemble import members_of
from loopos.models.load import fingerprint
from loopos.rl.rewards import Response, reward_function
from loopos.rl.selection import JudgedPrompt
from loopos.storage.chunked_lines import ChunkedLines, HeaderDiffers
from loopos.storage.durable import hash_file, write_whole
from loopos.storage.json_files import json_text

RESPONSES, SCORES, ROWS = "responses.jsonl", "scores.jsonl", "rows.jsonl"
SAMPLES_OF_A_CHUNK = 512
"""Responses that are sampled together: eight times the rows of the engine, so that few rows idle at a chunk's end."""


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to sample. `ids`: its tokens. `row`: the row of data, with the answer that it expects; `columns`: those
    that are kept beside the responses.
    """

    content: PromptContent
    ids: tuple[int, ...]
    row: Row
    expected: str | None = None
    tools: tuple[Tool, ...] = ()
    columns: tuple[str, ...] = ()


Item: TypeAlias = tuple[Request, Sample]
"""A prompt and one response to it."""


@dataclass(frozen=True, slots=True)
class Judge:
    """`scores`: of responses, None for one that cannot be judged. `identity`: what the scores depend on, besides the
    responses. `threshold`: the score from which a response passes, None if the judge does not say. `grader`: of a judge
    model.
    """

    scores: Callable[[Sequence[Item]], list[float | None]]
    identity: Mapping[str, Any]
    threshold: float | None = None
    grader: Grader | None = None


def by_checker(name: str, step_format: StepFormat, requests: Sequence[Request]) -> Judge:
    """1 for a response whose answer is the row's, as `loopos evaluate` reads it. Raises `UserError` for an unknown
    checker and for a row without an answer.
    """
    check = checker(name)
    for each in requests:
        if each.expected is None:
            columns = ", ".join(each.row.values) or "none"
            raise UserError(f'{each.row.location}: the row has no column "answer" for {name} (columns: {columns})')

    def scores(items: Sequence[Item]) -> list[float | None]:
        found: list[float | None] = []
        for request, sample in items:
            assert request.expected is not None
            row = request.row
            (verdict,) = checked(
                [sample],
                request.expected,
                row.values,
                step_format=step_format,
                checker=check,
                location=row.location,
            )
            found.append(verdict.score)
        return found

    expected = records_digest({**each.row.values, "expected": each.expected} for each in requests)
    return Judge(scores, {"checker": name, "step_format": asdict(step_format), "rows": expected}, threshold=1.0)


def by_function(name: str, requests: Sequence[Request], options: Mapping[str, Any] = MappingProxyType({})) -> Judge:
    """A reward function, as PPO takes it. Raises `UserError`."""
    function = reward_function(name, options=options)

    def scores(items: Sequence[Item]) -> list[float | None]:
        return [*function([
            Response(prompt_text(each.content), each.ids, sample.text, (), sample.ended, each.row.location,
                     each.row.values, sample.num_tokens)
            for each, sample in items
        ])]  # fmt: skip

    identity: dict[str, Any] = {"function": name, "source": _source_of(function.function.function)}
    if options:
        identity["options"] = RewardFunctionSection(name=name, options=dict(options)).identity.get("options", {})
    if function.takes_rows:
        identity["rows"] = records_digest(each.row.values for each in requests)
    return Judge(scores, identity)


def _source_of(function: Callable[..., Any]) -> str | None:
    """The SHA-256 of the file of a function; None for one that is not in a file."""
    # Callables of C and instances of classes have no source.
    with suppress(TypeError, OSError):
        file = inspect.getsourcefile(inspect.unwrap(function))
        if file is not None:
            return hash_file(Path(file)).sha256
    return None


def by_reward(predictor: RewardPredictor) -> Judge:
    """The score of a reward model. Raises `UserError` for a prompt with tools, which it does not read."""
    as_text = bool(predictor.opened.description["text"])

    def scores(items: Sequence[Item]) -> list[float | None]:
        for request, _ in items:
            if request.tools:
                raise UserError(f"{request.row.location}: a reward model cannot judge answers to prompts with tools")
        pairs = [judged_content(request.content, sample.text, as_text=as_text) for request, sample in items]
        try:
            judged = predictor.judge_what_fits(pairs)
        except NothingLeft:
            return [None] * len(items)
        return [None if found is None else found.score for found in judged]

    opened = predictor.opened
    description = text_digest(json.dumps(dict(opened.description), sort_keys=True, default=str))
    return Judge(scores, {"reward_model": fingerprint(opened.model.backbone.model), "description": description})


def by_grader(grader: Grader, requests: Sequence[Request]) -> Judge:
    """The expected grade by a judge model; with a good and a bad word, one of at least .5 passes."""

    def scores(items: Sequence[Item]) -> list[float | None]:
        return grader.grade([
            {**request.row.values, "prompt": prompt_text(request.content), "response": sample.text}
            for request, sample in items
        ])  # fmt: skip

    identity = {**grader.identity, "rows": records_digest(each.row.values for each in requests)}
    return Judge(scores, identity, 0.5 if grader.prompt.is_probability else None, grader)


@dataclass(frozen=True, slots=True)
class Speed:
    """What this session generated: tokens, and seconds."""

    tokens: int = 0
    seconds: float = 0.0


class RejectionSampler:
    """Samples and judges `requests`, with its progress in a folder that it shares with no other process."""

    def __init__(self, folder: Path, requests: Sequence[Request], *, n: int, chunk: int | None = None) -> None:
        """n: responses to each prompt. chunk: prompts of a chunk; None: enough for `SAMPLES_OF_A_CHUNK` responses."""
        self.folder, self.requests, self.n = folder, requests, n
        self.chunk = chunk or max(1, SAMPLES_OF_A_CHUNK // n)
        self._starts = range(0, len(requests), self.chunk)
        self._sizes = [len(self._part(start)) for start in self._starts]
        self._headers: dict[str, Mapping[str, Any]] = {}

    def sample(
        self,
        reasoner: Reasoner,
        settings: SamplingParams,
        *,
        logprobs: TeacherLogprobs | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Speed:
        """`write` with a model. logprobs: computes the candidates that are kept beside each response."""
        sampling = reasoner.sampling(settings)
        identity = self._identity(reasoner, sampling)
        if logprobs is not None:
            identity["logprobs"] = logprobs.k

        def answers(requests: Sequence[Request]) -> list[Sample]:
            prompts = [request.ids for request in requests]
            completions = reasoner.engine.generate(prompts, sampling, n=self.n, logprobs=False)
            columns: Sequence[Mapping[str, Any] | None] = [None] * len(completions)
            if logprobs is not None:
                of_each = [prompts[each.prompt_index] for each in completions]
                columns = logprobs(of_each, [each.token_ids for each in completions])
            return [
                Sample(each.text, len(each.token_ids), each.finish_reason in ("stop", "stop string"), column)
                for each, column in zip(completions, columns, strict=True)
            ]

        return self.write_with(answers, identity, progress=progress)

    def write_with(
        self,
        answers: Callable[[Sequence[Request]], list[Sample]],
        identity: Mapping[str, Any],
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> Speed:
        """Makes the responses that the folder lacks. answers: n to each request, one after another; identity: what they
        depend on. progress: takes the numbers of finished prompts and of all. Raises `UserError` if the folder has
        responses of other settings, `OSError`.
        """
        self._headers[RESPONSES] = identity
        try:
            file = self._file(RESPONSES)
        except HeaderDiffers as other:
            changed = "\n".join(f"    {name}: {_shown(*values)}" for name, values in other.differences.items())
            raise UserError(
                f"{self.folder}: an unfinished sampling with other settings:\n{changed}\n"
                "run its own command again to finish it, or delete the folder to start anew"
            ) from other
        tokens, began = 0, time.monotonic()
        with file:
            for start in self._starts[file.num_chunks :]:
                if progress is not None:
                    progress(start, len(self.requests))
                samples = answers(self._part(start))
                tokens += sum(sample.num_tokens for sample in samples)
                file.append([
                    {"samples": [_as_json(sample) for sample in samples[first : first + self.n]]}
                    for first in range(0, len(samples), self.n)
                ])  # fmt: skip
        return Speed(tokens, time.monotonic() - began)

    def judge(
        self,
        judge: Judge,
        *,
        note: Callable[[str], None] = lambda line: None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Scores the responses that the folder has no scores of; those of another judge are replaced, which `note`
        reports. Raises `UserError` as the judge does, `OSError`.
        """
        responses_of = text_digest(json.dumps(self._headers[RESPONSES], sort_keys=True))
        self._headers[SCORES] = {**judge.identity, "responses": responses_of}
        try:
            file = self._file(SCORES)
        except HeaderDiffers as other:
            note(f"the judge has changed ({', '.join(other.differences)}): all responses are judged again")
            (self.folder / SCORES).unlink()
            file = self._file(SCORES)
        with file, self._file(RESPONSES) as responses:
            for index in range(file.num_chunks, len(self._sizes)):
                requests = self._part(self._starts[index])
                if progress is not None:
                    progress(self._starts[index], len(self.requests))
                samples = [_samples(line) for line in responses.chunk(index)]
                items = [(one, each) for one, some in zip(requests, samples, strict=True) for each in some]
                scores = judge.scores(items)
                file.append([{"scores": scores[first : first + self.n]} for first in range(0, len(scores), self.n)])

    def prompts(self, *, judged: bool) -> Iterator[JudgedPrompt]:
        """Every prompt with its responses, and with `judged` their scores, after `sample` and `judge`."""
        with self._file(RESPONSES) as responses, self._file(SCORES) if judged else nullcontext() as scores:
            for index, start in enumerate(self._starts):
                lines = responses.chunk(index)
                numbers = [{"scores": [None] * self.n}] * len(lines) if scores is None else scores.chunk(index)
                for offset, (request, line, each) in enumerate(zip(self._part(start), lines, numbers, strict=True)):
                    yield JudgedPrompt(
                        start + offset,
                        request.content,
                        _samples(line),
                        tuple(each["scores"]),
                        request.tools,
                        {name: value for name, value in request.row.values.items() if name in request.columns},
                    )

    def write(self, output: Path, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes the output completely, and then removes the progress. Raises `OSError`."""
        write_whole(output, ((json_text(row) + "\n").encode() for row in rows), partial=self.folder / ROWS)
        for name in (SCORES, RESPONSES):
            (self.folder / name).unlink(missing_ok=True)

    def _part(self, start: int) -> Sequence[Request]:
        return self.requests[start : start + self.chunk]

    def _file(self, name: str) -> ChunkedLines:
        return ChunkedLines(self.folder / name, self._sizes, self._headers[name])

    def _identity(self, reasoner: Reasoner, sampling: SamplingParams) -> dict[str, Any]:
        """What the responses depend on."""
        members = members_of(reasoner.model)
        return {
            "model": [fingerprint(member) for member in members],
            "dtype": str(members[0].dtype),
            "device": members[0].device.type,
            "tokenizer": tokenizer_digest(reasoner.tokenizer),
            "prompts": prompts_digest(request.ids for request in self.requests),
            "samples": self.n,
            "chunk": self.chunk,
            **{f"sampling.{name}": value for name, value in asdict(sampling).items()},
        }


def _as_json(sample: Sample) -> dict[str, Any]:
    return {name: value for name, value in asdict(sample).items() if value is not None}


def _samples(line: Mapping[str, Any]) -> tuple[Sample, ...]:
    return tuple(Sample(**sample) for sample in line["samples"])


def _shown(old: object, new: object) -> str:
    if isinstance(old, int | float | str) and isinstance(new, int | float | str) and len(f"{old}{new}") < 60:
        return f"was {old}, is {new}"
    return "has changed"
