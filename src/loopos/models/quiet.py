"""The libraries' own progress bars, load reports and chatter, switched off, and as they were afterwards.

Enters: nothing. Leaves: a context for the length of a call, after which what a program set for transformers and
datasets itself is as before. `LOOPOS_VERBOSE` shows everything (the option --verbose sets it). Left out: the command
line's environment (`cli.quiet`), datasets alone (`storage.hub`).
"""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr

from loopos.storage.hub import VERBOSE, silence_datasets

# torchao, where it is installed, is imported with transformers, and tells of every kernel of another machine.
_TALKATIVE = ("torchao", "torch.utils._pytree")


@contextmanager
def quiet_libraries(*, bars_of_its_own: bool = False) -> Iterator[None]:
    """No bars, no load reports. bars_of_its_own: transformers draws some that no setting turns off (those of GGUF):
    what is written to standard error in the meantime is dropped.
    """
    if os.environ.get(VERBOSE):
        yield
        return
    # It is imported within any such call: its settings must be there to be changed.
    import transformers.utils.logging  # noqa: F401

    with ExitStack() as stack:
        stack.callback(silence_imported())
        if bars_of_its_own:
            stack.enter_context(redirect_stderr(io.StringIO()))
        yield


def silence_imported() -> Callable[[], None]:
    """Silences the libraries that are imported by now; what it returns puts back what was before."""
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
