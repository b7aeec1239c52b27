"""A model folder's weights, read one tensor at a time, and written so.

Enters: a folder with safetensors files. Leaves: tensors by name, or one safetensors file in another number format. At
any time one tensor is in memory. Left out: what the tensors mean, other kinds of files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loopos.config.durable import write_hashed
from loopos.config.faults import UserError
from loopos.functional.tensor_file import DTYPE_NAMES, safetensors_pieces

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Tell: TypeAlias = Callable[[int, int, str], None]
"""Told of progress: tensors done, tensors in all, the name of the one that is next."""

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class StreamedWeights(Mapping[str, Tensor]):
    """The tensors of a folder by name; each is read when it is asked for, and kept by nobody here.

    `described`: tensors of the same dtypes and shapes on the device meta.
    """

    def __init__(self, folder: Path) -> None:
        """Raises `UserError` for a folder without safetensors, or with a broken file."""
        self.folder = folder
        self._files = _files_of(folder)
        self.described: dict[str, Tensor] = {}
        for file in sorted(set(self._files.values())):
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 (no mapping: safetensors' own object)
                        part = opened.get_slice(name)
                        dtype = _DTYPES[part.get_dtype()]
                        self.described[name] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
            except (OSError, KeyError, SafetensorError) as problem:
                raise UserError(f"{file}: cannot be read as weights: {problem}") from problem
        if missing := sorted(set(self._files) - set(self.described)):
            raise UserError(f"{folder / INDEX}: names the tensor {missing[0]}, which is in no file")

    def __getitem__(self, name: str) -> Tensor:
        # Opened anew each time, so that no file's pages stay mapped.
        with safe_open(self._files[name], framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.described)

    def __len__(self) -> int:
        return len(self.described)

    @property
    def dtype(self) -> torch.dtype:
        """The number format of most elements."""
        counts: dict[torch.dtype, int] = {}
        for tensor in self.described.values():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
        return max(counts, key=lambda dtype: counts[dtype])

    @property
    def num_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.described.values())

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.described.values())


class _Cast(Mapping[str, Tensor]):
    """Weights whose floating-point tensors come in another format."""

    def __init__(self, weights: StreamedWeights, dtype: torch.dtype, tell: Tell) -> None:
        self._weights, self._dtype, self._tell, self._done = weights, dtype, tell, 0

    def __getitem__(self, name: str) -> Tensor:
        self._tell(self._done, len(self._weights), name)
        self._done += 1
        tensor = self._weights[name]
        return cast(name, tensor, self._dtype) if tensor.is_floating_point() else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another format. Raises `UserError` where a finite number would become infinite."""
    found = tensor.to(dtype)
    if dtype == torch.float16 and bool((found.isinf() & tensor.isfinite()).any()):
        raise UserError(f"{name}: holds numbers up to {tensor.abs().max():.3g}, which f16 cannot; use --type bf16")
    return found


def write_cast(weights: StreamedWeights, file: Path, dtype: torch.dtype, tell: Tell) -> None:
    """Writes one safetensors file with every floating-point tensor in `dtype`; other tensors stay as they are. Raises
    `UserError` where f16 is too narrow, `OSError` when the disk is full.
    """
    described = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights.described.items()
    }
    write_hashed(file, safetensors_pieces(_Cast(weights, dtype, tell), described))
    tell(len(weights), len(weights), "")


def _files_of(folder: Path) -> dict[str, Path]:
    """Tensor → the file that holds it."""
    if (folder / INDEX).is_file():
        try:
            places: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise UserError(f"{folder / INDEX}: broken: {problem}") from problem
        return {name: folder / file for name, file in places.items()}
    file = folder / WEIGHTS
    if not file.is_file():
        raise UserError(f"{folder}: no {WEIGHTS} here; wanted weights as safetensors")
    try:
        with safe_open(file, framework="pt") as opened:
            return dict.fromkeys(opened.keys(), file)
    except (OSError, SafetensorError) as problem:
        raise UserError(f"{file}: cannot be read as weights: {problem}") from problem
