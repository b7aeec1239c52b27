"""The reward `code_tests`: the tests of a row run on the program in a response, in a sandbox.

The program is the response's last block fenced by ```` ```python ````, or the whole response. Tests stand in a column
of the row, in one of these forms:

    text                                    Python that raises if the program is wrong; HumanEval's `check(candidate)`
                                            is called with the row's `entry_point`
    ["assert f(1) == 2", …]                 such texts (MBPP), after the row's `test_setup_code`
    [{"input": "1", "output": "2"}, …]      the program is run as a script, and its output compared by words
    {"inputs": […], "outputs": […]}         the same (APPS, TACO); with `fn_name` calls of that function

Tests as Python share the process of the program. A program that looks for them can forge their result; one that ends
the process, prints or writes cannot, because the report has a number that the program does not get. Tests by input and
output are compared outside.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from loopos.config.diagnostics import UserError
from loopos.config.machine import usable_cores
from loopos.data.record import shown
from loopos.evaluation.sandbox import Ended, Isolation, SandboxLimits, run_contained
from loopos.rl.reward_functions import Rows, Scores, column_of

_FENCED = re.compile(r"```[ \t]*(?:python3?|py)?[ \t]*\r?\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
COLUMNS = ("tests", "test_list", "test_cases", "test", "input_output")
PASSED, FAILED = "passed", "failed"
STOPPED = ("time", "memory", "processes", "output", "forbidden")
"""What ended programs, beside wrong ones: a limit, or the network and files that they do not have."""

# Runs in the sandbox. Only the first process reports: a program may fork.
_RUNNER = """
import errno, json, os, sys
def kind_of(problem):
    if isinstance(problem, MemoryError):
        return "memory"
    if isinstance(problem, BlockingIOError) or "can't start new thread" in str(problem):
        return "processes"
    forbidden = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENETUNREACH, errno.ENOSPC, errno.EFBIG)
    if isinstance(problem, OSError) and (problem.errno in forbidden or type(problem).__name__ == "gaierror"):
        return "forbidden"
    return "failed"
def main():
    number, program, tests = json.load(sys.stdin)
    own, report, module = os.getpid(), os.fdopen(os.dup(3), "w"), {"__name__": "solution"}
    os.close(3)
    sys.stdin = open(os.devnull)
    found = []
    try:
        exec(compile(program, "solution.py", "exec"), module)
        for test in tests:
            try:
                exec(compile(test, "test.py", "exec"), dict(module))
                found.append("passed")
            except BaseException as problem:
                found.append(kind_of(problem))
    except BaseException as problem:
        found = [kind_of(problem)] * len(tests)
    if os.getpid() == own:
        report.write(json.dumps([number, found]))
        report.flush()
    os._exit(0)
main()
"""


@dataclass(frozen=True, slots=True)
class _Exchange:
    """One run of a program: what it reads, and what it is to print."""

    stdin: str
    stdout: str


class CodeTests:
    """1 where the program in the response passes the row's tests, which run in a sandbox without network and files.

    column: of the tests; by default tests, test_list, test_cases, test or input_output. score: "all" tests or the
    "fraction" of them. seconds: CPU time of a program for all tests, or for each of those by input and output; the wall
    time is three times that. memory: MiB. processes: at once, threads included. file_size: MiB of all files. isolation:
    "full" refuses a system that cannot contain programs; "limits" takes one. workers: programs that run at a time.
    """

    def __init__(
        self,
        *,
        column: str | None = None,
        score: Literal["all", "fraction"] = "all",
        seconds: Annotated[int, Field(ge=1)] = 5,
        memory: Annotated[int, Field(ge=64)] = 512,
        processes: Annotated[int, Field(ge=1)] = 16,
        file_size: Annotated[int, Field(ge=1)] = 16,
        isolation: Isolation = "full",
        workers: Annotated[int, Field(ge=1)] | None = None,
    ) -> None:
        """Raises `UserError` where the system does not allow the isolation."""
        self.columns = COLUMNS if column is None else (column,)
        self.score, self.isolation, self.workers = score, isolation, workers or usable_cores()
        self.limits = SandboxLimits(seconds=seconds, memory=memory, processes=processes, file_size=file_size)
        run_contained({}, ["-c", ""], isolation=isolation)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], rows: Rows) -> Scores:
        tests = [_tests_of(column_of("code_tests", row, *self.columns), row) for row in rows]
        with ThreadPoolExecutor(self.workers) as pool:
            found = list(pool.map(self._outcomes, map(program_of, responses), tests))
        values = [
            sum(each == PASSED for each in outcomes) / len(outcomes)
            if self.score == "fraction"
            else float(all(each == PASSED for each in outcomes))
            for outcomes in found
        ]
        return Scores(values, {kind: [kind in outcomes for outcomes in found] for kind in STOPPED})

    def _outcomes(self, program: str, tests: Sequence[str | _Exchange]) -> list[str]:
        """The outcome of each test; with the score "all" of those up to the first that is not passed."""
        if not isinstance(tests[0], _Exchange):
            return self._of_python(program, [test for test in tests if isinstance(test, str)])
        found: list[str] = []
        for test in tests:
            assert isinstance(test, _Exchange), "the tests of a row have one form"
            found.append(self._of_exchange(program, test))
            if self.score == "all" and found[-1] != PASSED:
                break
        return found

    def _of_python(self, program: str, tests: Sequence[str]) -> list[str]:
        number = secrets.token_hex(16)
        ended = run_contained(
            {"main.py": _RUNNER},
            ["main.py"],
            stdin=json.dumps([number, program, tests]),
            limits=self.limits,
            isolation=self.isolation,
        )
        try:
            reported, outcomes = json.loads(ended.result)
            if reported == number and not ended.stopped:
                return list(outcomes)
        except (ValueError, TypeError):
            # The program ended the process before the tests, or wrote to the report.
            pass
        return [_kind_of(ended, self.limits)] * len(tests)

    def _of_exchange(self, program: str, test: _Exchange) -> str:
        ended = run_contained(
            {"main.py": program}, ["main.py"], stdin=test.stdin, limits=self.limits, isolation=self.isolation
        )
        if not ended.stopped and ended.status == 0:
            return PASSED if ended.stdout.split() == test.stdout.split() else FAILED
        return _kind_of(ended, self.limits)


def program_of(response: str) -> str:
    """The program in a response."""
    blocks = _FENCED.findall(response)
    return str(blocks[-1]) if blocks else response


# The last line of what Python prints of an exception.
_BY_EXCEPTION = {
    "MemoryError": "memory",
    "BlockingIOError": "processes",
    "PermissionError": "forbidden",
    "socket.gaierror": "forbidden",
    "OSError: [Errno 30]": "forbidden",
    "OSError: [Errno 101]": "forbidden",
    "OSError: [Errno 28]": "forbidden",
    "OSError: [Errno 27]": "forbidden",
}
_CPU_TIME, _KILLED = -24, -9


def _kind_of(ended: Ended, limits: SandboxLimits) -> str:
    """What ended a program that did not pass."""
    if ended.stopped:
        return ended.stopped
    if ended.status == _CPU_TIME or (ended.status == _KILLED and ended.seconds >= limits.seconds):
        return "time"
    last = ended.stderr.rstrip().rpartition("\n")[2]
    return next((kind for begin, kind in _BY_EXCEPTION.items() if last.startswith(begin)), FAILED)


def _tests_of(value: object, row: Mapping[str, object]) -> list[str] | list[_Exchange]:
    """The tests in a column. Raises `UserError` for another form, and for none."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        # A column of a table holds them as JSON; text in Python that begins so is text.
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    found: list[Any] = []
    match value:
        case str() if value.strip():
            called = f"\ncheck({row['entry_point']})" if "entry_point" in row and "def check(" in value else ""
            found = [f"{value}{called}"]
        case [*texts] if texts and all(isinstance(each, str) for each in texts):
            setup = str(row.get("test_setup_code") or "")
            found = [f"{setup}\n{each}" for each in texts]
        case [*cases] if cases and all(
            isinstance(each, Mapping) and {"input", "output"} <= set(each) for each in cases
        ):
            exchanges: list[Any] = cases
            found = [_Exchange(_text(each["input"]), _text(each["output"])) for each in exchanges]
        case {"inputs": [*inputs], "outputs": [*outputs], "fn_name": str(name)} if len(inputs) == len(outputs):
            calls = zip(inputs, outputs, strict=True)
            found = [f"assert {name}(*{arguments!r}) == {expected!r}" for arguments, expected in calls]
        case {"inputs": [*inputs], "outputs": [*outputs]} if len(inputs) == len(outputs):
            found = [_Exchange(_text(text), _text(out)) for text, out in zip(inputs, outputs, strict=True)]
    if not found:
        raise UserError(
            f"reward function code_tests: got the tests {shown(value)}; expected Python text, a list of such texts, or "
            "of {input, output}, or {inputs, outputs}"
        )
    return found


def _text(value: object) -> str:
    """A line of input, or several."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)
