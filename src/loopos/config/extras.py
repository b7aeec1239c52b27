"""The pip command that installs LoopOS, or one of its extras, on this machine.

The command depends on where LoopOS was installed from: a package index, an editable clone or a copied clone.
"""

from __future__ import annotations

import json
import os
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlparse

_PACKAGE = Path(__file__).resolve().parents[1]


def install_command(extra: str = "") -> str:
    """The command that installs LoopOS with `extra`, or upgrades it."""
    brackets = f"[{extra}]" if extra else ""
    clone = _PACKAGE.parents[1]
    if (clone / "pyproject.toml").is_file() and _PACKAGE.parent.name == "src":
        return f'pip install -e "{_from_here(clone)}{brackets}"'
    copied = _installed_from()
    if copied is not None:
        return f'pip install "{_from_here(copied)}{brackets}"'
    return f'pip install "loopos{brackets}"' if extra else "pip install --upgrade loopos"


def _installed_from() -> Path | None:
    """The folder that pip installed LoopOS from (direct_url.json, PEP 610); None for a package index."""
    try:
        record = metadata.distribution("loopos").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return None
    url = urlparse(str(json.loads(record).get("url", ""))) if record else None
    folder = Path(unquote(url.path)) if url is not None and url.scheme == "file" else None
    return folder if folder is not None and folder.is_dir() else None


def _from_here(folder: Path) -> str:
    return "." if folder == Path(os.getcwd()).resolve() else str(folder)
