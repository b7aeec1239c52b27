"""The models of a merge, opened without their numbers: what each holds, and its tensors one at a time.

Enters: what a recipe names: a run, a model folder, a weights file, a GGUF file, the embedded model, a hub id, a LoRA
adapter. Leaves: a `Source`. Left out: whether several fit each other (`plan.py`), adapters (`adapters.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from loopos.config.faults import UserError
from loopos.models.found_model import local_place
from loopos.models.model_folder import described
from loopos.models.task_folder import HEAD
from loopos.models.task_layout import SCORE, backbone_part
from loopos.storage.json_files import read_object
from loopos.storage.manifest import check_manifest, is_weights
from loopos.storage.tensor_files import (
    WEIGHTS,
    StoredTensor,
    folder_tensors,
    holds_weights,
    stored_tensors,
    weights_entry,
)
from loopos.storage.tensor_format import TensorSpec

HEAD_TENSOR = "head.weight"
"""The name here of a task model's head, which has a file of its own."""
# Narrower floats and most unsigned numbers have no arithmetic in torch.
_COMPUTED = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
                       torch.int16, torch.int8, torch.uint8, torch.bool})  # fmt: skip
_WANTED = "f64, f32, f16 or bf16 weights"
# Output embeddings, which a model with tied embeddings need not hold.
OUTPUTS = frozenset({"lm_head.weight", "embed_out.weight"})
_STACK = re.compile(r"((?:[^.]*\.)*?)(\d+)\.")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json")


@dataclass(frozen=True, slots=True)
class LowRank:
    """A change of one tensor, scale·B·A: A `[r, in]`, B `[out, r]`; transposed where the layer keeps its weight so."""

    down: StoredTensor
    up: StoredTensor
    scale: float
    transposed: bool

    def applied(self, weight: Tensor) -> Tensor:
        """The weight with the change, fp32."""
        change = (self.up.read().float() @ self.down.read().float()).mul_(self.scale)
        return weight.float().add_(change.t() if self.transposed else change)


@dataclass(frozen=True, slots=True)
class Replaced:
    """A change of one tensor that is known as what the tensor becomes, of its shape."""

    whole: StoredTensor

    def applied(self, weight: Tensor) -> Tensor:
        """What the weight becomes, fp32."""
        return self.whole.read().float()


Change: TypeAlias = LowRank | Replaced


@dataclass(frozen=True)
class Source:
    """One model. `place`: its name in the recipe; `folder`: where its config and tokenizer are; `config`: its
    config.json, of a model with a head the backbone's part; `description`: its loopos.json, empty for other models;
    `stored`: its tensors by their own names, the head of a task model as `HEAD_TENSOR`; `changes`: those of an adapter
    over them.
    """

    place: str
    folder: Path
    config: Mapping[str, Any]
    description: Mapping[str, Any]
    stored: Mapping[str, StoredTensor]
    changes: Mapping[str, Change] = field(default_factory=dict)

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """The tensors that are merged: without an output embedding that is tied to the input's, and without the copy
        of the head that transformers reads, which is made from the head.
        """
        left = set(OUTPUTS) if self.text_config.get("tie_word_embeddings") else set()
        if HEAD_TENSOR in self.stored:
            left.add(SCORE)
        return {name: each.spec for name, each in self.stored.items() if name not in left}

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The part of the config that describes the language model."""
        part = self.config.get("text_config")
        return part if isinstance(part, Mapping) else self.config

    @property
    def is_task_model(self) -> bool:
        return "pooling" in self.description

    @property
    def has_tokenizer(self) -> bool:
        return any((self.folder / name).is_file() for name in _TOKENIZER_FILES)

    @cached_property
    def stack(self) -> str:
        """What the names of the layers begin with, such as "model.layers."; "" for a model without layers."""
        stacks = [match[1] for name in self.stored if (match := _STACK.match(name)) and name != HEAD_TENSOR]
        return max(set(stacks), key=lambda stack: (stacks.count(stack), stack)) if stacks else ""

    @cached_property
    def num_layers(self) -> int:
        """Layers of the stack."""
        return 1 + max((layer for name in self.stored if (layer := self.layer_of(name)) is not None), default=-1)

    def layer_of(self, name: str) -> int | None:
        """The layer that a tensor belongs to, from 0; None for those outside the stack."""
        rest = name.removeprefix(self.stack)
        number = rest.partition(".")[0]
        return int(number) if self.stack and rest != name and number.isdigit() else None

    @property
    def num_bytes(self) -> int:
        return sum(spec.num_bytes for spec in self.specs.values())

    @property
    def num_parameters(self) -> int:
        return sum(spec.num_elements for spec in self.specs.values())

    def read(self, name: str) -> Tensor:
        """A tensor in its own format; with an adapter's change in fp32."""
        tensor = self.stored[name].read()
        if name in self.changes:
            tensor = self.changes[name].applied(tensor)
        return tensor

    def read_float(self, name: str) -> Tensor:
        """A tensor in fp32 and in memory of its own."""
        return self.read(name).to(torch.float32)


def open_source(place: str) -> Source:
    """The model that a recipe names. Raises `UserError` for a place that holds none, or none in safetensors."""
    folder, file = local_place(place)
    if file is not None and file.suffix != ".safetensors":
        raise UserError(_torch_file(place, file.name))
    if file is not None:
        check_manifest(file.parent, of=lambda name: name == file.name or not is_weights(name))
    config = backbone_part(read_object(folder / "config.json", advice="wanted the config beside the weights"))
    stored = stored_tensors([file]) if file is not None else _tensors(place, folder)
    description = described(folder)
    if "pooling" in description:
        stored[HEAD_TENSOR] = _head(place, folder)
    if not stored:
        raise UserError(f"{place}: its files of weights hold no tensor")
    for name, each in stored.items():
        if each.spec.dtype not in _COMPUTED:
            raise UserError(f"{place}: {name} is {each.spec.dtype}, which is not computed with; wanted {_WANTED}")
    return Source(place, folder, config, description, stored)


def _torch_file(place: str, name: str) -> str:
    return (
        f"{place}: {name} is a pickle of torch, which cannot be read a tensor at a time; wanted safetensors: open it "
        "with transformers and save it again with save_pretrained"
    )


def _tensors(place: str, folder: Path) -> dict[str, StoredTensor]:
    """The tensors of the safetensors files that transformers opens in a folder. Raises `UserError`."""
    if holds_weights(folder):
        return folder_tensors(folder)
    if (entry := weights_entry(folder)) is not None:
        raise UserError(_torch_file(place, entry.name))
    others = sorted(file.name for file in folder.glob("*.safetensors") if file.name != HEAD)
    hint = f"; to take another file, name it: {folder / others[0]}" if others else ""
    raise UserError(f"{place}: {folder} holds no weights; expected {WEIGHTS} beside config.json{hint}")


def _head(place: str, folder: Path) -> StoredTensor:
    stored = stored_tensors([folder / HEAD])
    if "weight" not in stored:
        raise UserError(f"{place}: {HEAD} holds no tensor weight; make it again: loopos train CONFIG --resume")
    return stored["weight"]
