"""`loopos doctor`: what this machine has, and what is missing with the command that installs it.

The exit code is 1 if LoopOS cannot train here. Works if torch cannot be imported, and then prints why.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from typing import Any

import loopos
from loopos.cli.answers import say, say_json, table
from loopos.cli.options import Json
from loopos.cli.process import hush_libraries, is_glibc, process_settings, settings_in_force
from loopos.config.diagnostics import MissingRequirement
from loopos.config.extras import install_command
from loopos.config.figures import as_bytes
from loopos.config.machine import usable_cores
from loopos.evaluation.sandbox import missing as missing_containment

REQUIRED = (
    "torch", "transformers", "tokenizers", "safetensors", "huggingface-hub", "datasets", "peft", "pydantic", "typer",
    "rich", "PyYAML", "numpy", "matplotlib", "psutil", "zstandard", "pyarrow",
)  # fmt: skip
EXTRAS = {
    "rewards": ("math-verify", "reasoning-gym", "jsonschema"),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "demo": ("gguf",),
    "quant": ("torchao",),
    "grammar": ("llguidance",),
    "track": ("tensorboard",),
    "serve": ("starlette", "uvicorn"),
    "ui": ("starlette", "uvicorn"),
    "eval": ("lm_eval",),
    "cluster": ("ray",),
    "excel": ("openpyxl",),
    "gguf": ("gguf", "xllamacpp"),
    "bench": ("accelerate", "trl"),
    "docs": ("mkdocs-material", "mkdocstrings", "ruff"),
}


def run(json: Json = False) -> int:
    """Prints the report; 0 if everything that training needs is present, else 1."""
    hush_libraries(verbose=False)
    found = inspect()
    if json:
        say_json(found)
    else:
        say(described(found))
    return 0 if found["ready"] else 1


def inspect() -> dict[str, Any]:
    """The whole report as one JSON object; `ready`: whether training can run."""
    versions = {name: version_of(name) for name in REQUIRED}
    missing = [name for name, version in versions.items() if version is None]
    torch_found = inspect_torch()
    return {
        "ready": not missing and "error" not in torch_found,
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "loopos": loopos.__version__,
        "versions": versions,
        "missing": missing,
        "torch": torch_found,
        "cores": usable_cores(),
        "memory": memory(),
        "disk": {"folder": os.getcwd(), "free": shutil.disk_usage(os.getcwd()).free},
        "process_settings": settings_in_force(),
        "process_settings_added_by_training": process_settings(os.environ) if is_glibc() else {},
        "embedded_model": inspect_embedded(),
        "not_contained": missing_containment(),
        "extras": {extra: {name: version_of(name) for name in packages} for extra, packages in EXTRAS.items()},
    }


def version_of(package: str) -> str | None:
    """The installed version, without importing the package; None if it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def memory() -> dict[str, int] | None:
    """Total and available memory in bytes; None if psutil is missing."""
    try:
        import psutil
    except ImportError:
        return None
    found = psutil.virtual_memory()
    return {"all": found.total, "available": found.available}


def inspect_torch() -> dict[str, Any]:
    """Devices and number formats, or {"error": why torch cannot be imported}."""
    try:
        import torch

        from loopos.training.precision import resolve
    except (ImportError, OSError) as error:
        return {"error": (str(error).splitlines() or [type(error).__name__])[0]}
    devices: list[dict[str, Any]] = [{"device": "cpu", "capability": torch.backends.cpu.get_cpu_capability()}]
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        devices.append(
            {
                "device": f"cuda:{number}",
                "name": about.name,
                "memory": about.total_memory,
                "capability": f"{about.major}.{about.minor}",
            }
        )
    if torch.backends.mps.is_available():
        devices.append({"device": "mps"})
    for each in devices:
        each["auto_precision"] = resolve("auto", torch.device(each["device"]))
    return {"threads": torch.get_num_threads(), "cuda": torch.version.cuda, "devices": devices}


def inspect_embedded() -> dict[str, str]:
    """The path of the embedded model's file, or {"error": how to install it}."""
    from loopos.models.resolve import embedded_model

    try:
        return {"file": str(embedded_model())}
    except MissingRequirement as diagnostic:
        return {"error": str(diagnostic)}


def described(found: dict[str, Any]) -> str:
    """The report as lines of text."""
    total_memory = found["memory"]
    lines = [
        f"loopos {found['loopos']} · Python {found['python']} · {found['platform']}",
        table(sorted((name, version or "MISSING") for name, version in found["versions"].items())),
        f"cores     {found['cores']}",
        f"memory    {as_bytes(total_memory['all'])}, {as_bytes(total_memory['available'])} available"
        if total_memory
        else "memory    unknown",
        f"disk      {as_bytes(found['disk']['free'])} free in {found['disk']['folder']}",
        *_torch_lines(found["torch"]),
        *_settings_lines(found),
    ]
    embedded = found["embedded_model"]
    lines.append(f"embedded  {embedded['file'] if 'file' in embedded else embedded['error']}")
    contained = found["not_contained"] or "programs of models run contained (code_tests; environments in processes)"
    lines.append(f"sandbox   {contained}")
    for extra, packages in found["extras"].items():
        absent = [name for name, version in packages.items() if version is None]
        summary = f"{install_command(extra)} ({', '.join(absent)} missing)" if absent else "installed"
        lines.append(f"extra     {extra}: {summary}")
    if found["missing"]:
        lines.append(f"missing   {', '.join(found['missing'])}: {install_command()}")
    lines.append("ready to train" if found["ready"] else "not ready to train")
    return "\n".join(lines)


def _torch_lines(torch_found: dict[str, Any]) -> list[str]:
    if "error" in torch_found:
        return [f"torch     cannot be imported: {torch_found['error']}; pip install torch"]
    lines = []
    for device in torch_found["devices"]:
        named = f" {device['name']}, {as_bytes(device['memory'])}" if "name" in device else ""
        capability = f", {device['capability']}" if "capability" in device else ""
        lines.append(f"device    {device['device']}{named}{capability}; precision auto is {device['auto_precision']}")
    return [*lines, f"threads   {torch_found['threads']}"]


def _settings_lines(found: dict[str, Any]) -> list[str]:
    """Process settings: those in force, and those that training adds."""
    force = {name: value for name, value in found["process_settings"].items() if name != "set_by_loopos"}
    added = found["process_settings_added_by_training"]
    listed = ", ".join(f"{name}={value}" for name, value in force.items()) or "none"
    lines = [f"settings  in force: {listed}"]
    if added:
        adding = ", ".join(f"{name}={value}" for name, value in added.items())
        lines.append(f"settings  train, predict, evaluate and demo add: {adding} (turn off: LOOPOS_NO_REEXEC=1)")
    return lines
