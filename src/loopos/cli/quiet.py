"""The libraries' own progress bars and chatter, switched off.

Enters: whether the user wants them. Leaves: environment variables that transformers, datasets and huggingface-hub read
at import, and the same said to those that are imported already; what the user has set stays.
"""

from __future__ import annotations

import os

from loopos.models.quiet import silence_imported
from loopos.storage.hub import VERBOSE

SILENCE = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
}


def hush_libraries(*, verbose: bool) -> None:
    """Silences the libraries, unless the user wants to see everything."""
    if verbose:
        os.environ[VERBOSE] = "1"
        return
    for name, value in SILENCE.items():
        os.environ.setdefault(name, value)
    silence_imported()
