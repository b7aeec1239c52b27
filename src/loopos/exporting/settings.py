"""Settings of an export, checked without torch; and the upload of a finished folder to a hub, only on request."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from loopos.config.diagnostics import MissingRequirement, UserError
from loopos.config.paths import is_hub_id
from loopos.config.variants import EXPORTERS


class HubClient(Protocol):
    """The two calls of huggingface_hub's `HfApi` that an upload makes."""

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> Any: ...

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> Any: ...


def check_name(name: str) -> None:
    """Raises `UserError` unless `name` has the form owner/name."""
    if not is_hub_id(name):
        raise UserError(f"--push: got {name}; expected owner/name")


def push(folder: Path, name: str, client: HubClient) -> str:
    """Creates the repository, private, if it does not exist, and uploads all files of the folder in one commit; returns
    its URL. Raises `MissingRequirement` if the hub refuses or cannot be reached; the folder is unchanged.
    """
    # HTTPError is the base class of all errors of the hub's HTTP library.
    from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]

    try:
        client.create_repo(name, private=True, exist_ok=True)
        commit = client.upload_folder(
            repo_id=name, folder_path=str(folder), commit_message="Upload of a model exported by LoopOS"
        )
    except (OSError, ValueError, HTTPError, HFValidationError) as problem:
        first = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise MissingRequirement(
            f"--push: {name}: {first}; the export itself is complete in {folder}. Set HF_TOKEN to a token with "
            f"write access and upload it: hf upload {name} {folder}"
        ) from problem
    return str(getattr(commit, "commit_url", None) or name)


def own_client() -> HubClient:
    """huggingface_hub's own client, which reads HF_TOKEN and HF_ENDPOINT."""
    from huggingface_hub import HfApi

    client: HubClient = HfApi()
    return client


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """format: a name of `EXPORTERS`, or "module:name". type: the number format of the weights; None for that of the
    model, and f16 for GGUF.
    push: the repository to upload the folder to; None: no upload. license: the license in the card; None for what is
    known. check: whether the export is opened again and compared.
    """

    format: str
    type: str | None = None
    push: str | None = None
    license: str | None = None
    check: bool = True


def check_settings(settings: ExportSettings) -> str:
    """The number format to use, "" for the model's own. Raises `UserError` with all problems."""
    diagnostics, types = [], EXPORTERS["gguf"].types
    try:
        types = EXPORTERS[settings.format].types
    except UserError as problem:
        diagnostics.append(f"--format: {problem}")
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
