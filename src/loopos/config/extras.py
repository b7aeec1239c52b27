"""How to install LoopOS again, or with one of its extras, on this machine.

Enters: the name of an extra. Leaves: the pip command. LoopOS may come from an index, from a clone that is imported
where it lies, or from one that was copied when it was installed: each needs another command. Left out: whether a
package is there (whoever needs it).
"""

from __future__ import annotations

import json
import os
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlparse

_PACKAGE = Path(__file__).resolve().parents[1]


def install_command(extra: str = "") -> str:
    """The command that installs LoopOS with `extra`, or that renews it."""
    brackets = f"[{extra}]" if extra else ""
    clone = _PACKAGE.parents[1]
    if (clone / "pyproject.toml").is_file() and _PACKAGE.parent.name == "src":
        return f'pip install -e "{_from_here(clone)}{brackets}"'
    copied = _installed_from()
    if copied is not None:
        return f'pip install "{_from_here(copied)}{brackets}"'
    return f'pip install "loopos{brackets}"' if extra else "pip install --upgrade loopos"


def _installed_from() -> Path | None:
    """The folder that pip installed LoopOS from, None for an index; pip keeps it in direct_url.json (PEP 610)."""
    try:
        kept = metadata.distribution("loopos").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return None
    url = urlparse(str(json.loads(kept).get("url", ""))) if kept else None
    folder = Path(unquote(url.path)) if url is not None and url.scheme == "file" else None
    return folder if folder is not None and folder.is_dir() else None


def _from_here(folder: Path) -> str:
    return "." if folder == Path(os.getcwd()).resolve() else str(folder)
