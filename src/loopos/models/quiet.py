"""transformers without its bars and reports, for the length of a call of ours.

Enters: nothing. Leaves: a context. What a program set for transformers itself is as before afterwards. `LOOPOS_VERBOSE`
shows everything (the option --verbose sets it). Left out: the command line's own switches, which silence every library
(`cli.quiet`).
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

VERBOSE = "LOOPOS_VERBOSE"


@contextmanager
def quiet_transformers(*, bars_of_its_own: bool = False) -> Iterator[None]:
    """No bars, no load reports. bars_of_its_own: it draws some that no setting turns off (those of GGUF): what is
    written to standard error in the meantime is dropped.
    """
    if os.environ.get(VERBOSE):
        yield
        return
    from transformers.utils import logging

    level, shows_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        if bars_of_its_own:
            with redirect_stderr(io.StringIO()):
                yield
        else:
            yield
    finally:
        logging.set_verbosity(level)
        if shows_bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
