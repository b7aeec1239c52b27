"""Checkpoint tensors that are distributed over several files, each with some rows.

    weights-00001-of-00002.safetensors  weights-00002-of-00002.safetensors

A file's metadata has under "slices" for each tensor [first row, rows of the full tensor], and for a part with only some
columns also [first column, columns of the full tensor]. Only the requested rows are read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

SLICES = "slices"
_NAME = re.compile(r"(?P<group>[a-z0-9][a-z0-9_-]*)-(?P<number>\d{5})-of-(?P<files>\d{5})")


class RowSpan(Protocol):
    """`count` rows from row `first` on, of a tensor of `shape`. `columns`: first column and number of columns, None for
    all.
    """

    @property
    def first(self) -> int: ...
    @property
    def count(self) -> int: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def columns(self) -> tuple[int, int] | None: ...


@dataclass(frozen=True, order=True)
class _Part:
    """The part of a tensor in a file: starts at this row and column; `width` None for all columns."""

    column: int
    row: int
    count: int
    width: int | None
    file: int


def slice_name(group: str, number: int, files: int) -> str:
    """The file name without suffix for process `number` (from 0) among `files`."""
    return f"{group}-{number + 1:05d}-of-{files:05d}"


def group_of(stem: str) -> str | None:
    """The group that a file (name without suffix) is a slice of; None for a file of complete tensors."""
    caught = _NAME.fullmatch(stem)
    return None if caught is None else caught["group"]


def described(tensors: Mapping[str, Tensor], rows: Mapping[str, RowSpan]) -> dict[str, str]:
    """The metadata of a file with these tensors; those without an entry in `rows` are complete."""
    return {SLICES: json.dumps({name: _span(rows[name]) for name in tensors if name in rows})}


def _span(rows: RowSpan) -> list[int]:
    columns = [] if rows.columns is None else [rows.columns[0], rows.shape[1]]
    return [rows.first, rows.shape[0], *columns]


def rows_of(tensors: Mapping[str, Tensor], name: str, rows: RowSpan | None) -> Tensor:
    """Some rows of a checkpoint's tensor; all of it for None or a scalar. Raises `ValueError` for a tensor of another
    shape.
    """
    if rows is None or (isinstance(tensors, SlicedTensors) and tensors.is_whole(name)):
        return tensors[name]
    if isinstance(tensors, SlicedTensors):
        found = tensors.rows(name, rows.first, rows.count, rows.columns)
    else:
        found = tensors[name]
        if found.ndim == 0:
            return found
        found = found[rows.first : rows.first + rows.count]
        if rows.columns is not None and found.ndim > 1:
            found = found[:, rows.columns[0] : sum(rows.columns)]
    others = rows.shape[1:] if rows.columns is None else (rows.columns[1],)
    if tuple(found.shape) != (rows.count, *others):
        raise ValueError(f"{name} is of another shape than {list(rows.shape)}")
    return found


def _refuse_gaps(name: str, parts: list[_Part], rows: int, columns: int | None) -> None:
    """Sorts the parts of a tensor. Raises `ValueError` unless they cover it."""
    parts.sort()
    covered = 0
    for column, band in groupby(parts, key=lambda part: part.column):
        below = 0
        for part in band:
            if part.row != below:
                break
            below += part.count
        if below != rows:
            raise ValueError(f"rows from {below} on of {name} are in no file")
        if column != covered:
            break
        covered += part.width or 0
    if covered != (columns or 0):
        raise ValueError(f"columns from {covered} on of {name} are in no file")


class SlicedTensors(Mapping[str, Tensor]):
    """Name → full tensor, assembled from the files on access and not cached."""

    def __init__(self, files: Sequence[Path]) -> None:
        """files: memory-mapped. Raises `ValueError` if rows of a tensor are missing."""
        # safetensors has no annotations.
        self._files: list[Any] = [safe_open(file, framework="pt") for file in files]
        self._parts: dict[str, list[_Part]] = {}
        self._whole: dict[str, int] = {}
        sizes: dict[str, tuple[int, int | None]] = {}
        for number, file in enumerate(self._files):
            spans = json.loads(file.metadata()[SLICES])
            for name in file.keys():  # noqa: SIM118  # not a mapping
                if name not in spans:
                    self._whole[name] = number
                    continue
                row, rows, *columns = spans[name]
                shape = file.get_slice(name).get_shape()
                column, width = (columns[0], shape[1]) if columns else (0, None)
                sizes[name] = rows, columns[1] if columns else None
                self._parts.setdefault(name, []).append(_Part(column, row, shape[0], width, number))
        for name, parts in self._parts.items():
            _refuse_gaps(name, parts, *sizes[name])

    def __getitem__(self, name: str) -> Tensor:
        if name in self._whole:
            whole: Tensor = self._files[self._whole[name]].get_tensor(name)
            return whole
        parts = self._parts[name]
        return self.rows(name, 0, sum(part.count for part in parts if part.column == parts[0].column))

    def is_whole(self, name: str) -> bool:
        """Whether the tensor is complete in one file."""
        return name in self._whole

    def rows(self, name: str, first: int, count: int, columns: tuple[int, int] | None = None) -> Tensor:
        """`count` rows of a tensor from row `first` on, and optionally only some columns. Reads nothing else."""
        bands = []
        for column, band in groupby(self._parts[name], key=lambda part: part.column):
            parts = list(band)
            width = parts[0].width
            if columns is None:
                low, high = 0, width
            else:
                low = max(columns[0] - column, 0)
                high = sum(columns) - column if width is None else min(sum(columns) - column, width)
            if high is None or low < high:
                bands.append(self._rows(name, parts, first, count, slice(low, high)))
        return bands[0] if len(bands) == 1 else torch.cat(bands, dim=1)

    def _rows(self, name: str, parts: Sequence[_Part], first: int, count: int, columns: slice) -> Tensor:
        is_cut = columns != slice(0, None)
        found: list[Tensor] = []
        for part in parts:
            low, high = max(first, part.row), min(first + count, part.row + part.count)
            if low < high or (part is parts[-1] and not found):
                stored = self._files[part.file].get_slice(name)
                rows = slice(low - part.row, high - part.row) if low < high else slice(0, 0)
                found.append(stored[rows, columns] if is_cut else stored[rows])
        return found[0] if len(found) == 1 else torch.cat(found)

    def __iter__(self) -> Iterator[str]:
        return iter([*self._whole, *self._parts])

    def __len__(self) -> int:
        return len(self._whole) + len(self._parts)
