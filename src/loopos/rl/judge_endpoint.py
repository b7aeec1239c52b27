"""The reward `judge`: a language model behind an OpenAI-compatible endpoint grades responses with a number.

    score = (grade − minimum) / (maximum − minimum)

Every reply is kept in the run's folder, `rewards/LABEL.RANK.jsonl`, a line each in the order in which responses need
them. A resumed run finds its replies there and is graded as if it had not stopped; how many lines it had counted
against the budget is in the checkpoint. Lines behind them cost nothing when they are needed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field

from loopos.config.diagnostics import UserError
from loopos.data.record import shown
from loopos.evaluation.chat_endpoint import ChatEndpoint, EndpointFailed
from loopos.evaluation.grading_prompt import filled
from loopos.rl.reward_functions import NotOfARow, Rows, Scores
from loopos.storage.json_files import json_text

PROMPT = """\
You grade the answer of an assistant.

[Question]
{prompt}

[Answer]
{response}

[Rubric]
{rubric}

Explain your grade in a few sentences. Then end with one line, "Score: n", where n is a number from {minimum} to \
{maximum}."""
RUBRIC = "Is the answer correct, complete and helpful?"
_SCORE = r"score\W{0,8}(-?\d+(?:\.\d+)?)"
_Count = Annotated[int, Field(ge=1)]


class _Run(Protocol):
    @property
    def folder(self) -> Path | None: ...
    @property
    def rank(self) -> int: ...
    @property
    def label(self) -> str: ...


class JudgeEndpoint:
    """The grade of a language model behind an OpenAI-compatible endpoint, scaled to 0 to 1; None without one.

    base_url, model: of the endpoint. prompt: with {prompt}, {response}, {rubric}, {minimum}, {maximum} and names of
    columns; system: before it. pattern: its last match in the reply has the grade as its first group. parameters:
    further ones of the request. api_key_env: the environment variable with the key. concurrency: requests at a time.
    retries: of a request. max_requests, max_total_tokens: of the run and process; at_budget: what happens behind them,
    an error or None. on_failure: what a request without answer does.
    """

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        prompt: str = PROMPT,
        rubric: str = RUBRIC,
        system: str | None = None,
        minimum: float = 0.0,
        maximum: float = 10.0,
        pattern: str = _SCORE,
        temperature: Annotated[float, Field(ge=0)] = 0.0,
        max_tokens: _Count = 512,
        parameters: dict[str, Any] | None = None,
        api_key_env: str | None = None,
        concurrency: _Count = 8,
        retries: Annotated[int, Field(ge=0)] = 5,
        request_timeout: Annotated[float, Field(gt=0)] = 60.0,
        max_requests: _Count | None = None,
        max_total_tokens: _Count | None = None,
        at_budget: Literal["stop", "unjudged"] = "stop",
        on_failure: Literal["error", "unjudged"] = "error",
    ) -> None:
        """Raises `UserError` for options that do not fit each other."""
        self.endpoint = ChatEndpoint(
            base_url=base_url, model=model, api_key_env=api_key_env, timeout=request_timeout, retries=retries
        )
        if "{response}" not in prompt:
            raise UserError("prompt: it has no {response}; expected a text with {prompt} and {response}")
        if not minimum < maximum:
            raise UserError(f"minimum: got {minimum:g}; expected less than maximum ({maximum:g})")
        try:
            self.pattern = re.compile(pattern, re.IGNORECASE)
        except re.error as problem:
            raise UserError(f"pattern: got {shown(pattern)}; expected a regular expression: {problem}") from problem
        if self.pattern.groups < 1:
            raise UserError(f"pattern: got {shown(pattern)}; expected one with a group, which has the grade")
        self.prompt, self.system, self.minimum, self.maximum = prompt, system, minimum, maximum
        self.fields = {"rubric": rubric, "minimum": f"{minimum:g}", "maximum": f"{maximum:g}"}
        self.parameters = {"temperature": temperature, "max_tokens": max_tokens, **(parameters or {})}
        self.concurrency, self.at_budget, self.on_failure = concurrency, at_budget, on_failure
        self.max_requests, self.max_total_tokens = max_requests, max_total_tokens
        self.replies = Replies(None)

    def open_run(self, run: _Run) -> None:
        """Takes the replies of the run's folder."""
        if run.folder is not None:
            name = re.sub(r"[^\w.-]", "_", run.label or "judge")
            self.replies = Replies(run.folder / "rewards" / f"{name}.{run.rank}.jsonl")

    def state(self) -> dict[str, Any]:
        """How many replies count against the budget, for a checkpoint."""
        return {"counted": self.replies.counted}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restores `state`: the replies behind it are known but not counted."""
        self.replies.count(int(state["counted"]))

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], rows: Rows) -> Scores:
        keyed = [self._keyed(*each) for each in zip(prompts, responses, rows, strict=True)]
        self._ask(dict(keyed))
        texts = [self.replies.text(key) for key, _ in keyed]
        values = [None if text is None else self._grade(text) for text in texts]
        return Scores(
            values,
            {
                "malformed": [text is not None and value is None for text, value in zip(texts, values, strict=True)],
                "failed": [self.replies.failed(key) for key, _ in keyed],
                "over_budget": [key not in self.replies for key, _ in keyed],
            },
        )

    def _keyed(self, prompt: str, response: str, row: Mapping[str, object]) -> tuple[str, list[dict[str, str]]]:
        """The messages about a response, and a digest of all that decides the reply."""
        fields = {**row, **self.fields, "prompt": prompt, "response": response}
        messages = [{"role": "user", "content": filled(self.prompt, fields)}]
        if self.system is not None:
            messages = [{"role": "system", "content": self.system}, *messages]
        decides = json_text({"model": self.endpoint.model, "messages": messages, **self.parameters})
        return hashlib.sha256(decides.encode("utf-8", "surrogatepass")).hexdigest(), messages

    def _ask(self, messages_of: Mapping[str, list[dict[str, str]]]) -> None:
        """Gets the replies that do not count yet, in waves of `concurrency`, and counts them in their order."""
        needed = [key for key in messages_of if key not in self.replies]
        while needed:
            wave = needed[: min(self.concurrency, self._room())]
            if not wave:
                if self.at_budget == "stop":
                    raise NotOfARow(
                        f"reward function judge: its budget is used up ({self.replies.counted} requests, "
                        f"{self.replies.tokens} tokens) with {len(needed)} responses to grade; raise max_requests or "
                        'max_total_tokens and resume, or set at_budget to "unjudged"'
                    )
                return
            unknown = [key for key in wave if not self.replies.knows(key)]
            with ThreadPoolExecutor(self.concurrency) as pool:
                found = dict(zip(unknown, pool.map(self._reply, [messages_of[key] for key in unknown]), strict=True))
            self.replies.add(wave, found)
            needed = needed[len(wave) :]

    def _room(self) -> int:
        """Requests that the budget has left."""
        if self.max_total_tokens is not None and self.replies.tokens >= self.max_total_tokens:
            return 0
        return self.concurrency if self.max_requests is None else self.max_requests - self.replies.counted

    def _reply(self, messages: Sequence[Mapping[str, str]]) -> dict[str, Any]:
        try:
            reply = self.endpoint.complete(messages, self.parameters)
        except EndpointFailed as problem:
            if self.on_failure == "unjudged":
                return {"text": None, "tokens": 0}
            raise NotOfARow(
                f'reward function judge: {problem}; check base_url, or set on_failure to "unjudged"'
            ) from problem
        except UserError as problem:
            raise NotOfARow(f"reward function judge: {problem}") from problem
        return {"text": reply.text, "tokens": reply.tokens}

    def _grade(self, text: str) -> float | None:
        """The grade of a reply from 0 to 1; None for a reply without one in its range."""
        matches = self.pattern.findall(text)
        last = matches[-1] if matches else ""
        try:
            grade = float(last[0] if isinstance(last, tuple) else last)
        except ValueError:
            return None
        inside = self.minimum <= grade <= self.maximum
        return (grade - self.minimum) / (self.maximum - self.minimum) if inside else None


class Replies:
    """Replies by key, in a file that only grows. The first `counted` lines are those that the run has used."""

    def __init__(self, path: Path | None) -> None:
        """path: of the file, which need not exist; None keeps them in memory. All lines count. Raises `OSError`."""
        self.path, self._lines, self._known = path, list[dict[str, Any]](), dict[str, dict[str, Any]]()
        self._used: set[str] = set()
        self.tokens = 0
        if path is not None and path.exists():
            self._read(path)
        self.count(len(self._lines))

    def __contains__(self, key: str) -> bool:
        """Whether the run has used the reply of a key."""
        return key in self._used

    @property
    def counted(self) -> int:
        return len(self._used)

    def knows(self, key: str) -> bool:
        """Whether the file has a key, used or not."""
        return key in self._known

    def text(self, key: str) -> str | None:
        """The reply that was used; None where there is none."""
        found: str | None = self._known[key]["text"] if key in self._used else None
        return found

    def failed(self, key: str) -> bool:
        """Whether the request of a key was made and not answered."""
        return key in self._used and self._known[key]["text"] is None

    def count(self, number: int) -> None:
        """Counts the first lines only."""
        self._used = {line["key"] for line in self._lines[:number]}
        self.tokens = sum(line["tokens"] for line in self._lines[:number])

    def add(self, keys: Sequence[str], found: Mapping[str, Mapping[str, Any]]) -> None:
        """Counts replies, of which `found` are new and are written. Raises `OSError`."""
        new = [{"key": key, **found[key]} for key in keys if key in found]
        if self.path is not None and new:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write("".join(json_text(line) + "\n" for line in new).encode("utf-8", "surrogatepass"))
                file.flush()
                os.fsync(file.fileno())
        self._lines += new
        self._known |= {line["key"]: line for line in new}
        self._used.update(keys)
        self.tokens += sum(self._known[key]["tokens"] for key in keys)

    def _read(self, path: Path) -> None:
        """Reads the whole lines, and cuts off one that a killed process left unfinished."""
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(path, len(whole))
        self._lines = list(_lines(path, whole))
        self._known = {line["key"]: line for line in self._lines}


def _lines(path: Path, content: bytes) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(content.decode("utf-8", "surrogatepass").split("\n")[:-1], start=1):
        try:
            yield json.loads(line)
        except ValueError as problem:
            raise UserError(f"{path}:{number}: not JSON: {problem}; delete the file to ask again") from problem
