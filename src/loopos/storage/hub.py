"""Check whether the hub is reachable, once per process with one request of a few seconds.

The libraries would retry for a minute at each look-up; after one failed request they are switched to their cache. The
progress bars and messages of `datasets` are silenced here too.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from loopos.config.diagnostics import SettingError

VERBOSE = "LOOPOS_VERBOSE"
"""The environment variable that shows the libraries' own messages."""

# For connecting and for answering each; the DNS look-up has no timeout of its own, hence the thread.
_TIMEOUT_SECONDS = 4.0
_DEADLINE_SECONDS = 9.0


def require_hub(key: str, name: str, *, kind: Literal["model", "dataset"] = "model") -> None:
    """Raise `SettingError` if the hub cannot be reached and `name` is not cached; `key` names it."""
    reason = why_unreachable()
    if reason is not None and not is_cached(name, kind=kind):
        other = 'a folder, or "smollm2-135m"' if kind == "model" else "a file or folder"
        raise SettingError(
            key, f"{name} is neither a file or folder here nor reachable on a hub: {reason}\n    name {other}"
        )


@functools.cache
def why_unreachable() -> str | None:
    """Why the hub cannot be reached; None if it can. After a failure the libraries only use their cache."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    problems: list[str | None] = []
    request = threading.Thread(target=lambda: problems.append(_problem(constants.ENDPOINT)), daemon=True)
    request.start()
    request.join(_DEADLINE_SECONDS)
    reason = problems[0] if problems else f"no answer within {_DEADLINE_SECONDS:g} s"
    if reason is None:
        return None
    constants.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = "1"
    if "datasets" in sys.modules:
        import datasets

        datasets.config.HF_HUB_OFFLINE = True
    return f"{constants.ENDPOINT} cannot be reached ({reason})"


def silence_datasets() -> Callable[[], None]:
    """Silence the progress bars and messages of datasets; the returned function restores them."""
    import datasets

    level, shows_bars = datasets.logging.get_verbosity(), not datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity_error()
    # If the environment variable is 0, the user wants bars and no call may turn them off.
    if turns_off := shows_bars and datasets.config.HF_DATASETS_DISABLE_PROGRESS_BARS is None:
        datasets.disable_progress_bars()

    def restore() -> None:
        datasets.logging.set_verbosity(level)
        if turns_off:
            datasets.enable_progress_bars()

    return restore


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Silence datasets inside the block, unless `LOOPOS_VERBOSE` is set."""
    restore = silence_datasets() if not os.environ.get(VERBOSE) else lambda: None
    try:
        yield
    finally:
        restore()


def is_cached(name: str, *, kind: Literal["model", "dataset"]) -> bool:
    """Whether the libraries' cache contains the model or data set `name`."""
    from huggingface_hub import constants

    snapshots = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}" / "snapshots"
    prepared = Path(constants.HF_HOME) / "datasets" / name.replace("/", "___")
    return any(folder.is_dir() and any(folder.iterdir()) for folder in (snapshots, prepared))


def _problem(endpoint: str) -> str | None:
    """Why one request to the hub fails; None for any answer."""
    from huggingface_hub import get_session
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        get_session().head(endpoint, timeout=_TIMEOUT_SECONDS)
    except (OSError, HTTPError) as problem:
        return (str(problem).splitlines() or [""])[0] or type(problem).__name__
    return None
