"""A language model, served: chat, completions and embeddings; and tokenization of requests beside the event loop.

The code that encodes training data also encodes prompts, except that control tokens spelled in user and system messages
are encoded as text.
"""

from __future__ import annotations

import asyncio
import base64
import copy
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from transformers import PreTrainedTokenizerBase

from loopos.config.diagnostics import UserError
from loopos.data.conversations import Message
from loopos.data.rows import Row
from loopos.data.spelled_tokens import SpelledTokens
from loopos.data.supervised_rows import Completion as RawText
from loopos.data.supervised_tokens import prompt_tokens
from loopos.data.templates import ChatTemplate, TemplateRefusal
from loopos.data.tool_calls import Scan
from loopos.data.tool_schemas import Tool
from loopos.data.tool_turns import ToolTurns
from loopos.evaluation.reasoning import Reasoner
from loopos.generation.settings import SamplingParams
from loopos.serving.decoder import Decoder, ModelThread, PendingRequest
from loopos.serving.errors import ApiError
from loopos.serving.limits import ServingLimits, check_rows
from loopos.serving.messages import conversation
from loopos.serving.metrics import ServingMetrics
from loopos.serving.requests import ChatRequest, CompletionRequest, EmbeddingRequest, Generation, ModelRequest, read_for
from loopos.serving.responses import EventStream, GrowingChoice, ResponseFormatter, event, until_disconnected

Result = TypeVar("Result")


class Prompts:
    """A chat template and a tokenizer with a thread of their own: tokenizers are not thread-safe, and the model's
    thread uses the engine's.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self._template = copy.deepcopy(template)
        self._spelled = SpelledTokens(self._template)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._template.tokenizer

    async def of_chat(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """The ids that the next turn starts from. Raises `ApiError` if the template refuses the messages."""
        return await self.run(self._of_chat, messages, tools)

    async def of_texts(self, inputs: Sequence[str | list[int]]) -> list[list[int]]:
        """The ids of texts to continue, as `loopos generate --raw` encodes them; lists of ids are unchanged."""
        return await self.run(self._of_texts, inputs)

    async def run(self, function: Callable[..., Result], *arguments: object) -> Result:
        """What a function that uses the tokenizer returns or raises."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _of_chat(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        try:
            return self._spelled.prompt(messages, tools)
        except TemplateRefusal as refusal:
            raise ApiError(400, f"messages: {refusal}", param="messages", code="invalid_value") from refusal

    def _of_texts(self, inputs: Sequence[str | list[int]]) -> list[list[int]]:
        return [
            prompt_tokens(self.tokenizer, RawText(each, "", Row({}, "request", None, 0)), template=self._template)
            if isinstance(each, str)
            else each
            for each in inputs
        ]


Body = TypeVar("Body", bound=ModelRequest)
# Tokens of one forward pass of embeddings; decoding rows wait no longer than that.
_EMBEDDED_TOKENS = 2048


class LanguageService:
    """Answers requests by one language model under the name `name`."""

    kind = "a language model"

    def __init__(
        self,
        reasoner: Reasoner,
        name: str,
        limits: ServingLimits,
        metrics: ServingMetrics,
        *,
        tool_parser: str = "auto",
    ) -> None:
        """tool_parser: of `loopos list tool-parsers`. Raises `UserError` for an unknown one."""
        self.name, self._limits, self._metrics = name, limits, metrics
        self._engine, self._stops = reasoner.engine, reasoner.sampling
        positions = self._engine.max_positions
        self.context = limits.max_context if positions is None else min(positions, limits.max_context)
        self._thread = ModelThread(limits)
        self._decoder = Decoder(self._engine, self._thread, limits)
        self._prompts = Prompts(reasoner.template)
        self._tools = _tool_turns(reasoner, tool_parser)
        metrics.gauges["loopos_active_rows"] = ("Completions that decode.", lambda: self._decoder.num_active)
        metrics.gauges["loopos_queue_length"] = ("Completions that wait for a row.", lambda: self._decoder.num_waiting)

    @property
    def endpoints(self) -> dict[str, Callable[[Request, bytes, float], Any]]:
        """Path → its handler."""
        answers: dict[str, Callable[[Request, bytes, float], Any]]
        answers = {"/v1/chat/completions": self._chat, "/v1/completions": self._complete}
        return {**answers, "/v1/embeddings": self._embed} if self._engine.embeds else answers

    @property
    def is_ready(self) -> bool:
        return self._decoder.is_ready

    async def open(self) -> None:
        await self._decoder.open()

    async def end(self) -> None:
        await self._decoder.end()

    async def close(self) -> None:
        await self._decoder.close()
        self._thread.close()
        self._prompts.close()

    async def _chat(self, request: Request, raw: bytes, deadline: float) -> Response:
        body = self._read(ChatRequest, raw)
        if body.top_logprobs:
            raise ApiError(
                400,
                "top_logprobs: logprobs of other tokens are not available; logprobs returns those of the chosen tokens",
                param="top_logprobs",
                code="unsupported_parameter",
            )
        messages, tools = conversation(body.messages), body.offered()
        if tools and isinstance(self._tools, UserError):
            raise ApiError(400, f"tools: {self._tools}", param="tools", code="unsupported_parameter")

        async def prompts() -> list[list[int]]:
            return [await self._prompts.of_chat(messages, tools)]

        return await self._answer(request, body, prompts, 1, "messages", deadline, logprobs=body.logprobs)

    async def _complete(self, request: Request, raw: bytes, deadline: float) -> Response:
        body = self._read(CompletionRequest, raw)
        if body.logprobs:
            raise ApiError(
                400,
                "logprobs: logprobs of other tokens are not available; 0 returns those of the chosen tokens",
                param="logprobs",
                code="unsupported_parameter",
            )
        texts = body.prompts()

        async def prompts() -> list[list[int]]:
            return await self._prompts.of_texts(texts)

        return await self._answer(request, body, prompts, len(texts), "prompt", deadline, logprobs=body.logprobs == 0)

    def _scan(self, body: ChatRequest | CompletionRequest) -> Scan | None:
        """The parser of the calls in the answer to a request; None without tools."""
        has_tools = isinstance(body, ChatRequest) and bool(body.offered())
        return self._tools.scan if has_tools and isinstance(self._tools, ToolTurns) else None

    def _count_malformed(self, number: int) -> None:
        self._metrics.malformed_calls += number

    def _read(self, kind: type[Body], raw: bytes) -> Body:
        return read_for(kind, raw, self.name, max_messages=self._limits.max_messages)

    async def _answer(
        self,
        request: Request,
        body: ChatRequest | CompletionRequest,
        tokenized: Callable[[], Coroutine[Any, Any, list[list[int]]]],
        count: int,
        param: str,
        deadline: float,
        *,
        logprobs: bool,
    ) -> Response:
        """tokenized: makes the ids of the `count` prompts, after all checks that do not need them."""
        if body.stream_options is not None and not body.stream:
            raise ApiError(400, "stream_options: only with stream", param="stream_options", code="invalid_value")
        general, most = self._general(body, count)
        prompts = await until_disconnected(request, tokenized(), deadline=deadline, seconds=self._limits.max_seconds)
        self._check(prompts, param)
        # The last token is never an input, so it needs no position.
        settings = [replace(general, max_new_tokens=min(most, self.context + 1 - len(prompt))) for prompt in prompts]
        pending = PendingRequest(prompts, settings, n=body.n, streams=body.stream, max_lag=self._limits.max_lag)
        form = ResponseFormatter(
            "chat" if isinstance(body, ChatRequest) else "text",
            self.name,
            body.n,
            logprobs,
            body.includes_usage,
            self._prompts.tokenizer,
            self._scan(body),
            self._count_malformed,
        )
        seconds = self._limits.max_seconds
        num_prompt = sum(map(len, prompts))
        try:
            self._decoder.submit(pending)
            self._metrics.prompt_tokens += num_prompt
            if not body.stream:
                completions = await until_disconnected(
                    request, pending.completions(), deadline=deadline, seconds=seconds
                )
                self._metrics.generated_tokens += sum(len(completion.token_ids) for completion in completions)
                return JSONResponse(await self._prompts.run(form.whole, completions, num_prompt))
            chunks = self._chunks(pending, form, num_prompt, request.scope["state"]["began"])
            first = await until_disconnected(request, _next(chunks), deadline=deadline, seconds=seconds)
        # Also on cancellation, as when the client disconnects: its rows must be freed.
        except BaseException:
            self._decoder.leave(pending)
            raise
        finally:
            if not body.stream:
                self._decoder.leave(pending)

        def cut(reason: str) -> None:
            self._metrics.cut[reason] += 1

        return EventStream(
            _after(first, chunks),
            overflowed=pending.overflowed,
            ended=lambda: self._decoder.leave(pending),
            cut=cut,
            deadline=deadline,
            seconds=seconds,
        )

    async def _chunks(
        self, pending: PendingRequest, form: ResponseFormatter, num_prompt: int, began: float
    ) -> AsyncIterator[bytes]:
        """The events of a stream except the last."""
        grown: dict[tuple[int, int], GrowingChoice] = {}
        made = 0
        async for delta in pending.deltas():
            if not made:
                self._metrics.first_token.observe(asyncio.get_running_loop().time() - began)
                for chunk in form.opening(pending.count):
                    yield event(chunk)
            made += 1
            self._metrics.generated_tokens += 1
            choice = (delta.prompt_index, delta.sample_index)
            if choice not in grown:
                grown[choice] = form.growing()
            for chunk in form.chunks(delta, grown[choice]):
                yield event(chunk)
        if form.includes_usage:
            yield event(form.last(num_prompt, made))

    def _general(self, body: Generation, count: int) -> tuple[SamplingParams, int]:
        """The settings for each of `count` prompts, and the maximum of new tokens. Raises `ApiError` for values that
        the model or this server does not accept.
        """
        try:
            check_rows(count * body.n, self._limits)
        except UserError as error:
            raise ApiError(400, str(error), param="n", code="invalid_value") from error
        most, name = body.new_tokens()
        if most is not None and most > self._limits.max_tokens:
            raise ApiError(
                400,
                f"{name}: got {most}; this server's limit is {self._limits.max_tokens}",
                param=name,
                code="invalid_value",
            )
        settings = self._stops(body.settings())
        for token in settings.logit_bias:
            if token >= self._engine.vocab_size:
                raise ApiError(
                    400,
                    f"logit_bias for token {token}: the model has only {self._engine.vocab_size} tokens",
                    param="logit_bias",
                    code="invalid_value",
                )
        return settings, self._limits.max_tokens if most is None else most

    def _check(self, prompts: Sequence[list[int]], param: str) -> None:
        for prompt in prompts:
            if len(prompt) > self.context:
                raise ApiError(
                    400,
                    f"{param}: {len(prompt)} tokens; the context has room for {self.context}",
                    param=param,
                    code="context_length_exceeded",
                )
            try:
                self._engine.limit(prompt, 1)
            except UserError as error:
                raise ApiError(400, f"{param}: {error}", param=param, code="invalid_value") from error

    async def _embed(self, request: Request, raw: bytes, deadline: float) -> Response:
        body = self._read(EmbeddingRequest, raw)
        inputs, seconds = body.inputs(), self._limits.max_seconds
        sequences = await until_disconnected(
            request, self._prompts.of_texts(inputs), deadline=deadline, seconds=seconds
        )
        self._check(sequences, "input")
        num_tokens = sum(map(len, sequences))
        self._metrics.prompt_tokens += num_tokens
        vectors = await until_disconnected(request, self._vectors(sequences), deadline=deadline, seconds=seconds)
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
                if body.encoding_format == "base64"
                else vector.tolist(),
            }
            for index, vector in enumerate(vectors)
        ]
        count = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        return JSONResponse({"object": "list", "data": data, "model": self.name, "usage": count})

    async def _vectors(self, sequences: Sequence[list[int]]) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
        """The vector of each sequence, in batches between which other rows decode."""
        vectors: list[np.ndarray[Any, np.dtype[np.float32]]] = []
        for pack in _packs(sequences):
            found = await self._thread.call(self._engine.embed, pack)
            vectors += list(found.cpu().numpy())
        return vectors


def _tool_turns(reasoner: Reasoner, parser: str) -> ToolTurns | UserError:
    """How calls are read under the model's template, or why they cannot be. Raises `UserError` for an unknown parser,
    and for a parser that was named in vain.
    """
    try:
        return ToolTurns(reasoner.template, parser=parser)
    except UserError as problem:
        if parser != "auto":
            raise
        return problem


def _packs(sequences: Sequence[list[int]]) -> list[list[list[int]]]:
    """Batches of sequences, in order, each of at most `_EMBEDDED_TOKENS` tokens; a longer sequence gets its own."""
    packs: list[list[list[int]]] = []
    room = 0
    for sequence in sequences:
        if len(sequence) > room:
            packs.append([])
            room = _EMBEDDED_TOKENS
        packs[-1].append(sequence)
        room -= len(sequence)
    return packs


async def _next(chunks: AsyncIterator[bytes]) -> bytes:
    return await anext(chunks)


async def _after(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for chunk in rest:
        yield chunk
