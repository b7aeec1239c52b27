"""The reward `code_tests`: forms of tests, and programs that attack the machine: contained, counted, the run goes on."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from preference_runs import events_of, ppo_config

from loopos.config.diagnostics import UserError
from loopos.evaluation import sandbox
from loopos.evaluation.sandbox import SandboxLimits, missing, run_contained
from loopos.methods.ppo import PpoTrainer
from loopos.rl import code_tests
from loopos.rl.code_tests import CodeTests
from loopos.training.progress import RunProgress

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"no containment on this system: {missing()}")

INCREMENT = "Here it is:\n```python\ndef f(x):\n    return x + 1\n```\nDone."
SCRIPT = "print(int(input()) + 1)"


def outcome(response: str, tests: object, **row: object) -> tuple[float | None, list[str]]:
    """The score, and what ended the program."""
    found = CodeTests(seconds=1)([""], [response], [{"tests": tests, **row}])
    return found.values[0], [kind for kind, holds in found.fractions.items() if holds[0]]


@pytest.mark.parametrize(
    ("response", "tests", "row", "score"),
    [
        (INCREMENT, "assert f(1) == 2", {}, 1.0),
        (INCREMENT, "assert f(1) == 3", {}, 0.0),
        (INCREMENT, ["assert f(1) == 2", "assert g(2) == 4"], {"test_setup_code": "g = lambda x: 2 * x"}, 1.0),
        (INCREMENT, "def check(candidate):\n    assert candidate(1) == 2", {"entry_point": "f"}, 1.0),
        (SCRIPT, [{"input": "1\n", "output": "2"}, {"input": "4", "output": "5\n"}], {}, 1.0),
        (SCRIPT, {"inputs": ["1"], "outputs": ["3"]}, {}, 0.0),
        (INCREMENT, json.dumps({"inputs": [[1], [2]], "outputs": [2, 3], "fn_name": "f"}), {}, 1.0),
        ("def f(", "assert f(1) == 2", {}, 0.0),
    ],
)
def test_forms_of_tests(response: str, tests: object, row: dict[str, object], score: float) -> None:
    assert outcome(response, tests, **row) == (score, [])


def test_a_fraction_of_the_tests() -> None:
    tests = {"tests": ["assert f(1) == 2", "assert f(2) == 2", "assert f(3) == 4"]}
    assert CodeTests(score="fraction")([""], [INCREMENT], [tests]).values == [pytest.approx(2 / 3)]


def test_tests_in_no_form_are_refused() -> None:
    with pytest.raises(UserError, match=r"code_tests: got the tests \[\]; expected Python text"):
        outcome(INCREMENT, [])
    with pytest.raises(UserError, match='without a column "tests" or "test_list"'):
        CodeTests()([""], [INCREMENT], [{"answer": 1}])


FORGERIES = {
    "exit": "import sys\nsys.exit(0)",
    "exit at once": "import os\nos._exit(0)",
    "a report of its own": 'import os\nos.write(3, b\'["", ["passed"]]\')\nos._exit(0)',
    "a fork that goes on": "import os\nif os.fork():\n    os._exit(0)\ndef f(x):\n    return 2",
    "the input again": "import json\nnumber = json.load(open('stdin'))[0]",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_program_that_ends_or_reports_itself_does_not_pass(name: str) -> None:
    assert outcome(FORGERIES[name], "assert f(1) == 2")[0] == 0.0


ATTACKS = {
    "fork bomb": ("import os\nwhile True:\n    os.fork()", ["processes"]),
    "fork bomb that goes on": ("import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass", ["time"]),
    "endless loop": ("while True:\n    pass", ["time"]),
    "sleep": ("import time\ntime.sleep(1000)", ["time"]),
    "8 GB": ("x = bytearray(8 << 30)", ["memory"]),
    "8 GB in processes": (
        "import os, time\nfor _ in range(15):\n    if os.fork() == 0:\n        break\nx = b'x' * (400 << 20)\ntime.sleep(1000)",
        ["memory"],
    ),
    "network": ("import socket\nsocket.create_connection(('1.1.1.1', 80))", ["forbidden"]),
    "names": ("import socket\nsocket.getaddrinfo('example.com', 80)", ["forbidden"]),
    "a file outside": ("open('/usr/lib/x', 'w')", ["forbidden"]),
    "a large file": ("open('x', 'w').write('x' * (17 << 20))", ["forbidden"]),
    "many files": ("for n in range(40):\n    open(str(n), 'w').write('x' * (1 << 20))", ["forbidden"]),
    "output": ("while True:\n    print('x' * 10000)", ["output"]),
    "kill all": ("import os\nos.kill(-1, 9)", []),
}  # fmt: skip


# The others wait for a limit of time, or fill memory.
QUICK = ("fork bomb", "endless loop", "8 GB", "network", "a file outside", "a large file", "many files", "kill all")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ATTACKS]
)
def test_an_attack_is_contained_and_counted(name: str) -> None:
    program, kinds = ATTACKS[name]
    assert outcome(program, "assert f(1) == 2") == (0.0, kinds)


@pytest.mark.slow
def test_by_input_and_output_attacks_are_counted_alike() -> None:
    for name in ("fork bomb", "endless loop", "8 GB", "network", "a file outside"):
        program, kinds = ATTACKS[name]
        assert outcome(program, [{"input": "", "output": "1"}]) == (0.0, kinds)


def looked(program: str) -> str:
    """What a program prints in the sandbox."""
    ended = run_contained({"main.py": program}, ["main.py"], limits=SandboxLimits(seconds=2))
    assert ended.status == 0, ended.stderr
    return ended.stdout


def test_it_sees_neither_secrets_nor_files_nor_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    seen = json.loads(
        looked(
            "import json, os, sys\n"
            "exists = [os.path.exists(path) for path in ('/proc', '/home', '/etc/passwd', '/run', '/sys', "
            f"{str(secret)!r}, {str(Path(__file__))!r})]\n"
            "print(json.dumps([dict(os.environ), exists, os.getpid(), sorted(os.listdir('.')), os.getuid()]))"
        )
    )
    assert "secret" not in str(seen)
    assert seen[0].keys() == {"PATH", "HOME", "LANG", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"}
    assert seen[1] == [False] * 7
    # Process 1 of its own namespace waits for it.
    assert seen[2] == 2
    # Where the Python that runs is in /tmp, its folder is there to be read.
    own = {part for part in Path(sys.prefix).parts if Path(sys.prefix).is_relative_to("/tmp")}
    assert set(seen[3]) - own == {"main.py"}
    assert seen[4] != 0


def test_what_it_writes_is_gone_and_nothing_runs_on(tmp_path: Path) -> None:
    marker = f"left-behind-{os.getpid()}"
    looked(
        f"import os, sys, time\nopen('{marker}', 'w').write('x')\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(60)"
    )
    # The sandbox works in a folder of its own below /tmp; all of /tmp may be large.
    assert not [each for depth in range(4) for each in Path("/tmp").glob("*/" * depth + marker)]
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert "main.py" not in running.replace(__file__, "")


def test_a_server_of_this_machine_is_out_of_reach() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        ended = run_contained(
            {"main.py": f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)"}, ["main.py"]
        )
    assert ended.status == 1
    assert "unreachable" in ended.stderr or "refused" in ended.stderr


@pytest.mark.slow
def test_without_namespaces_it_is_refused_unless_only_limits_are_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor = Path(sandbox.__file__).with_name("sandbox_supervisor.py").read_text()
    broken = supervisor.replace(
        '_call("a namespace of processes and network", _libc.unshare(spaces))',
        'raise Unavailable("unshare: Operation not permitted")',
    )
    broken = broken.replace(
        '_call("a user namespace (user.max_user_namespaces, AppArmor)", _libc.unshare(spaces | _NEW_USER))',
        'raise Unavailable("unshare: Operation not permitted")',
    )
    assert broken != supervisor
    file = tmp_path / "supervisor.py"
    file.write_text(broken)
    monkeypatch.setattr(sandbox, "_SUPERVISOR", file)
    with pytest.raises(UserError, match=r"cannot be contained on this system: unshare: .*isolation to \"limits\""):
        CodeTests()
    limited = CodeTests(isolation="limits", seconds=1)
    found = limited([""] * 3, [INCREMENT, "while True: pass", "x = bytearray(8 << 30)"], [{"tests": "f(1)"}] * 3)
    assert found.values == [1.0, 0.0, 0.0]
    assert found.fractions["time"] == [False, True, False]
    assert found.fractions["memory"] == [False, False, True]


@pytest.mark.slow
def test_a_policy_trains_on_through_attacks(tmp_path: Path, pico_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = [ATTACKS[name][0] for name in ("fork bomb", "endless loop", "8 GB", "network", "a file outside")]
    called = CodeTests.__call__

    def attacks(self: CodeTests, prompts: Sequence[str], responses: Sequence[str], rows: Any) -> Any:
        """The pico model writes no programs: those of attackers take the place of its responses."""
        return called(
            self, prompts, [*programs, INCREMENT][: len(responses)], [{"tests": "assert f(1) == 2"}] * len(rows)
        )

    monkeypatch.setattr(code_tests.CodeTests, "__call__", attacks)
    reward = {"functions": [{"name": "code_tests", "options": {"seconds": 1}}]}
    config = ppo_config(tmp_path / "run", pico_folder, reward=reward, training={"max_iterations": 2})
    PpoTrainer(config, progress=RunProgress(quiet=True)).train()
    rollouts = events_of(tmp_path / "run", "rollout")
    assert len(rollouts) == 2
    for each in rollouts:
        assert each["score_code_tests"] == pytest.approx(1 / 6)
        for kind, number in {"processes": 1, "time": 1, "memory": 1, "forbidden": 2, "output": 0}.items():
            assert each[f"fraction_code_tests_{kind}"] == pytest.approx(number / 6)
