"""Switches off the progress bars and log messages of transformers, datasets and huggingface-hub.

Sets environment variables that they read at import, and silences those already imported; the user's settings stay.
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
    """Silences the libraries, unless `verbose`."""
    if verbose:
        os.environ[VERBOSE] = "1"
        return
    for name, value in SILENCE.items():
        os.environ.setdefault(name, value)
    silence_imported()
