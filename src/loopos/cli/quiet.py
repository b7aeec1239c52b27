"""The libraries' own progress bars and chatter, switched off before they are imported.

Enters: whether the user wants them. Leaves: environment variables that transformers, datasets and huggingface-hub read
at import; those that the user has set stay.
"""

from __future__ import annotations

import os

SILENCE = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


def hush_libraries(*, verbose: bool) -> None:
    """Sets the variables, unless the user wants to see everything."""
    if not verbose:
        for name, value in SILENCE.items():
            os.environ.setdefault(name, value)
