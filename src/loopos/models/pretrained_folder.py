"""Pretrained weights as other configs name them: a folder, or a file with its config and tokenizer beside it.

Enters: a causal language model and its tokenizer. Leaves: files. Left out: reading them (`load.py`).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loopos.models.quantized_folder import save_weights

_FILES = (".bin", ".safetensors")
_WEIGHTS = "model.safetensors"


def save_pretrained(place: Path, causal: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes model and tokenizer to the folder `place`, or, where `place` ends in .bin or .safetensors, the weights to
    that file (safetensors inside, under either name) and the rest beside it.

    Each file is written beside its place and renamed, the weights last. Raises `OSError` when the disk is full.
    """
    folder = place.parent if place.suffix in _FILES else place
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        save_weights(partial, causal)
        tokenizer.save_pretrained(partial)
        weights = partial / _WEIGHTS
        for file in sorted(partial.iterdir()):
            if file != weights:
                file.replace(folder / file.name)
        weights.replace(place if place.suffix in _FILES else folder / _WEIGHTS)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
