"""The files of one checkpoint folder, and how they are written: by one process or all processes of a run, optionally
while training continues.

    begin    rank 0 creates a hidden folder; weights that are not finite are refused
    write    every process writes its files into it, optionally in a thread
    finish   rank 0 adds state and manifest and renames the folder

The manifest is written last. It contains the format, the facts (step, metric, best or not), size and SHA-256 of every
other file, and its own SHA-256. Tensors are not copied: they must not change between `begin` and `finish`. Several
hosts need a shared file system.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any, TypeAlias, TypeVar

import torch
from safetensors.torch import load_file

from loopos.config.diagnostics import UserError
from loopos.storage.durable import JSON, StorageError, explain_disk_full, fsync_path, hash_file, write_hashed
from loopos.storage.json_files import json_text
from loopos.storage.tensor_files import num_bytes, safetensors_chunks
from loopos.storage.whole_folder import hidden, is_another_process, remove, replace_folder
from loopos.training.distributed import World
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
    """A checkpoint that cannot be used. `problem` names the file and what is wrong with it."""

    def __init__(self, problem: str) -> None:
        self.problem = problem
        super().__init__(f"{problem}; expected a whole checkpoint: choose another step of this run")


def folder_name(step: int) -> str:
    """`step-00000100` for step 100; more digits when eight do not suffice."""
    return f"step-{step:08d}"


def encode_state(state: Mapping[str, JSON]) -> bytes:
    """The bytes of `state.json`. Keys are text and floats finite (asserted); tuples come back as lists."""
    _assert_text_keys(state, "state")
    return json_text(state, allow_nan=False, sort_keys=True).encode()


def _assert_text_keys(value: JSON, where: str) -> None:
    # json silently turns a number key into text, and the restored state would differ.
    if isinstance(value, Mapping):
        for key, item in value.items():
            assert isinstance(key, str), f"{where}: key {key!r} is not text"
            _assert_text_keys(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for item in value:
            _assert_text_keys(item, where)


def write_group(folder: Path, group: str, members: Mapping[str, torch.Tensor], rows: Mapping[str, RowSpan]) -> Records:
    """Writes a file of tensors to a folder, with fsync; returns its manifest entry. rows: rows of a larger tensor, for
    tensors that are slices; the file's metadata records them.
    """
    assert _GROUP_NAME.fullmatch(group), f"group {group!r} does not name a file"
    name, metadata = group + TENSORS_SUFFIX, described(members, rows) if group_of(group) is not None else {}
    return {name: asdict(write_hashed(folder / name, safetensors_chunks(members, metadata)))}


def seal_folder(folder: Path, records: Records, state: bytes, facts: Mapping[str, JSON]) -> None:
    """Writes the encoded state and the manifest, and makes the folder durable. records: what `write_group` returned for
    each file, from all processes.
    """
    records = {**records, STATE: asdict(write_hashed(folder / STATE, [state]))}
    manifest: dict[str, Any] = {"format": FORMAT_VERSION, **facts, "files": records}
    manifest["sha256"] = _seal(manifest)
    write_hashed(folder / MANIFEST, [json.dumps(manifest, indent=1, allow_nan=False).encode()])
    fsync_path(folder)


def read_group(files: Sequence[Path]) -> Mapping[str, torch.Tensor]:
    """The tensors of a group: memory-mapped from its one file, or assembled from its slices. Raises
    `CheckpointError`.
    """
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
    """The manifest, with its format, checksum and step verified. Raises `CheckpointError`."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(_on_disk(path, Path.read_bytes))
    except ValueError as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(manifest, dict):
        raise CheckpointError(f"{path}: got a JSON {type(manifest).__name__}; expected an object")
    if manifest.get("format") != FORMAT_VERSION:
        found = manifest.get("format")
        raise CheckpointError(f"{path}: written in format {found}, this LoopOS reads format {FORMAT_VERSION}")
    if manifest.get("sha256") != _seal(manifest):
        raise CheckpointError(f"{path}: the content is not what was saved (SHA-256 differs)")
    if STEP_NAME.fullmatch(folder.name) and folder.name != folder_name(manifest["step"]):
        raise CheckpointError(f"{path}: has step {manifest['step']}, but its folder is called {folder.name}")
    return manifest


def check_sizes(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Checks that every file of the manifest exists with its size, without reading it. Raises `CheckpointError`."""
    for name, record in manifest["files"].items():
        size = _on_disk(folder / name, lambda file: file.stat().st_size)
        if size != record["size"]:
            kind = "truncated" if size < record["size"] else "longer than what was saved"
            raise CheckpointError(f"{folder / name}: {kind}: {size:,} bytes, the manifest says {record['size']:,}")


def check_hashes(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Checks the SHA-256 of every file; reads all of it once. Raises `CheckpointError`."""
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


logger = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """Weights contain nan or inf and were not saved."""


@dataclass
class Save:
    """The checkpoint of `step` under `root`. `tensors`: group → name → tensor, the files that this process writes.
    `rows`: for tensors that are rows of larger ones, which rows. `weights`: tensors that must be finite. Only rank 0's
    `state`, `metric` and `is_best` are used.
    """

    root: Path
    step: int
    tensors: Mapping[str, Mapping[str, torch.Tensor]]
    state: Mapping[str, JSON]
    weights: Mapping[str, torch.Tensor]
    rows: Mapping[str, RowSpan] = field(default_factory=dict)
    metric: float | None = None
    is_best: bool = False
    world: World = World()

    def __post_init__(self) -> None:
        assert self.step >= 0, f"step {self.step} is negative"
        assert self.metric is None or math.isfinite(self.metric), f"{self.metric} is no metric of a checkpoint"
        self._content = encode_state(self.state)
        self._needed = len(self._content) + sum(num_bytes(group) for group in self.tensors.values())
        self._final = self.root / folder_name(self.step)
        self._partial = hidden(self._final, "partial")
        self._records: Records = {}
        self._problem: OSError | UserError | None = None
        self._thread: Thread | None = None

    def begin(self, *, in_background: bool = False) -> None:
        """Creates the folder and writes this process's files, or starts to. First removes partial saves of killed
        processes and logs them as warnings.

        Raises `NonFiniteError` on every process, before anything is written, and `DiskFull`.
        """
        gathered = self.world.gather(_nonfinite(self.weights))
        _refuse_nonfinite([name for names in gathered for name in _names(names)], of=len(self.weights))
        if self.world.is_first:
            with self._explain_disk_full():
                self._make_folder()
        self._partial = Path(str(self.world.gather(str(self._partial))[0]))
        if in_background:
            self._thread = Thread(target=self._write, name="checkpoint")
            self._thread.start()
        else:
            self._write()

    def finish(self) -> Path:
        """Returns the folder when it is complete. Raises `DiskFull` on every process; the partial checkpoint is
        removed, earlier ones stay.
        """
        if self._thread is not None:
            self._thread.join()
        problem = None if self._problem is None else (str(self._problem), isinstance(self._problem, StorageError))
        gathered = self.world.gather((self._records, problem))
        results = [each for each in gathered if isinstance(each, tuple)]
        failed = [failure for _, failure in results if failure is not None]
        if failed:
            self.give_up()
            summary, is_of_storage = failed[0]
            raise self._problem or (StorageError(summary) if is_of_storage else UserError(summary))
        if self.world.is_first:
            try:
                self._seal({name: record for written, _ in results for name, record in written.items()})
            # Also after Ctrl-C no partial checkpoint may stay.
            except BaseException:
                self.give_up()
                raise
        self.world.wait()
        return self._final

    def _seal(self, records: Records) -> None:
        facts = {"step": self.step, "metric": self.metric, "is_best": self.is_best}
        with self._explain_disk_full():
            seal_folder(self._partial, records, self._content, facts)
            replace_folder(self._partial, self._final)

    def give_up(self) -> None:
        """Removes the partial checkpoint."""
        if self.world.is_first:
            # The next save removes and reports what cannot be removed now.
            shutil.rmtree(self._partial, ignore_errors=True)

    def _make_folder(self) -> None:
        if not self.root.is_dir():
            self.root.mkdir(parents=True)
            fsync_path(self.root.parent)
        for line in sweep(self.root):
            logger.warning(line)
        self._partial.mkdir()

    def _write(self) -> None:
        try:
            if not self._partial.is_dir():
                raise UserError(
                    f"{self._partial}: not seen by process {self.world.rank}; expected an output_dir on a file system "
                    "that all hosts of the run share"
                )
            with self._explain_disk_full():
                for group, members in self.tensors.items():
                    self._records |= write_group(self._partial, group, members, self.rows)
        except (OSError, UserError) as problem:
            # Raised by `finish` on all processes.
            self._problem = problem

    def _explain_disk_full(self) -> Any:
        return explain_disk_full(self.root, self._needed, f"the checkpoint of step {self.step}")


def save(
    root: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    state: Mapping[str, JSON],
    *,
    metric: float | None = None,
    is_best: bool = False,
) -> Path:
    """Writes checkpoint `step` under `root` durably and returns its folder; replaces one of the same step.

    First removes partial saves of killed processes and logs them as warnings. At no time is more than one tensor
    copied.

    Raises:
        NonFiniteError: the group "weights" contains nan or inf; nothing was written.
        DiskFull: no space or quota left; the partial checkpoint is removed, earlier ones stay.
    """
    saving = Save(root, step, tensors, state, tensors.get("weights", {}), metric=metric, is_best=is_best)
    try:
        saving.begin()
        return saving.finish()
    # Also after Ctrl-C no partial checkpoint may stay.
    except BaseException:
        saving.give_up()
        raise


def sweep(root: Path, *, is_only_writer: bool = False) -> list[str]:
    """Removes partial checkpoints of dead processes under `root`; returns one line per change. is_only_writer: this
    process has locked the run's folder, so partial checkpoints belong to no living process.

    A checkpoint that was interrupted between the two renames of its replacement gets its name back.
    """
    summary = []
    for entry in sorted(root.iterdir()) if root.is_dir() else []:
        caught = HIDDEN_NAME.fullmatch(entry.name)
        if caught is None or (not is_only_writer and is_another_process(int(caught[3]))):
            continue
        if caught[2] == "replaced" and not (root / caught[1]).exists():
            os.rename(entry, root / caught[1])
            fsync_path(root)
            summary.append(f"{root / caught[1]}: put back, its replacement was never finished")
        else:
            remove(entry)
            summary.append(f"{entry}: removed, left by process {caught[3]} that ended before it was done")
    return summary


def _nonfinite(weights: Mapping[str, torch.Tensor]) -> list[str]:
    bad = []
    for name, weight in weights.items():
        if weight.is_floating_point() and weight.numel() > 0:
            values = weight.detach()
            # aminmax propagates nan and inf without a mask as large as the weight; 8-bit floats do not support it.
            low, high = torch.aminmax(values.float() if values.element_size() == 1 else values)
            if not (torch.isfinite(low) and torch.isfinite(high)):
                bad.append(name)
    return bad


def _names(gathered: object) -> list[str]:
    assert isinstance(gathered, list), gathered
    return gathered


def _refuse_nonfinite(bad: Iterable[str], *, of: int) -> None:
    names = list(dict.fromkeys(bad))
    if names:
        listed = ", ".join(names[:5]) + (" and others" if len(names) > 5 else "")
        raise NonFiniteError(f"nan or inf in {len(names)} of {of} weights, not saved: {listed}")
