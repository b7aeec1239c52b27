"""One checkpoint folder: tensors, state and facts enter and leave as files under a sealed manifest.

The manifest is written last; it holds the format, the facts (step, metric, best or not), the size and SHA-256 of every
other file, and the SHA-256 of itself. Left out: where the folder stands among others (see `checkpoint`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from safetensors.torch import load_file

from loopos.config.faults import UserError
from loopos.storage.durable import JSON, fsync_place, hash_file, write_hashed
from loopos.storage.json_files import json_text
from loopos.storage.tensor_format import safetensors_pieces
from loopos.training.slices import RowSpan, SlicedTensors, described, group_of

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
STATE = "state.json"
TENSORS_SUFFIX = ".safetensors"

STEP_NAME = re.compile(r"step-(\d{8,})")
HIDDEN_NAME = re.compile(r"\.(step-\d{8,})\.(partial|replaced|removed)-(\d{1,9})")
_GROUP_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")

Content = TypeVar("Content")
Records: TypeAlias = dict[str, dict[str, Any]]
"""Name of a file → its size and SHA-256."""


class CheckpointError(UserError):
    """A checkpoint that cannot be trusted: `problem` names the file and what is wrong with it."""

    def __init__(self, problem: str) -> None:
        self.problem = problem
        super().__init__(f"{problem}; wanted a whole checkpoint: choose another step of this run")


def folder_name(step: int) -> str:
    """`step-00000100` for step 100; more digits when eight do not suffice."""
    return f"step-{step:08d}"


def encode_state(state: Mapping[str, JSON]) -> bytes:
    """The bytes of `state.json`. Keys are text and floats finite (asserted); tuples come back as lists."""
    _assert_text_keys(state, "state")
    return json_text(state, allow_nan=False, sort_keys=True).encode()


def _assert_text_keys(value: JSON, where: str) -> None:
    # json would turn a number key into text without a word, and the state that comes back would be another.
    if isinstance(value, Mapping):
        for key, item in value.items():
            assert isinstance(key, str), f"{where}: key {key!r} is not text"
            _assert_text_keys(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for item in value:
            _assert_text_keys(item, where)


def write_group(folder: Path, group: str, members: Mapping[str, torch.Tensor], rows: Mapping[str, RowSpan]) -> Records:
    """Writes a file of tensors into a folder, fsynced; returns its line of the manifest. rows: which rows of a larger
    tensor the members are, for those that are slices; the file then says so.
    """
    assert _GROUP_NAME.fullmatch(group), f"group {group!r} does not name a file"
    name, metadata = group + TENSORS_SUFFIX, described(members, rows) if group_of(group) is not None else {}
    return {name: asdict(write_hashed(folder / name, safetensors_pieces(members, metadata)))}


def seal_folder(folder: Path, records: Records, state: bytes, facts: Mapping[str, JSON]) -> None:
    """Writes the encoded state and the manifest of all files, and makes the folder durable. records: what `write_group`
    returned of each file, whoever wrote it.
    """
    records = {**records, STATE: asdict(write_hashed(folder / STATE, [state]))}
    manifest: dict[str, Any] = {"format": FORMAT_VERSION, **facts, "files": records}
    manifest["sha256"] = _seal(manifest)
    write_hashed(folder / MANIFEST, [json.dumps(manifest, indent=1, allow_nan=False).encode()])
    fsync_place(folder)


def read_group(files: Sequence[Path]) -> Mapping[str, torch.Tensor]:
    """The tensors of a group, mapped from its one file, or put together from its slices. Raises `CheckpointError`."""
    if group_of(files[0].stem) is None:
        [file] = files
        tensors: dict[str, torch.Tensor] = load_file(file)
        return tensors
    try:
        return SlicedTensors(files)
    except ValueError as problem:
        raise CheckpointError(f"{files[0].parent}: {problem}") from problem


def _seal(manifest: Mapping[str, Any]) -> str:
    unsealed = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(unsealed, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, its own format, seal and step checked. Raises `CheckpointError`."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(_on_disk(path, Path.read_bytes))
    except ValueError as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(manifest, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(manifest).__name__}, not an object")
    if manifest.get("format") != FORMAT_VERSION:
        found = manifest.get("format")
        raise CheckpointError(f"{path}: written in format {found}, this LoopOS reads format {FORMAT_VERSION}")
    if manifest.get("sha256") != _seal(manifest):
        raise CheckpointError(f"{path}: the content is not what was saved (SHA-256 differs)")
    if STEP_NAME.fullmatch(folder.name) and folder.name != folder_name(manifest["step"]):
        raise CheckpointError(f"{path}: says step {manifest['step']}, its folder is called {folder.name}")
    return manifest


def check_sizes(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Every file that the manifest lists is there with its size. Raises `CheckpointError`; costs no reading."""
    for name, record in manifest["files"].items():
        size = _on_disk(folder / name, lambda file: file.stat().st_size)
        if size != record["size"]:
            kind = "truncated" if size < record["size"] else "longer than what was saved"
            raise CheckpointError(f"{folder / name}: {kind}: {size:,} bytes, the manifest says {record['size']:,}")


def check_hashes(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Every file's content is what was saved; reads all of it once. Raises `CheckpointError`."""
    for name, record in manifest["files"].items():
        if _on_disk(folder / name, hash_file).sha256 != record["sha256"]:
            raise CheckpointError(f"{folder / name}: the content is not what was saved (SHA-256 differs)")


def looks_whole(folder: Path) -> bool:
    """Whether manifest and file sizes are right, without reading the files."""
    try:
        check_sizes(folder, read_manifest(folder))
    except CheckpointError:
        return False
    return True


def _on_disk(path: Path, read: Callable[[Path], Content]) -> Content:
    try:
        return read(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing") from error
    except OSError as error:
        raise CheckpointError(f"{path}: not readable ({error.strerror})") from error
