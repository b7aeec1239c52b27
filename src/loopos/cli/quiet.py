"""The libraries' own progress bars and chatter, switched off.

Enters: whether the user wants them. Leaves: environment variables that transformers, datasets and huggingface-hub read
at import, and the same said to those that are imported already; what the user has set stays.
"""

from __future__ import annotations

import os
import sys

SILENCE = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


def hush_libraries(*, verbose: bool) -> None:
    """Silences the libraries, unless the user wants to see everything."""
    if verbose:
        return
    for name, value in SILENCE.items():
        os.environ.setdefault(name, value)
    if "transformers" in sys.modules:
        from transformers.utils import logging

        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if "datasets" in sys.modules:
        import datasets

        datasets.logging.set_verbosity_error()
        datasets.disable_progress_bars()
