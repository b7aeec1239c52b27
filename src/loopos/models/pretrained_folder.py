"""Pretrained weights as other configs name them: a folder, or a file with its config and tokenizer beside it.

Enters: a causal language model and its tokenizer. Leaves: files. Left out: reading them (`load.py`).
"""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loopos.models.quantized_folder import save_weights
from loopos.storage.durable import fsync_place
from loopos.storage.whole_folder import partial_folder

_FILES = (".bin", ".safetensors")
_WEIGHTS = "model.safetensors"


def save_pretrained(place: Path, causal: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes model and tokenizer to the folder `place`, or, where `place` ends in .bin or .safetensors, the weights to
    that file (safetensors inside, under either name) and the rest beside it.

    Each file is written beside its place, flushed to the disk and renamed, the weights last. Raises `OSError` when the
    disk is full.
    """
    folder = place.parent if place.suffix in _FILES else place
    with partial_folder(folder / _WEIGHTS) as partial:
        save_weights(partial, causal)
        tokenizer.save_pretrained(partial)
    weights = partial / _WEIGHTS
    try:
        for file in sorted(partial.iterdir()):
            if file != weights:
                file.replace(folder / file.name)
        fsync_place(folder)
        weights.replace(place if place.suffix in _FILES else folder / _WEIGHTS)
        fsync_place(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
