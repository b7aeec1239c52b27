"""A finished folder, sent to a hub. Nothing here runs unless it was asked for.

Enters: a folder and the name `owner/name`. Leaves: the address. Left out: making the folder (`deploy.export`).

What an export may be asked for, checked without torch.

Enters: a format, a number format, a repository. Leaves: `ExportSettings`, or every fault in words. Left out: the work
(`export.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from loopos.config.diagnostics import MissingRequirement, UserError
from loopos.config.paths import is_hub_id


class HubClient(Protocol):
    """The two calls of huggingface_hub's `HfApi` that a push makes."""

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> Any: ...

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> Any: ...


def check_name(name: str) -> None:
    """Raises `UserError` unless `name` has the form owner/name."""
    if not is_hub_id(name):
        raise UserError(f"--push: got {name}; expected owner/name")


def push(folder: Path, name: str, client: HubClient) -> str:
    """Makes the repository if it is not there, private, and uploads every file of the folder in one commit; returns
    where it is. Raises `MissingRequirement` where the hub refuses or cannot be reached: the folder stays as it is.
    """
    # The base of all that its HTTP library raises, which the hub imports under this name.
    from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]

    try:
        client.create_repo(name, private=True, exist_ok=True)
        done = client.upload_folder(
            repo_id=name, folder_path=str(folder), commit_message="Upload of a model exported by LoopOS"
        )
    except (OSError, ValueError, HTTPError, HFValidationError) as problem:
        first = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise MissingRequirement(
            f"--push: {name}: {first}; the export itself is whole in {folder}. Set HF_TOKEN to a token that may write "
            f"there, and send it again: hf upload {name} {folder}"
        ) from problem
    return str(getattr(done, "commit_url", None) or name)


def own_client() -> HubClient:
    """huggingface_hub's own client, which reads HF_TOKEN and HF_ENDPOINT."""
    from huggingface_hub import HfApi

    client: HubClient = HfApi()
    return client


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
    diagnostics = []
    if settings.format not in FORMATS:
        diagnostics.append(f"--format: got {settings.format}; expected one of {', '.join(FORMATS)}")
    types = _TYPES.get(settings.format, GGUF_TYPES)
    if settings.type is not None and (settings.type not in types or not settings.type):
        expected = ", ".join(dict.fromkeys(each for each in types if each))
        diagnostics.append(f"--type: got {settings.type}; expected one of {expected} for --format {settings.format}")
    if settings.push is not None:
        try:
            check_name(settings.push)
        except UserError as problem:
            diagnostics.append(str(problem))
    if diagnostics:
        raise UserError("\n".join(diagnostics))
    return types[0] if settings.type is None else settings.type
