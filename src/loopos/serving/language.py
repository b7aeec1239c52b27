"""Messages and texts → tokens, beside the event loop.

Enters: what requests ask. Leaves: the ids that generation starts from, made by the code that training makes them with,
but for control tokens in the words of users and of the system: text that spells one is text. Left out: whether the ids
fit (`language.py`).

A language model, served: chat, completions and embeddings.

Enters: checked requests. Leaves: responses. Left out: prompts (`prompts.py`), the rows (`decoder.py`),
what answers look like (`forms.py`), HTTP (`http.py`).
"""

from __future__ import annotations

import asyncio
import base64
import copy
import re
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from transformers import PreTrainedTokenizerBase

from loopos.config.diagnostics import UserError
from loopos.data.conversations import ASSISTANT, Message
from loopos.data.piece_tokens import SegmentTokenizer
from loopos.data.record import shown
from loopos.data.rows import Row
from loopos.data.supervised_rows import Completion as RawText
from loopos.data.supervised_tokens import prompt_tokens
from loopos.data.templates import ChatTemplate, Segment, TemplateRefusal
from loopos.evaluation.reasoning import Reasoner
from loopos.generation.settings import SamplingSettings
from loopos.serving.decoder import Decoder, ModelThread, Ticket
from loopos.serving.errors import ApiError
from loopos.serving.limits import ServingLimits, check_rows
from loopos.serving.metrics import ServingMetrics
from loopos.serving.requests import Asked, ChatRequest, CompletionRequest, EmbeddingRequest, Generation, read_for
from loopos.serving.responses import EventStream, Form, event, until_disconnected

Result = TypeVar("Result")


class Prompts:
    """A chat template and a tokenizer with a thread of their own: tokenizers are not made for two threads, and the
    model's thread uses the engine's.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self._template = copy.deepcopy(template)
        tokens = self.tokenizer.added_tokens_decoder.values()
        special = {token.content for token in tokens if token.special} | set(self.tokenizer.all_special_tokens)
        spelled = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True) if token)
        self._control = re.compile(f"({spelled})" if spelled else r"(?!)()")
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._template.tokenizer

    async def of_chat(self, messages: Sequence[Message]) -> list[int]:
        """The ids that the next turn starts from. Raises `ApiError` for what the template refuses."""
        return await self.run(self._of_chat, messages)

    async def of_texts(self, inputs: Sequence[str | list[int]]) -> list[list[int]]:
        """The ids of texts that go on, as `loopos generate --raw` makes them; lists of ids stay as they are."""
        return await self.run(self._of_texts, inputs)

    async def run(self, function: Callable[..., Result], *arguments: object) -> Result:
        """What a function that uses the tokenizer returns or raises."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _of_chat(self, messages: Sequence[Message]) -> list[int]:
        try:
            if any(message.role != ASSISTANT and self._control.search(message.content) for message in messages):
                return self._with_spelled_tokens(messages)
            return prompt_tokens(self.tokenizer, messages, template=self._template)
        except TemplateRefusal as refusal:
            raise ApiError(400, f"messages: {refusal}", param="messages", code="invalid_value") from refusal

    def _with_spelled_tokens(self, messages: Sequence[Message]) -> list[int]:
        """The ids where users or the system spell control tokens: what they spell is tokenised apart, as text. The
        assistant's earlier words are the model's own, whose step markers may be control tokens.
        """
        # Nobody can write the stand-ins of a request whose mark he does not know.
        mark = secrets.token_hex(8)
        spelled: list[str] = []

        def stand_in(found: re.Match[str]) -> str:
            spelled.append(found[0])
            return f"\ue000{mark}-{len(spelled) - 1}\ue001"

        with_stand_ins = [
            each if each.role == ASSISTANT else replace(each, content=self._control.sub(stand_in, each.content))
            for each in messages
        ]
        changed = f"the chat template changes {shown(spelled[0])}, which a message holds as text"
        try:
            rendered = self._template.prompt(with_stand_ins)
        except TemplateRefusal as refusal:
            if mark in str(refusal):
                raise TemplateRefusal(changed) from refusal
            raise
        # Every second part of a piece is the number of a token.
        parts = [(piece, re.split(f"\ue000{mark}-([0-9]+)\ue001", piece.text)) for piece in rendered]
        numbers = {int(number) for _, texts in parts for number in texts[1::2]}
        if len(numbers) < len(spelled):
            raise TemplateRefusal(changed)
        row = [
            Segment(
                "" if index % 2 else text,
                begins=piece.begins and index == 0,
                closes=piece.closes and index == len(texts) - 1,
            )
            for piece, texts in parts
            for index, text in enumerate(texts)
        ]
        (encoded,) = SegmentTokenizer(self.tokenizer).encode([row])
        flat = [(index, text) for _, texts in parts for index, text in enumerate(texts)]
        ids: list[int] = []
        for (index, text), tokens in zip(flat, encoded, strict=True):
            ids += self._as_text(spelled[int(text)]) if index % 2 else tokens
        return ids

    def _as_text(self, spelled: str) -> list[int]:
        """The ids of a control token's spelling that are no control tokens. Raises `TemplateRefusal`."""
        ids: list[int] = self.tokenizer(spelled, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if set(ids) & set(self.tokenizer.all_special_ids):
            raise TemplateRefusal(f"the tokenizer cannot read {shown(spelled)}, a control token, as text")
        return ids

    def _of_texts(self, inputs: Sequence[str | list[int]]) -> list[list[int]]:
        return [
            prompt_tokens(self.tokenizer, RawText(each, "", Row({}, "request", None, 0)), template=self._template)
            if isinstance(each, str)
            else each
            for each in inputs
        ]


Body = TypeVar("Body", bound=Asked)
# Tokens of one forward pass of embeddings: rows that decode wait for no more.
_EMBEDDED_TOKENS = 2048


class LanguageService:
    """Answers by one language model under the name `name`."""

    kind = "a language model"

    def __init__(self, reasoner: Reasoner, name: str, limits: ServingLimits, metrics: ServingMetrics) -> None:
        self.name, self._limits, self._metrics = name, limits, metrics
        self._engine, self._stops = reasoner.engine, reasoner.sampling
        positions = self._engine.max_positions
        self.context = limits.max_context if positions is None else min(positions, limits.max_context)
        self._thread = ModelThread(limits)
        self._decoder = Decoder(self._engine, self._thread, limits)
        self._prompts = Prompts(reasoner.template)
        metrics.gauges["loopos_active_rows"] = ("Completions that decode.", lambda: self._decoder.num_active)
        metrics.gauges["loopos_queue_length"] = ("Completions that wait for a row.", lambda: self._decoder.num_waiting)

    @property
    def endpoints(self) -> dict[str, Callable[[Request, bytes, float], Any]]:
        """Path → what answers it."""
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
        asked = self._read(ChatRequest, raw)
        if asked.top_logprobs:
            raise ApiError(
                400,
                "top_logprobs: other tokens' logprobs are not kept; logprobs alone gives the chosen tokens'",
                param="top_logprobs",
                code="unsupported_parameter",
            )
        messages = [message.message() for message in asked.messages]

        async def prompts() -> list[list[int]]:
            return [await self._prompts.of_chat(messages)]

        return await self._answer(request, asked, prompts, 1, "messages", deadline, logprobs=asked.logprobs)

    async def _complete(self, request: Request, raw: bytes, deadline: float) -> Response:
        asked = self._read(CompletionRequest, raw)
        if asked.logprobs:
            raise ApiError(
                400,
                "logprobs: other tokens' logprobs are not kept; 0 gives those of the chosen tokens",
                param="logprobs",
                code="unsupported_parameter",
            )
        texts = asked.prompts()

        async def prompts() -> list[list[int]]:
            return await self._prompts.of_texts(texts)

        return await self._answer(request, asked, prompts, len(texts), "prompt", deadline, logprobs=asked.logprobs == 0)

    def _read(self, kind: type[Body], raw: bytes) -> Body:
        return read_for(kind, raw, self.name, max_messages=self._limits.max_messages)

    async def _answer(
        self,
        request: Request,
        asked: ChatRequest | CompletionRequest,
        tokenised: Callable[[], Coroutine[Any, Any, list[list[int]]]],
        count: int,
        param: str,
        deadline: float,
        *,
        logprobs: bool,
    ) -> Response:
        """tokenised: makes the ids of the `count` prompts, once all that can be checked without them is."""
        if asked.stream_options is not None and not asked.stream:
            raise ApiError(400, "stream_options: only with stream", param="stream_options", code="invalid_value")
        general, most = self._general(asked, count)
        prompts = await until_disconnected(request, tokenised(), deadline=deadline, seconds=self._limits.max_seconds)
        self._check(prompts, param)
        # The last token is never fed, so it needs no position.
        settings = [replace(general, max_new_tokens=min(most, self.context + 1 - len(prompt))) for prompt in prompts]
        ticket = Ticket(prompts, settings, n=asked.n, streams=asked.stream, max_lag=self._limits.max_lag)
        form = Form(
            "chat" if isinstance(asked, ChatRequest) else "text",
            self.name,
            asked.n,
            logprobs,
            asked.includes_usage,
            self._prompts.tokenizer,
        )
        seconds = self._limits.max_seconds
        num_prompt = sum(map(len, prompts))
        try:
            self._decoder.submit(ticket)
            self._metrics.prompt_tokens += num_prompt
            if not asked.stream:
                completions = await until_disconnected(
                    request, ticket.completions(), deadline=deadline, seconds=seconds
                )
                self._metrics.generated_tokens += sum(len(completion.token_ids) for completion in completions)
                return JSONResponse(await self._prompts.run(form.whole, completions, num_prompt))
            chunks = self._chunks(ticket, form, num_prompt, request.scope["state"]["began"])
            first = await until_disconnected(request, _next(chunks), deadline=deadline, seconds=seconds)
        # Cancelled too, as when the client is gone: its rows must not go on.
        except BaseException:
            self._decoder.leave(ticket)
            raise
        finally:
            if not asked.stream:
                self._decoder.leave(ticket)

        def cut(reason: str) -> None:
            self._metrics.cut[reason] += 1

        return EventStream(
            _after(first, chunks),
            overflowed=ticket.overflowed,
            ended=lambda: self._decoder.leave(ticket),
            cut=cut,
            deadline=deadline,
            seconds=seconds,
        )

    async def _chunks(self, ticket: Ticket, form: Form, num_prompt: int, began: float) -> AsyncIterator[bytes]:
        """The events of a stream but for the last."""
        offsets: dict[tuple[int, int], int] = {}
        made = 0
        async for piece in ticket.pieces():
            if not made:
                self._metrics.first_token.observe(asyncio.get_running_loop().time() - began)
                for chunk in form.opening(ticket.count):
                    yield event(chunk)
            made += 1
            self._metrics.generated_tokens += 1
            choice = (piece.prompt_index, piece.sample_index)
            found = form.chunks(piece, offsets.get(choice, 0))
            offsets[choice] = offsets.get(choice, 0) + len(piece.text)
            for chunk in found:
                yield event(chunk)
        if form.includes_usage:
            yield event(form.last(num_prompt, made))

    def _general(self, asked: Generation, count: int) -> tuple[SamplingSettings, int]:
        """The settings of each of `count` prompts, and the most new tokens. Raises `ApiError` for what the model or
        this server cannot take.
        """
        try:
            check_rows(count * asked.n, self._limits)
        except UserError as error:
            raise ApiError(400, str(error), param="n", code="invalid_value") from error
        most, name = asked.new_tokens()
        if most is not None and most > self._limits.max_tokens:
            raise ApiError(
                400,
                f"{name}: got {most}; this server's limit is {self._limits.max_tokens}",
                param=name,
                code="invalid_value",
            )
        settings = self._stops(asked.settings())
        for token in settings.logit_bias:
            if token >= self._engine.vocab_size:
                raise ApiError(
                    400,
                    f"logit_bias for token {token}: the model has {self._engine.vocab_size} tokens",
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
        asked = self._read(EmbeddingRequest, raw)
        inputs, seconds = asked.inputs(), self._limits.max_seconds
        sequences = await until_disconnected(
            request, self._prompts.of_texts(inputs), deadline=deadline, seconds=seconds
        )
        self._check(sequences, "input")
        num_tokens = sum(map(len, sequences))
        self._metrics.prompt_tokens += num_tokens
        vectors = await until_disconnected(request, self._vectors(sequences), deadline=deadline, seconds=seconds)
        told = [
            {
                "object": "embedding",
                "index": index,
                "embedding": base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
                if asked.encoding_format == "base64"
                else vector.tolist(),
            }
            for index, vector in enumerate(vectors)
        ]
        count = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        return JSONResponse({"object": "list", "data": told, "model": self.name, "usage": count})

    async def _vectors(self, sequences: Sequence[list[int]]) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
        """The vector of each sequence, in packs between which rows decode."""
        vectors: list[np.ndarray[Any, np.dtype[np.float32]]] = []
        for pack in _packs(sequences):
            found = await self._thread.call(self._engine.embed, pack)
            vectors += list(found.cpu().numpy())
        return vectors


def _packs(sequences: Sequence[list[int]]) -> list[list[list[int]]]:
    """Sequences, in order, in packs of so many tokens at most; a longer one is alone."""
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
