"""A model with a head, served: classification and regression, or the scores of a reward model.

Enters: checked requests. Leaves: responses. Left out: training and folders (`evaluation.predictor`,
`evaluation.reward_predictor`), HTTP (`serving_http.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from loopos.config.faults import UserError
from loopos.data.conversations import ASSISTANT, Message
from loopos.data.prompts import Words
from loopos.deploy.serving_decoder import ModelThread
from loopos.deploy.serving_errors import ApiError, unknown_model
from loopos.deploy.serving_limits import ServingLimits
from loopos.deploy.serving_metrics import ServingMetrics
from loopos.deploy.serving_requests import ClassifyRequest, ScoreRequest, read
from loopos.deploy.serving_streams import while_wanted
from loopos.evaluation.outputs import NonFiniteOutputs
from loopos.evaluation.predictor import Predictor
from loopos.evaluation.reward_predictor import Judged, RewardPredictor


class ClassifyService:
    """Predictions of a fine-tuned model."""

    endpoint = "/v1/classify"

    def __init__(self, predictor: Predictor, name: str, limits: ServingLimits, metrics: ServingMetrics) -> None:
        self.name, self._predictor, self._limits, self._metrics = name, predictor, limits, metrics
        self.kind = f"a {predictor.space.task} model"
        self._thread = _opened(limits, metrics)

    @property
    def endpoints(self) -> dict[str, Callable[[Request, bytes, float], Any]]:
        return {self.endpoint: self._classify}

    @property
    def is_ready(self) -> bool:
        return True

    async def open(self) -> None:
        """The model is ready as it is."""

    async def end(self) -> None:
        """A call that runs cannot be ended; its request is, with its connection."""

    async def close(self) -> None:
        self._thread.close()

    async def _classify(self, request: Request, raw: bytes, deadline: float) -> Response:
        asked = read(ClassifyRequest, raw)
        if asked.model != self.name:
            raise unknown_model(asked.model, self.name)
        texts = asked.texts()
        if not texts:
            raise ApiError(400, "input: an empty list; wanted at least one text", param="input", code="invalid_value")
        work = self._thread.call(self._predict, texts)
        found, report = await while_wanted(request, work, deadline=deadline, seconds=self._limits.max_seconds)
        self._metrics.prompt_tokens += report.tokens
        data = [{"object": "classification", "index": place, **each} for place, each in enumerate(found)]
        return JSONResponse(
            {
                "object": "list",
                "model": self.name,
                "task": self._predictor.space.task,
                "data": data,
                "truncated": report.truncated,
                "usage": {"prompt_tokens": report.tokens, "total_tokens": report.tokens},
            }
        )

    def _predict(self, texts: Sequence[str | tuple[str, str]]) -> tuple[list[dict[str, Any]], Any]:
        try:
            return self._predictor.predict(texts), self._predictor.tokens
        except NonFiniteOutputs as error:
            raise ApiError(500, str(error), code="model_failed") from error
        except UserError as error:
            raise ApiError(400, f"input: {error}", param="input", code="invalid_value") from error


class ScoreService:
    """Scores by a reward model."""

    endpoint = "/v1/score"
    kind = "a reward model"

    def __init__(self, predictor: RewardPredictor, name: str, limits: ServingLimits, metrics: ServingMetrics) -> None:
        self.name, self._predictor, self._limits, self._metrics = name, predictor, limits, metrics
        self._thread = _opened(limits, metrics)

    @property
    def endpoints(self) -> dict[str, Callable[[Request, bytes, float], Any]]:
        return {self.endpoint: self._score}

    @property
    def is_ready(self) -> bool:
        return True

    async def open(self) -> None:
        """The model is ready as it is."""

    async def end(self) -> None:
        """A call that runs cannot be ended; its request is, with its connection."""

    async def close(self) -> None:
        self._thread.close()

    async def _score(self, request: Request, raw: bytes, deadline: float) -> Response:
        asked = read(ScoreRequest, raw)
        if asked.model != self.name:
            raise unknown_model(asked.model, self.name)
        pairs = _pairs(asked, as_text=bool(self._predictor.opened.description["text"]))
        work = self._thread.call(self._judge, pairs)
        judged = await while_wanted(request, work, deadline=deadline, seconds=self._limits.max_seconds)
        tokens = sum(each.tokens for each in judged)
        self._metrics.prompt_tokens += tokens
        data = []
        for place, each in enumerate(judged):
            spread = {} if each.spread is None else {"spread": each.spread}
            data.append({"object": "score", "index": place, "score": each.score, **spread})
        count = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "model": self.name, "data": data, "usage": count})

    def _judge(self, pairs: Sequence[tuple[Words, Words]]) -> list[Judged]:
        try:
            return self._predictor.judge(pairs)
        except UserError as error:
            raise ApiError(400, str(error), code="invalid_value") from error


def _pairs(asked: ScoreRequest, *, as_text: bool) -> list[tuple[Words, Words]]:
    """Prompts with a response each. as_text: the model was trained on texts as they stand, without a template."""
    if (asked.messages is None) == (asked.prompt is None) or (asked.prompt is None) != (asked.response is None):
        raise ApiError(
            400,
            "wanted messages whose last one is the assistant's, or prompt and response",
            param="messages" if asked.messages is not None else "prompt",
            code="invalid_value",
        )
    if asked.messages is not None:
        said = tuple(message.message() for message in asked.messages)
        if said[-1].role != ASSISTANT:
            raise ApiError(
                400,
                f"messages: the last one is the {said[-1].role}'s; wanted the assistant's, which is judged",
                param="messages",
                code="invalid_value",
            )
        return [(said[:-1], said[-1:])]
    assert asked.prompt is not None
    assert asked.response is not None
    responses = [asked.response] if isinstance(asked.response, str) else asked.response
    if isinstance(asked.prompt, str) and as_text:
        return [(asked.prompt, response) for response in responses]
    asking = (
        (Message("user", asked.prompt),)
        if isinstance(asked.prompt, str)
        else tuple(message.message() for message in asked.prompt)
    )
    return [(asking, (Message(ASSISTANT, response),)) for response in responses]


def _opened(limits: ServingLimits, metrics: ServingMetrics) -> ModelThread:
    thread = ModelThread(limits)
    metrics.gauges["loopos_active_rows"] = ("Calls that run.", lambda: min(1, thread.num_calls))
    metrics.gauges["loopos_queue_length"] = ("Calls that wait.", lambda: max(0, thread.num_calls - 1))
    return thread
