"""Environments in contained processes: the same episodes as in threads, and tools that attack the machine."""

from __future__ import annotations

import ast
import datetime
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from loopos.config.diagnostics import UserError
from loopos.config.environments import EnvironmentSection
from loopos.data.conversations import Message
from loopos.data.tool_calls import ToolCall
from loopos.evaluation import forked_sandbox
from loopos.evaluation.sandbox import missing
from loopos.rl.contained_environments import ContainedInstances
from loopos.rl.environments import EnvironmentClass
from loopos.rl.packaged_environments import CalculatorSearch, TreasureGrid
from loopos.rl.tool_runs import CallLimits, Outcome
from tests.rl.test_episodes import acted, called, tokenizer

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"no containment on this system: {missing()}")

__all__ = ["tokenizer"]
ATTACKS = "tests.rl.own_attacks:Attacks"
LEFT = "left-behind-by-a-tool"
SECONDS = 0.5


def opened(name: str = ATTACKS, **settings: Any) -> ContainedInstances:
    section = EnvironmentSection(name=name, isolation="process", **{"tool_seconds": SECONDS, **settings})
    return ContainedInstances(EnvironmentClass(name), section)


@pytest.fixture(scope="module")
def attacks() -> Iterator[ContainedInstances]:
    os.environ["SECRET"] = "secret"
    made = opened(tool_memory=256)
    del os.environ["SECRET"]
    yield made
    made.close()


def attacked(
    attacks: ContainedInstances, name: str, seconds: float = SECONDS, **row: object
) -> tuple[Outcome, tuple[float | None, str]]:
    """What an attack comes to, and the reward after it."""
    instance, messages = attacks.begin({"prompt": "go", **row}, "row 1")
    try:
        call = ToolCall("fine", {}) if name == "fine" else ToolCall("attack", {"name": name})
        outcome = instance.call(call, CallLimits(seconds, 300))
        return outcome, instance.reward([*messages, Message("assistant", "so")])
    finally:
        instance.close()


def descendants(pid: int) -> set[int]:
    found: set[int] = set()
    for line in subprocess.run(
        ["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True
    ).stdout.splitlines()[1:]:
        child, parent = map(int, line.split())
        if parent == pid:
            found |= {child} | descendants(child)
    return found


def have_ended(pids: set[int]) -> bool:
    """Whether none of the processes runs, waiting a little for the kernel; their entries may wait for init."""
    for _ in range(100):
        states = subprocess.run(["ps", "-o", "stat=", "-p", ",".join(map(str, pids))], capture_output=True, text=True)
        if all(state.startswith("Z") for state in states.stdout.split()):
            return True
        time.sleep(0.1)
    return False


def all_gone(marker: str) -> bool:
    """Whether no process has `marker` among its arguments, waiting a little for the kernel."""
    for _ in range(100):
        if marker not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout:
            return True
        time.sleep(0.1)
    return False


SCRIPTS = {
    "calculator_search": [
        called("search", query="height of K2", limit=1),
        called("calculate", expression="1 / 0") + called("calculate", expression=3) + called("fly"),
        called("search", query="K2", limit=True) + "<tool_call>{",
        "so 8611",
    ],
    "treasure_grid": [called("look"), called("move", direction="north"), called("move", direction="up"), "so"],
    "tests.rl.own_environments:Trouble": [called("fail"), called("leave"), called("long"), called("stop"), "so"],
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [name if name == "calculator_search" else pytest.param(name, marks=pytest.mark.slow) for name in SCRIPTS]
)
def test_episodes_are_those_of_threads(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    rows: dict[str, dict[str, object]] = {
        "calculator_search": CalculatorSearch.rows(1, 3)[0], "treasure_grid": TreasureGrid.rows(1, 3)[0],
    }  # fmt: skip
    row = rows.get(name, {"prompt": "go"})
    threads, processes = (
        acted(tokenizer, name.removeprefix("tests.rl.own_environments"), SCRIPTS[name], row, isolation=isolation)
        for isolation in ("thread", "process")
    )
    assert processes == threads
    assert processes.calls > 2


EXPECTED = {
    "forks": ("processes", "BlockingIOError", True),
    "matches": ("timeout", "attack took longer than 0.5 seconds", False),
    "loops": ("timeout", "attack took longer than 0.5 seconds", False),
    "fills": ("memory", "MemoryError", True),
    "connects": ("exception", "Network is unreachable", True),
    "reads_a_secret": ("exception", "FileNotFoundError", True),
    "writes_outside": ("exception", "Read-only file system", True),
    "remounts": ("exception", "Operation not permitted", True),
    "writes_much": ("exception", "OSError: [Errno 2", True),
    "prints": ("output", "attack wrote more than 4 MiB", False),
    "answers_much": ("", "more characters are left out", True),
    "kills_all": ("", "null", True),
    "kills_parent": ("", "null", True),
    "leaves": ("died", "attack ended: its process ended with status 3", False),
    "crashes": ("died", "was ended by signal 11", False),
    "forges": ("died", "something else than an answer", False),
    "leaves_a_process": ("", "null", True),
    "forks_on": ("timeout", "attack took longer", False),
    "fills_in_processes": ("memory", "attack took more than 256 MiB of memory", False),
}
SLOW = ("loops", "writes_much", "answers_much", "forks_on", "fills_in_processes")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in EXPECTED]
)
def test_an_attack_is_contained_and_counted(name: str, attacks: ContainedInstances) -> None:
    failure, text, is_alive = EXPECTED[name]
    outcome, (reward, in_reward) = attacked(attacks, name, SECONDS if failure == "timeout" else 60)
    assert outcome.failure == failure
    assert text in outcome.text
    assert outcome.stuck == (failure in ("timeout", "memory", "processes", "output", "died"))
    # The score is there where the process is.
    assert reward == (1.0 if is_alive else None)
    assert in_reward == "", "a process that a call ended is counted once"
    assert attacked(attacks, "fine")[0] == Outcome("fine", "fine 1")
    assert all_gone(LEFT)


def test_rewards_are_contained_and_counted(attacks: ContainedInstances) -> None:
    found = {name: attacked(attacks, "fine", at="reward", prompt=name)[1] for name in ("matches", "fills", "leaves")}
    assert found == {"matches": (None, "timeout"), "fills": (None, "memory"), "leaves": (None, "died")}


def test_resets_that_break_a_limit_name_the_row(attacks: ContainedInstances) -> None:
    for name, text in {
        "matches": r"reset passed its limit of time \(0\.5 s, environment\.tool_seconds\)\n    for row 1",
        "leaves": r"reset ended with status 3\n    for row 1",
        "connects": "reset: raised OSError .*unreachable",
    }.items():
        with pytest.raises(UserError, match=rf"environment {ATTACKS}.*{text}"):
            attacks.begin({"prompt": name, "at": "reset"}, "row 1")


def test_first_messages_of_rows_share_a_process(attacks: ContainedInstances) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b"}, *[{"prompt": "needs_a_new_file", "at": "reset"}] * 3]
    found = attacks.openings(rows, [f"row {number}" for number in range(5)])
    assert [each[0].content for each in found] == ["a", "b", *["needs_a_new_file"] * 3]
    with pytest.raises(UserError, match=r"status 3\n    for row 1"):
        attacks.openings([rows[0], {"prompt": "leaves", "at": "reset"}], ["row 0", "row 1"])


def test_values_that_are_no_json_are_refused(attacks: ContainedInstances) -> None:
    for value, text in (
        ({"day": datetime.date(2026, 1, 2)}, r"the row\['x'\]\['day'\] is .*\(date\); expected values of JSON"),
        ({3: "three"}, r"the row\['x'\] has the key 3 \(int\); expected a text"),
        ([(1, 2)], r"the row\['x'\]\[0\] is .*\(tuple\); expected values of JSON"),
    ):
        with pytest.raises(UserError, match=text + r', for isolation "process"\n    for a\.jsonl:2'):
            attacks.begin({"prompt": "go", "x": value}, "a.jsonl:2")


def test_it_has_neither_torch_nor_secrets_nor_files(attacks: ContainedInstances) -> None:
    outcome, _ = attacked(attacks, "looks")
    torch, secret, folders, here, files = ast.literal_eval(outcome.text)
    assert (torch, secret, here) == (False, False, "/tmp")
    # Where this clone is in /tmp, its folder is there to be read.
    assert set(files) <= {part for part in Path(__file__).resolve().parts if Path(__file__).is_relative_to("/tmp")}
    # Above a Python in a home is its folder.
    assert set(folders) <= {"/root", "/home"}


def test_classes_that_cannot_be_contained_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Local:
        def reset(self) -> str:
            return "x"

    class_ = EnvironmentClass(ATTACKS)
    class_.type = Local
    section = EnvironmentSection(name=ATTACKS, isolation="process")
    with pytest.raises(UserError, match=r"cannot import .*<locals>.Local; expected a class at the top of a module"):
        ContainedInstances(class_, section)
    (tmp_path / "at_home.py").write_text("class Own:\n    def reset(self) -> str:\n        return 'x'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    with pytest.raises(UserError, match=r"which holds your home; move the module to a folder of its own"):
        opened("at_home:Own")
    monkeypatch.setenv("HOME", "/nowhere")
    made = opened("at_home:Own")
    instance, messages = made.begin({}, "row 1")
    assert messages == [Message("user", "x")]
    instance.close()
    made.close()


def test_without_namespaces_a_run_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    code = forked_sandbox._CODE.replace(
        "; main(", "; import loopos.evaluation.sandbox_supervisor as s; s._libc.unshare = lambda flags: -1; main("
    )
    monkeypatch.setattr(forked_sandbox, "_CODE", code)
    with pytest.raises(UserError, match=r"cannot be contained on this system.*isolation to \"thread\" if you trust"):
        opened()


@pytest.mark.slow
def test_nothing_is_left_when_the_run_is_killed(tmp_path: Path) -> None:
    """A run ends by SIGKILL while a tool hangs that has left a process behind."""
    program = tmp_path / "run.py"
    program.write_text(
        "from loopos.config.environments import EnvironmentSection\n"
        "from loopos.data.tool_calls import ToolCall\n"
        "from loopos.rl.contained_environments import ContainedInstances\n"
        "from loopos.rl.environments import EnvironmentClass\n"
        "from loopos.rl.tool_runs import CallLimits\n"
        f"section = EnvironmentSection(name='{ATTACKS}', isolation='process')\n"
        f"made = ContainedInstances(EnvironmentClass('{ATTACKS}'), section)\n"
        "instance, _ = made.begin({'prompt': 'go'}, 'row 1')\n"
        "instance.call(ToolCall('attack', {'name': 'leaves_a_process'}), CallLimits(9, 9))\n"
        "print('hangs', flush=True)\n"
        "instance.call(ToolCall('attack', {'name': 'matches'}), CallLimits(60, 9))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, env=environment) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"hangs\n"
        below = descendants(run.pid)
        assert len(below) >= 5, "server, watch, process 1, function and what it left"
        run.kill()
    assert have_ended(below)


def test_closing_ends_all() -> None:
    before = descendants(os.getpid())
    made = opened()
    instances = [made.begin({"prompt": "go"}, "row")[0] for _ in range(3)]
    below = descendants(os.getpid()) - before
    assert len(below) >= 10, "the server, and three processes of each object"
    made.close()
    assert have_ended(below)
    outcome = instances[0].call(ToolCall("fine", {}), CallLimits(1, 99))
    assert (outcome.failure, outcome.stuck) == ("died", True)
    with pytest.raises(UserError, match="a contained process cannot be started"):
        made.begin({"prompt": "go"}, "row")
    for instance in instances:
        instance.close()


@pytest.mark.slow
def test_a_server_that_was_killed_is_an_error() -> None:
    made = opened()
    made._sandbox._server.send_signal(signal.SIGKILL)
    made._sandbox._server.wait()
    with pytest.raises(UserError, match="a contained process cannot be started"):
        made.begin({"prompt": "go"}, "row")
    made.close()
