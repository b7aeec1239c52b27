"""Serves a model with a head: classification and regression, or the scores of a reward model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from loopos.config.diagnostics import UserError
from loopos.data.conversations import ASSISTANT, Message
from loopos.data.prompts import PromptContent
from loopos.evaluation.outputs import NonFiniteOutputs
from loopos.evaluation.predictor import Predictor
from loopos.evaluation.reward_predictor import RewardPredictor
from loopos.serving.decoder import ModelThread
from loopos.serving.errors import ApiError
from loopos.serving.limits import ServingLimits
from loopos.serving.metrics import ServingMetrics
from loopos.serving.requests import ClassifyRequest, ModelRequest, ScoreRequest, read_for
from loopos.serving.responses import until_disconnected

Body = TypeVar("Body", bound=ModelRequest)
Question = TypeVar("Question")


@dataclass(frozen=True)
class Answers:
    """One object per question, in order; the number of tokens read; additional fields of the response."""

    data: list[dict[str, Any]]
    tokens: int
    more: Mapping[str, Any] = field(default_factory=dict)


class Head(Protocol[Body, Question]):
    """How a kind of head answers requests. `kind`: describes the model. `param`: the parameter to name when the model
    refuses a question, if there is only one.
    """

    endpoint: str
    kind: str
    param: str | None
    body: type[Body]

    def questions(self, request: Body) -> Sequence[Question]:
        """The questions of a request. Raises `ApiError`."""
        ...

    def answers(self, questions: Sequence[Question]) -> Answers:
        """Runs the model. Raises `UserError`."""
        ...


class ClassifyHead:
    """Predictions of a fine-tuned model."""

    endpoint = "/v1/classify"
    param: str | None = "input"
    body = ClassifyRequest

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self.kind = f"a {predictor.space.task} model"

    def questions(self, request: ClassifyRequest) -> Sequence[str | tuple[str, str]]:
        texts = request.texts()
        if not texts:
            raise ApiError(400, "input: an empty list; expected at least one text", param="input", code="invalid_value")
        return texts

    def answers(self, questions: Sequence[str | tuple[str, str]]) -> Answers:
        found, report = self._predictor.predict(questions), self._predictor.tokens
        data = [{"object": "classification", "index": index, **each} for index, each in enumerate(found)]
        return Answers(data, report.tokens, {"task": self._predictor.space.task, "truncated": report.cut})


class ScoreHead:
    """Scores by a reward model."""

    endpoint = "/v1/score"
    kind = "a reward model"
    param: str | None = None
    body = ScoreRequest

    def __init__(self, predictor: RewardPredictor) -> None:
        self._predictor = predictor

    def questions(self, request: ScoreRequest) -> Sequence[tuple[PromptContent, PromptContent]]:
        return _pairs(request, as_text=bool(self._predictor.opened.description["text"]))

    def answers(self, questions: Sequence[tuple[PromptContent, PromptContent]]) -> Answers:
        judged = self._predictor.judge(questions)
        data: list[dict[str, Any]] = []
        for index, each in enumerate(judged):
            spread = {} if each.spread is None else {"spread": each.spread}
            steps = {"steps": list(each.steps)} if each.steps else {}
            data.append({"object": "score", "index": index, "score": each.score, **spread, **steps})
        return Answers(data, sum(each.tokens for each in judged))


class HeadService(Generic[Body, Question]):
    """Answers requests by one model with a head under the name `name`."""

    def __init__(self, head: Head[Body, Question], name: str, limits: ServingLimits, metrics: ServingMetrics) -> None:
        self.name, self.kind = name, head.kind
        self._head, self._limits, self._metrics = head, limits, metrics
        self._thread = thread = ModelThread(limits)
        metrics.gauges["loopos_active_rows"] = ("Calls that run.", lambda: min(1, thread.num_calls))
        metrics.gauges["loopos_queue_length"] = ("Calls that wait.", lambda: max(0, thread.num_calls - 1))

    @property
    def endpoints(self) -> dict[str, Callable[[Request, bytes, float], Any]]:
        """Path → its handler."""
        return {self._head.endpoint: self._answer}

    @property
    def is_ready(self) -> bool:
        return True

    async def open(self) -> None:
        """The model needs no preparation."""

    async def end(self) -> None:
        """A running call cannot be ended; its request ends with its connection."""

    async def close(self) -> None:
        self._thread.close()

    async def _answer(self, request: Request, raw: bytes, deadline: float) -> Response:
        questions = self._head.questions(
            read_for(self._head.body, raw, self.name, max_messages=self._limits.max_messages)
        )
        work = self._thread.call(self._run, questions)
        found = await until_disconnected(request, work, deadline=deadline, seconds=self._limits.max_seconds)
        self._metrics.prompt_tokens += found.tokens
        usage = {"prompt_tokens": found.tokens, "total_tokens": found.tokens}
        content = {"object": "list", "model": self.name, **found.more, "data": found.data, "usage": usage}
        return JSONResponse(content)

    def _run(self, questions: Sequence[Question]) -> Answers:
        try:
            return self._head.answers(questions)
        except NonFiniteOutputs as error:
            raise ApiError(500, str(error), code="model_failed") from error
        except UserError as error:
            param = self._head.param
            message = f"{param}: {error}" if param else str(error)
            raise ApiError(400, message, param=param, code="invalid_value") from error


def _pairs(request: ScoreRequest, *, as_text: bool) -> list[tuple[PromptContent, PromptContent]]:
    """Pairs of prompt and response. as_text: the model was trained on texts as they are, without a template."""
    if (request.messages is None) == (request.prompt is None) or (request.prompt is None) != (request.response is None):
        raise ApiError(
            400,
            "expected messages that end with the assistant's, or prompt and response",
            param="messages" if request.messages is not None else "prompt",
            code="invalid_value",
        )
    if request.messages is not None:
        messages = tuple(each.message(position) for position, each in enumerate(request.messages))
        if messages[-1].role != ASSISTANT:
            raise ApiError(
                400,
                f"messages: the last message has role {messages[-1].role}; expected the assistant's response to score",
                param="messages",
                code="invalid_value",
            )
        return [(messages[:-1], messages[-1:])]
    assert request.prompt is not None
    assert request.response is not None
    responses = [request.response] if isinstance(request.response, str) else request.response
    if isinstance(request.prompt, str) and as_text:
        return [(request.prompt, response) for response in responses]
    prompt = (
        (Message("user", request.prompt),)
        if isinstance(request.prompt, str)
        else tuple(each.message(position) for position, each in enumerate(request.prompt))
    )
    return [(prompt, (Message(ASSISTANT, response),)) for response in responses]
