"""Silences progress bars, load reports and messages of libraries, and restores their settings afterwards.

`LOOPOS_VERBOSE` (set by the option --verbose) shows everything.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr

from loopos.storage.hub import VERBOSE, silence_datasets

# transformers imports torchao if it is installed, which logs every kernel that this machine lacks.
_TALKATIVE = ("torchao", "torch.utils._pytree")


@contextmanager
def quiet_libraries(*, bars_of_its_own: bool = False) -> Iterator[None]:
    """Within the context there are no bars and load reports. bars_of_its_own: transformers draws some bars that no
    setting turns off (for GGUF), so standard error is dropped meanwhile.
    """
    if os.environ.get(VERBOSE):
        yield
        return
    # Import it now, so that its settings can be changed. In a notebook tqdm, which it imports, asks for ipywidgets.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="IProgress not found")
        import transformers.utils.logging  # noqa: F401

    with ExitStack() as stack:
        stack.callback(silence_imported())
        if bars_of_its_own:
            stack.enter_context(redirect_stderr(io.StringIO()))
        yield


def silence_imported() -> Callable[[], None]:
    """Silences the libraries imported so far; returns a function that restores their settings."""
    with ExitStack() as stack:
        for name in _TALKATIVE:
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        if "transformers" in sys.modules:
            stack.callback(_silence_transformers())
        if "datasets" in sys.modules:
            stack.callback(silence_datasets())
        return stack.pop_all().close


def _silence_transformers() -> Callable[[], None]:
    from transformers.utils import logging as of_transformers

    level, shows_bars = of_transformers.get_verbosity(), of_transformers.is_progress_bar_enabled()
    of_transformers.set_verbosity_error()  # type: ignore[no-untyped-call]
    of_transformers.disable_progress_bar()  # type: ignore[no-untyped-call]

    def as_before() -> None:
        of_transformers.set_verbosity(level)
        if shows_bars:
            of_transformers.enable_progress_bar()  # type: ignore[no-untyped-call]

    return as_before
