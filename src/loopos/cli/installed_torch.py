"""What the installed torch was built for, read from its files, because importing torch takes seconds.

Whether a device is present only torch knows: see `training.precision`.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

from loopos.config.diagnostics import SettingError

_LINE = re.compile(r"^(__version__|cuda|hip|xpu)\b[^=]*= *(.+)$", re.MULTILINE)


def refuse_absent_device(device: str, precision: str) -> None:
    """Raises `SettingError` for a device that the installed torch does not support, and for fp16 without CUDA. Passes
    if the files do not tell.
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
        where = device if device != "auto" else f"the default of torch {version}"
        problem = f"got fp16, but only CUDA trains in fp16, and the device is {where}; use auto, fp32 or bf16"
        raise SettingError("training.precision", problem)


def _built_for() -> tuple[str, bool] | None:
    """torch's version, and whether it supports CUDA or ROCm; None if torch or its version.py is missing."""
    spec = importlib.util.find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec is not None and spec.origin else None
    if file is None or not file.is_file():
        return None
    fields = dict(_LINE.findall(file.read_text(encoding="utf-8")))
    if "__version__" not in fields or "cuda" not in fields:
        return None
    return fields["__version__"].strip("'\""), fields["cuda"] != "None" or fields.get("hip", "None") != "None"
