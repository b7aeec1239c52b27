"""A finished folder, sent to a hub. Nothing here runs unless it was asked for.

Enters: a folder and the name `owner/name`. Leaves: the address. Left out: making the folder (`deploy.export`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from loopos.config.faults import EnvironmentFault, UserError
from loopos.config.paths import is_hub_id


class HubClient(Protocol):
    """The two calls of huggingface_hub's `HfApi` that a push makes."""

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> Any: ...

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> Any: ...


def check_name(name: str) -> None:
    """Raises `UserError` unless `name` has the form owner/name."""
    if not is_hub_id(name):
        raise UserError(f"--push: given {name}; wanted owner/name")


def push(folder: Path, name: str, client: HubClient) -> str:
    """Makes the repository if it is not there, private, and uploads every file of the folder in one commit; returns
    where it is. Raises `EnvironmentFault` where the hub refuses or cannot be reached: the folder stays as it is.
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
        raise EnvironmentFault(
            f"--push: {name}: {first}; the export itself is whole in {folder}. Set HF_TOKEN to a token that may write "
            f"there, and send it again: hf upload {name} {folder}"
        ) from problem
    return str(getattr(done, "commit_url", None) or name)


def own_client() -> HubClient:
    """huggingface_hub's own client, which reads HF_TOKEN and HF_ENDPOINT."""
    from huggingface_hub import HfApi

    client: HubClient = HfApi()
    return client
