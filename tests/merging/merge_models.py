"""Shared by the tests of merging: pico models that were moved apart, recipes in one call."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loopos.config.json_text import MappingNode, Mark
from loopos.config.load import load_recipe
from loopos.config.merge import MergeConfig
from loopos.config.source import COMMAND_LINE, Source
from loopos.merging.merge import MergeResult, merge

Made = dict[str, Tensor]


def tensors_of(folder: Path | str) -> Made:
    """All of a model's tensors, in memory of their own: its files may be written anew."""
    files = sorted(Path(folder).glob("model*.safetensors"))
    return {name: tensor.clone() for file in files for name, tensor in load_file(file).items()}


def variant(base: Path, folder: Path, seed: int, *, change: Callable[[str, Tensor], Tensor] | None = None) -> Path:
    """A copy of a model whose tensors were moved by small random numbers, as training would."""
    shutil.copytree(base, folder)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        moved = (tensor.float() + 0.05 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
        tensors[name] = change(name, moved) if change is not None else moved
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def sharded(model: Path, folder: Path, number: int) -> Path:
    """The same model with its tensors dealt out over several files, in an order of their own."""
    shutil.copytree(model, folder)
    tensors = load_file(model / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors, key=lambda name: name[::-1])
    where = {}
    for shard in range(number):
        file = f"model-{shard + 1:05d}-of-{number:05d}.safetensors"
        part = names[shard::number]
        save_file({name: tensors[name] for name in part}, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def rewrite_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def recipe_of(method: str, models: Sequence[Any], out: Path, **keys: Any) -> MergeConfig:
    """A recipe, checked as the command line checks it."""
    listed = [str(each) if isinstance(each, Path) else each for each in models]
    keys = {key: str(value) if isinstance(value, Path) else value for key, value in keys.items()}
    values: Mapping[str, Any] = {"method": method, "models": listed, "output_dir": str(out), **keys}
    source = Source(COMMAND_LINE, "", MappingNode({}, {}, Mark(COMMAND_LINE)))
    loaded = load_recipe(source, [f"{key}={json.dumps(value)}" for key, value in values.items()], MergeConfig)
    assert isinstance(loaded.config, MergeConfig)
    return loaded.config


def run(method: str, models: Sequence[Any], out: Path, **keys: Any) -> MergeResult:
    return merge(recipe_of(method, models, out, **keys))
