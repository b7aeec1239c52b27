"""Tensors that lie in several files, each with some rows of them.

    weights-00001-of-00002.safetensors  weights-00002-of-00002.safetensors

Enters: the rows that a process holds; or the files of all. Leaves: what a file says of its rows; a group of whole
tensors, of which only the rows asked for are read. Left out: the folder around them (`checkpoint_folder.py`).
A file's metadata has under "slices" the name of each tensor that it holds a part of → [first row, rows of the whole].
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

SLICES = "slices"
_NAME = re.compile(r"(?P<group>[a-z0-9][a-z0-9_-]*)-(?P<number>\d{5})-of-(?P<files>\d{5})")


class RowSpan(Protocol):
    """`count` rows from row `first` on, of a tensor of `shape`."""

    @property
    def first(self) -> int: ...
    @property
    def count(self) -> int: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


def slice_name(group: str, number: int, files: int) -> str:
    """The name, without its ending, of the file of process `number` (from 0) among `files`."""
    return f"{group}-{number + 1:05d}-of-{files:05d}"


def group_of(stem: str) -> str | None:
    """The group that a file without its ending is a slice of; None for a file of whole tensors."""
    caught = _NAME.fullmatch(stem)
    return None if caught is None else caught["group"]


def described(tensors: Mapping[str, Tensor], rows: Mapping[str, RowSpan]) -> dict[str, str]:
    """The metadata of a file with these tensors; those without an entry in `rows` are whole."""
    return {SLICES: json.dumps({name: [rows[name].first, rows[name].shape[0]] for name in tensors if name in rows})}


def rows_of(tensors: Mapping[str, Tensor], name: str, rows: RowSpan | None) -> Tensor:
    """Some rows of a tensor of a checkpoint, or with None, or of a single number, all of it. Raises `ValueError` for a
    tensor of another shape.
    """
    if rows is None or (isinstance(tensors, SlicedTensors) and tensors.is_whole(name)):
        return tensors[name]
    if isinstance(tensors, SlicedTensors):
        found = tensors.rows(name, rows.first, rows.count)
    else:
        found = tensors[name]
        if found.ndim == 0:
            return found
        found = found[rows.first : rows.first + rows.count]
    if tuple(found.shape) != (rows.count, *rows.shape[1:]):
        raise ValueError(f"{name} is of another shape than {list(rows.shape)}")
    return found


class SlicedTensors(Mapping[str, Tensor]):
    """Name → whole tensor, put together from the files when it is asked for, and not kept."""

    def __init__(self, files: Sequence[Path]) -> None:
        """files: mapped, not read. Raises `ValueError` for files that leave rows of a tensor out."""
        # The package leaves its annotations out.
        self._files: list[Any] = [safe_open(file, framework="pt") for file in files]
        # name → (first row, rows, file), in the order of rows; a whole tensor begins at None.
        self._parts: dict[str, list[tuple[int, int, int]]] = {}
        self._whole: dict[str, int] = {}
        rows: dict[str, int] = {}
        for number, file in enumerate(self._files):
            told = json.loads(file.metadata()[SLICES])
            for name in file.keys():  # noqa: SIM118  # not a mapping
                if name not in told:
                    self._whole[name] = number
                    continue
                first, rows[name] = told[name]
                self._parts.setdefault(name, []).append((first, file.get_slice(name).get_shape()[0], number))
        for name, parts in self._parts.items():
            parts.sort()
            covered = 0
            for first, count, _ in parts:
                if first != covered:
                    raise ValueError(f"rows from {covered} on of {name} are in no file")
                covered += count
            if covered != rows[name]:
                raise ValueError(f"rows from {covered} on of {name} are in no file")

    def __getitem__(self, name: str) -> Tensor:
        if name in self._whole:
            whole: Tensor = self._files[self._whole[name]].get_tensor(name)
            return whole
        return self.rows(name, 0, sum(count for _, count, _ in self._parts[name]))

    def is_whole(self, name: str) -> bool:
        """Whether the tensor lies in one file as it is."""
        return name in self._whole

    def rows(self, name: str, first: int, count: int) -> Tensor:
        """`count` rows of a tensor from row `first` on; only these are read."""
        found: list[Tensor] = []
        for start, rows, number in self._parts[name]:
            low, high = max(first, start), min(first + count, start + rows)
            if low < high:
                found.append(self._files[number].get_slice(name)[low - start : high - start])
        if not found:
            nothing: Tensor = self._files[self._parts[name][0][2]].get_slice(name)[:0]
            return nothing
        return found[0] if len(found) == 1 else torch.cat(found)

    def __iter__(self) -> Iterator[str]:
        return iter([*self._whole, *self._parts])

    def __len__(self) -> int:
        return len(self._whole) + len(self._parts)
