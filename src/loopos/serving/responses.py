"""Responses: work with a time limit that stops when the client disconnects, and completions in OpenAI's JSON.

A client that disconnects, or reads a stream too slowly, ends the work at once.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from transformers import PreTrainedTokenizerBase

from loopos.data.tool_calls import Scan, ToolCall, ToolReader, parse_turn
from loopos.generation.completions import Completion, GrowingText, TokenDelta, decoded
from loopos.serving.errors import GONE, ApiError, gone, out_of_time

Result = TypeVar("Result")
DONE = b"data: [DONE]\n\n"


def event(chunk: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(chunk, ensure_ascii=False, separators=(",", ":")).encode("utf-8") + b"\n\n"


async def until_disconnected(
    request: Request, work: Coroutine[Any, Any, Result], *, deadline: float, seconds: float
) -> Result:
    """The result of `work`. Raises `ApiError`: 408 at the deadline (of the event loop's clock; `seconds` names the
    limit), 499 if the client disconnected. The work is then cancelled, and has ended when this returns.
    """
    task = asyncio.ensure_future(work)
    left = asyncio.ensure_future(_until_gone(request.receive))
    try:
        await _first_of([task, left], deadline)
        if task.done():
            return task.result()
        raise gone() if left.done() else out_of_time(seconds)
    finally:
        await _ended(task, left)


class EventStream(Response):
    """A stream of server-sent events, the first of which is available already."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[bytes],
        *,
        overflowed: asyncio.Event,
        ended: Callable[[], None],
        cut: Callable[[str], None],
        deadline: float,
        seconds: float,
    ) -> None:
        """overflowed: set when the client lags too far behind. ended: called when nothing more is sent. cut: called
        with the reason when the connection is cut by `abort` in the scope's state.
        """
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._overflowed, self._finish, self._cut = events, overflowed, ended, cut
        self._deadline, self._seconds = deadline, seconds
        self._is_sending = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.ensure_future(self._send_all(send))
        left = asyncio.ensure_future(_until_gone(receive))
        slow = asyncio.ensure_future(self._overflowed.wait())
        try:
            await _first_of([task, left, slow], self._deadline)
            if task.done():
                task.result()
            elif left.done():
                scope["state"]["ended_as"] = GONE
            elif slow.done() or self._is_sending:
                self._cut("slow_reader" if slow.done() else "timeout")
                scope["state"]["ended_as"] = 408
                scope["state"]["abort"]()
                # The server notices the cut within its next iterations.
                await asyncio.wait([left], timeout=1)
            else:
                scope["state"]["ended_as"] = 408
                await _ended(task)
                await self._send(send, event(out_of_time(self._seconds).body()), more=False)
        finally:
            await _ended(task, left, slow)
            self._finish()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for chunk in self._events:
                await self._send(send, chunk, more=True)
        except ApiError as error:
            await self._send(send, event(error.body()), more=False)
            return
        await self._send(send, DONE, more=False)

    async def _send(self, send: Send, chunk: bytes, *, more: bool) -> None:
        self._is_sending = True
        await send({"type": "http.response.body", "body": chunk, "more_body": more})
        self._is_sending = False


async def _until_gone(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _first_of(tasks: list[asyncio.Future[Any]], deadline: float) -> None:
    """Waits until one task is done, or the deadline has passed."""
    timeout = max(0.0, deadline - asyncio.get_running_loop().time())
    await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)


async def _ended(*tasks: asyncio.Future[Any]) -> None:
    """Cancels the tasks, and waits until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def finish(reason: str | None, *, called: bool = False) -> str | None:
    """OpenAI's finish reason of a completion. called: it has calls of tools."""
    if reason is None or reason == "length":
        return reason
    return "tool_calls" if called else "stop"


def called_tools(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    """Calls in OpenAI's form, each with an id of its own: nine characters, as Mistral's templates require."""
    return [
        {
            "id": secrets.token_hex(5)[:9],
            "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
        }
        for call in calls
    ]


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Each prompt counts once, however many completions it has; the stop token of a completion counts."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


@dataclass
class GrowingChoice:
    """A choice of a stream: its text so far, and with tools the reader of its calls."""

    reader: ToolReader | None
    text: str = ""


@dataclass(frozen=True)
class ResponseFormatter:
    """Formats the response of one request. `n`: completions per prompt, which number the choices. `scan`: the parser of
    tool calls, None without tools; `malformed` is told how many calls could not be read.
    """

    kind: Literal["chat", "text"]
    model: str
    n: int
    logprobs: bool
    includes_usage: bool
    tokenizer: PreTrainedTokenizerBase
    scan: Scan | None = None
    malformed: Callable[[int], None] = lambda number: None
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, completions: Sequence[Completion], prompt_tokens: int) -> dict[str, Any]:
        """The response to a request without a stream."""
        made = sum(len(completion.token_ids) for completion in completions)
        choices = [self._choice(completion) for completion in completions]
        kind = "chat.completion" if self.kind == "chat" else "text_completion"
        return {**self._frame(kind, choices), "usage": usage(prompt_tokens, made)}

    def opening(self, number: int) -> list[dict[str, Any]]:
        """The chunks before the first token of each of `number` choices: in a chat, the role."""
        if self.kind == "text":
            return []
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(index, {"delta": delta}, None, None) for index in range(number)]

    def chunks(self, delta: TokenDelta, grown: GrowingChoice) -> list[dict[str, Any]]:
        """The chunks of one token: its text, if any, each call that it completes, and after the last token an empty
        chunk with the finish reason. grown: the choice before the token.
        """
        index, offset, text = self._index(delta), len(grown.text), delta.text
        found, calls = list[dict[str, Any]](), list[ToolCall]()
        grown.text += delta.text
        if grown.reader is not None:
            first = len(grown.reader.calls)
            text, calls = grown.reader.read(grown.text, ended=delta.finish_reason is not None)
        has_logprob = self.logprobs and delta.finish_reason != "stop"
        if text or has_logprob:
            logprobs = self._logprobs([delta.token], [delta.logprob], [offset]) if has_logprob else None
            found.append(self._chunk(index, self._content(text), logprobs, None))
        for number, call in enumerate(called_tools(calls)):
            content = {"delta": {"tool_calls": [{"index": first + number, **call}]}}
            found.append(self._chunk(index, content, None, None))
        if delta.finish_reason is not None:
            called = grown.reader is not None and bool(grown.reader.calls)
            found.append(self._chunk(index, self._content(""), None, finish(delta.finish_reason, called=called)))
            self.malformed(len(grown.reader.malformed) if grown.reader is not None else 0)
        return found

    def growing(self) -> GrowingChoice:
        """A choice of a stream before its first token."""
        return GrowingChoice(None if self.scan is None else ToolReader(self.scan))

    def _content(self, text: str) -> dict[str, Any]:
        """The part of a chunk that holds text."""
        if self.kind == "text":
            return {"text": text}
        return {"delta": {"content": text} if text else {}}

    def last(self, prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
        """The chunk without choices that reports the usage."""
        return {**self._frame(self._chunk_kind, []), "usage": usage(prompt_tokens, completion_tokens)}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.kind == "chat" else "text_completion"

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        prefix = "chatcmpl" if self.kind == "chat" else "cmpl"
        return {
            "id": f"{prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _index(self, made: TokenDelta | Completion) -> int:
        return made.prompt_index * self.n + made.sample_index

    def _choice(self, completion: Completion) -> dict[str, Any]:
        logprobs = None
        if self.logprobs:
            ended = completion.finish_reason == "stop"
            tokens = completion.token_ids[: -1 if ended else None]
            text = GrowingText(self.tokenizer)
            for token in tokens:
                text.add(token)
            logprobs = self._logprobs(tokens, completion.logprobs[: len(tokens)], [0, *text.ends][: len(tokens)])
        content: dict[str, Any] = {"text": completion.text}
        called = False
        if self.kind == "chat":
            message: dict[str, Any] = {"role": "assistant", "content": completion.text, "refusal": None}
            if self.scan is not None:
                turn = parse_turn(self.scan, completion.text)
                called = bool(turn.calls)
                self.malformed(len(turn.malformed))
                message["content"] = turn.content or (None if called else "")
                message |= {"tool_calls": called_tools(turn.calls)} if called else {}
            content = {"message": message}
        reason = finish(completion.finish_reason, called=called)
        return {"index": self._index(completion), **content, "logprobs": logprobs, "finish_reason": reason}

    def _chunk(
        self, index: int, content: dict[str, Any], logprobs: dict[str, Any] | None, reason: str | None
    ) -> dict[str, Any]:
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}
        frame = self._frame(self._chunk_kind, [choice])
        return {**frame, "usage": None} if self.includes_usage else frame

    def _logprobs(self, tokens: Sequence[int], logprobs: Sequence[float], offsets: Sequence[int]) -> dict[str, Any]:
        texts = [decoded(self.tokenizer, [token]) for token in tokens]
        if self.kind == "text":
            return {
                "tokens": texts,
                "token_logprobs": list(logprobs),
                "top_logprobs": None,
                "text_offset": list(offsets),
            }
        content = [
            # Bytes that are no complete character have no text, and so no bytes to report.
            {
                "token": text,
                "logprob": logprob,
                "bytes": None if "\ufffd" in text else list(text.encode("utf-8")),
                "top_logprobs": [],
            }
            for text, logprob in zip(texts, logprobs, strict=True)
        ]
        return {"content": content, "refusal": None}
