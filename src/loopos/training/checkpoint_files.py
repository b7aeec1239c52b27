"""One checkpoint folder: tensors, state and facts enter and leave as files under a sealed manifest.

The manifest is written last; it holds the format, the facts (step, metric, best or not), the size and SHA-256 of every
other file, and the SHA-256 of itself. Left out: where the folder stands among others (see `checkpoint`).

One checkpoint on its way to the disk, by one process or by all of a run, perhaps while training goes on.

    begin    the first process makes the hidden folder; weights that are not finite numbers are refused
    write    every process writes its files into it, in a thread of its own where it is asked for
    finish   the first process adds state and manifest, and gives the folder its name

Enters: the tensors that each process is to write, and JSON state. Leaves: a checkpoint folder, whole or not there. Left
out: what is in a folder (`checkpoint_folder.py`), reading (`checkpoint.py`). No tensor is copied: between `begin` and
`finish` they must not change. More than one host needs a file system that all share.
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
    """A checkpoint that cannot be trusted: `problem` names the file and what is wrong with it."""

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
    return {name: asdict(write_hashed(folder / name, safetensors_chunks(members, metadata)))}


def seal_folder(folder: Path, records: Records, state: bytes, facts: Mapping[str, JSON]) -> None:
    """Writes the encoded state and the manifest of all files, and makes the folder durable. records: what `write_group`
    returned of each file, whoever wrote it.
    """
    records = {**records, STATE: asdict(write_hashed(folder / STATE, [state]))}
    manifest: dict[str, Any] = {"format": FORMAT_VERSION, **facts, "files": records}
    manifest["sha256"] = _seal(manifest)
    write_hashed(folder / MANIFEST, [json.dumps(manifest, indent=1, allow_nan=False).encode()])
    fsync_path(folder)


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


logger = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """Weights hold nan or inf and were therefore not saved."""


@dataclass
class Save:
    """The checkpoint of `step` under `root`. `tensors`: group → name → tensor, the files that this process writes.
    `rows`: of the members that are rows of larger tensors, which. `weights`: those that must be finite. `state`,
    `metric`, `is_best`: the first process's count.
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
        """Makes the folder and writes this process's files, or begins to. Leftovers of saves that died are cleared
        first and logged as warnings.

        Raises `NonFiniteError` on every process (nothing was written), `DiskFull`.
        """
        told = self.world.gather(_nonfinite(self.weights))
        _refuse_nonfinite([name for names in told for name in _names(names)], of=len(self.weights))
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
        """Returns the folder, once it is whole. Raises `DiskFull`, on every process: what was written of this
        checkpoint is removed, earlier ones are whole.
        """
        if self._thread is not None:
            self._thread.join()
        problem = None if self._problem is None else (str(self._problem), isinstance(self._problem, StorageError))
        gathered = self.world.gather((self._records, problem))
        told = [each for each in gathered if isinstance(each, tuple)]
        failed = [theirs for _, theirs in told if theirs is not None]
        if failed:
            self.give_up()
            summary, is_of_storage = failed[0]
            raise self._problem or (StorageError(summary) if is_of_storage else UserError(summary))
        if self.world.is_first:
            try:
                self._seal({name: record for written, _ in told for name, record in written.items()})
            # Ctrl-C too must leave no half of a checkpoint.
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
        """Removes what is there of it."""
        if self.world.is_first:
            # What cannot be removed now is cleared, and said, by the next save.
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
            # Told by `finish`, where all processes learn of it.
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
    """Write checkpoint `step` under `root` durably and return its folder; replaces one of the same step.

    Leftovers of saves that died are cleared first and logged as warnings. At no time is more than one tensor copied.

    Raises:
        NonFiniteError: the group "weights" holds nan or inf; nothing was written.
        DiskFull: no space or quota left; what was written of this checkpoint is removed, earlier ones are whole.
    """
    saving = Save(root, step, tensors, state, tensors.get("weights", {}), metric=metric, is_best=is_best)
    try:
        saving.begin()
        return saving.finish()
    # Ctrl-C too must leave no half of a checkpoint.
    except BaseException:
        saving.give_up()
        raise


def sweep(root: Path, *, is_only_writer: bool = False) -> list[str]:
    """Clear what dead processes left half done under `root`; returns one line for each thing done. is_only_writer: this
    process holds the run's folder, so that what it finds is nobody's, whatever process has its number by now.

    A checkpoint caught between the two renames of its replacement gets its name back.
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
            # Extremes carry nan and inf through without a mask as large as the weight; 8-bit floats have none.
            low, high = torch.aminmax(values.float() if values.element_size() == 1 else values)
            if not (torch.isfinite(low) and torch.isfinite(high)):
                bad.append(name)
    return bad


def _names(told: object) -> list[str]:
    assert isinstance(told, list), told
    return told


def _refuse_nonfinite(bad: Iterable[str], *, of: int) -> None:
    names = list(dict.fromkeys(bad))
    if names:
        listed = ", ".join(names[:5]) + (" and others" if len(names) > 5 else "")
        raise NonFiniteError(f"nan or inf in {len(names)} of {of} weights, not saved: {listed}")
