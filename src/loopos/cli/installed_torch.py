"""What the installed torch was built for, read off its files: importing it takes seconds.

Enters: the device and the number format that a run asks for. Leaves: nothing, or the error that torch would lead to.
Left out: whether a device is there, which torch alone knows (`training.precision`).
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

from loopos.config.diagnostics import SettingError

_LINE = re.compile(r"^(__version__|cuda|hip|xpu)\b[^=]*= *(.+)$", re.MULTILINE)


def refuse_absent_device(device: str, precision: str) -> None:
    """Raises `SettingError` for a device that the installed torch has no code for, and for fp16 without CUDA. Says
    nothing where the files do not tell.
    """
    found = _built_for()
    if found is None:
        return
    version, has_cuda = found
    if device == "cuda" and not has_cuda:
        problem = f"got cuda, but the installed torch {version} is built without CUDA; use auto or cpu"
        raise SettingError("training.device", problem)
    if device == "mps" and sys.platform != "darwin":
        raise SettingError("training.device", "got mps, which only macOS has; use auto or cpu")
    if precision == "fp16" and (not has_cuda or device in ("cpu", "mps")):
        where = device if device != "auto" else f"what torch {version} finds here"
        problem = f"got fp16, but only CUDA trains in fp16, and the device is {where}; use auto, fp32 or bf16"
        raise SettingError("training.precision", problem)


def _built_for() -> tuple[str, bool] | None:
    """torch's version, and whether it has CUDA or its AMD twin; None where torch or its version.py is not there."""
    spec = importlib.util.find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec is not None and spec.origin else None
    if file is None or not file.is_file():
        return None
    told = dict(_LINE.findall(file.read_text(encoding="utf-8")))
    if "__version__" not in told or "cuda" not in told:
        return None
    return told["__version__"].strip("'\""), told["cuda"] != "None" or told.get("hip", "None") != "None"
