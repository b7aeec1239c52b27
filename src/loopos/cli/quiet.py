"""The libraries' own progress bars and chatter, switched off.

Enters: whether the user wants them. Leaves: environment variables that transformers, datasets and huggingface-hub read
at import, and the same said to those that are imported already; what the user has set stays.
"""

from __future__ import annotations

import logging
import os
import sys

from loopos.models.quiet import VERBOSE

SILENCE = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
}
# torchao, where it is installed, is imported with transformers, and tells of every kernel of another machine.
_TALKATIVE = ("torchao", "torch.utils._pytree")


def hush_libraries(*, verbose: bool) -> None:
    """Silences the libraries, unless the user wants to see everything."""
    if verbose:
        os.environ[VERBOSE] = "1"
        return
    for name, value in SILENCE.items():
        os.environ.setdefault(name, value)
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    if "transformers" in sys.modules:
        from transformers.utils import logging as of_transformers

        of_transformers.set_verbosity_error()  # type: ignore[no-untyped-call]
        of_transformers.disable_progress_bar()  # type: ignore[no-untyped-call]
    if "datasets" in sys.modules:
        import datasets

        datasets.logging.set_verbosity_error()
        datasets.disable_progress_bars()
