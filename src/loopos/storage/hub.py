"""Whether the hub can be reached: asked once a process, with one try of a few seconds.

Enters: the id of a model or data set. Leaves: nothing, or an error that says why it cannot be had. The libraries would
try again and again for a minute, each look-up anew; where one try fails they are told to look into their cache only.
datasets' bars and chatter are switched off from here too, for every room that opens or writes a data set.
Left out: fetching anything (huggingface_hub, transformers, datasets).
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
"""The variable that shows what the libraries print."""

# Connecting and answering each; the name's look-up knows no limit of its own, hence the thread.
_TIMEOUT_SECONDS = 4.0
_DEADLINE_SECONDS = 9.0


def require_hub(key: str, name: str, *, kind: Literal["model", "dataset"] = "model") -> None:
    """Raises `SettingError` where the hub cannot be reached and nothing of `name` is in the cache. key: the setting
    that names it.
    """
    reason = why_unreachable()
    if reason is not None and not is_cached(name, kind=kind):
        other = 'a folder, or "smollm2-135m"' if kind == "model" else "a file or folder"
        raise SettingError(
            key, f"{name} is neither a file or folder here nor reachable on a hub: {reason}\n    name {other}"
        )


@functools.cache
def why_unreachable() -> str | None:
    """Why the hub cannot be reached; None where it can. After a failed try the libraries look into their cache only."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    problems: list[str | None] = []
    asking = threading.Thread(target=lambda: problems.append(_problem(constants.ENDPOINT)), daemon=True)
    asking.start()
    asking.join(_DEADLINE_SECONDS)
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
    """datasets without bars and chatter; what it returns puts back what was before."""
    import datasets

    level, shows_bars = datasets.logging.get_verbosity(), not datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity_error()
    # With the variable at 0 the user has asked for bars, and no call may turn them off.
    if turns_off := shows_bars and datasets.config.HF_DATASETS_DISABLE_PROGRESS_BARS is None:
        datasets.disable_progress_bars()

    def as_before() -> None:
        datasets.logging.set_verbosity(level)
        if turns_off:
            datasets.enable_progress_bars()

    return as_before


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """datasets without bars and chatter, unless the user wants to see everything."""
    as_before = silence_datasets() if not os.environ.get(VERBOSE) else lambda: None
    try:
        yield
    finally:
        as_before()


def is_cached(name: str, *, kind: Literal["model", "dataset"]) -> bool:
    """Whether the libraries' cache holds anything of the model or data set `name`."""
    from huggingface_hub import constants

    snapshots = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}" / "snapshots"
    prepared = Path(constants.HF_HOME) / "datasets" / name.replace("/", "___")
    return any(folder.is_dir() and any(folder.iterdir()) for folder in (snapshots, prepared))


def _problem(endpoint: str) -> str | None:
    """Why one request to the hub fails; any answer of it will do."""
    from huggingface_hub import get_session
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        get_session().head(endpoint, timeout=_TIMEOUT_SECONDS)
    except (OSError, HTTPError) as problem:
        return (str(problem).splitlines() or [""])[0] or type(problem).__name__
    return None
