"""Pretrained weights as other configs name them: a folder, or a file with its config and tokenizer beside it.

Enters: a causal language model and its tokenizer. Leaves: files. Left out: reading them (`load.py`).
"""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loopos.config.faults import UserError
from loopos.config.paths import MANIFEST
from loopos.models.quantized_folder import save_weights
from loopos.storage.durable import FileRecord, fsync_place
from loopos.storage.manifest import read_manifest, write_manifest
from loopos.storage.whole_folder import partial_folder

_FILES = (".bin", ".safetensors")
_WEIGHTS = "model.safetensors"


def save_pretrained(place: Path, causal: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes model and tokenizer to the folder `place`, or, where `place` ends in .bin or .safetensors, the weights to
    that file (safetensors inside, under either name) and the rest beside it.

    Each file is written beside its place, flushed to the disk and renamed, the weights last; the folder's manifest, in
    which files of other weights keep their lines, is taken away before and written after. Raises `OSError` when the
    disk is full.
    """
    folder = place.parent if place.suffix in _FILES else place
    with partial_folder(folder / _WEIGHTS) as partial:
        save_weights(partial, causal)
        tokenizer.save_pretrained(partial)
    weights, final = partial / _WEIGHTS, place if place.suffix in _FILES else folder / _WEIGHTS
    try:
        written = read_manifest(partial)
        records = {**_lines_of_others(folder), **written}
        if final.name != _WEIGHTS:
            records[final.name] = records.pop(_WEIGHTS)
        (folder / MANIFEST).unlink(missing_ok=True)
        for file in sorted(partial.iterdir()):
            if file != weights and file.name != MANIFEST:
                file.replace(folder / file.name)
        fsync_place(folder)
        weights.replace(final)
        write_manifest(folder, records)
        fsync_place(folder / MANIFEST)
        fsync_place(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _lines_of_others(folder: Path) -> dict[str, FileRecord]:
    """What the manifest of a folder holds so far. A broken one is replaced, and checks nothing from then on."""
    try:
        return read_manifest(folder)
    except UserError:
        return {}
