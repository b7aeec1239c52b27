"""What an export may be asked for, checked without torch.

Enters: a format, a number format, a repository. Leaves: `ExportSettings`, or every fault in words. Left out: the work
(`export.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loopos.config.faults import UserError
from loopos.deploy.exporting.push import check_name

FLOATS = ("f32", "f16", "bf16")
GGUF_TYPES = (*FLOATS, "q8_0", "q4_0")
# The number formats that each format of files takes; the first is taken where none is asked for, "" the model's own.
_TYPES: Mapping[str, tuple[str, ...]] = {
    "huggingface": ("", *FLOATS),
    "gguf": ("f16", *GGUF_TYPES),
    "adapter": ("", *FLOATS),
    "modelfile": ("f16", *GGUF_TYPES),
    "onnx": ("f32", "f32"),
}
FORMATS = tuple(_TYPES)


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """format: one of `FORMATS`. type: the number format of the weights; None for that of the model, and f16 for GGUF.
    push: the repository to send the folder to; None sends nothing. licence: what the card says; None for what is known.
    check: whether the folder is opened again and compared.
    """

    format: str
    type: str | None = None
    push: str | None = None
    licence: str | None = None
    check: bool = True


def check_settings(settings: ExportSettings) -> str:
    """The number format to take, "" for the model's own. Raises `UserError` with every fault."""
    faults = []
    if settings.format not in FORMATS:
        faults.append(f"--format: given {settings.format}; wanted one of {', '.join(FORMATS)}")
    types = _TYPES.get(settings.format, GGUF_TYPES)
    if settings.type is not None and (settings.type not in types or not settings.type):
        wanted = ", ".join(dict.fromkeys(each for each in types if each))
        faults.append(f"--type: given {settings.type}; wanted one of {wanted} for --format {settings.format}")
    if settings.push is not None:
        try:
            check_name(settings.push)
        except UserError as problem:
            faults.append(str(problem))
    if faults:
        raise UserError("\n".join(faults))
    return types[0] if settings.type is None else settings.type
