"""The models of a merge: their tensors, read one at a time, and their vocabularies, compared or united.

A recipe names a run, a model folder, a weights file, the embedded model, a hub id or an adapter.
Letters: V tokens of the united vocabulary, d width.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from loopos.config.diagnostics import UserError
from loopos.models.folders import HEAD
from loopos.models.resolve import ModelRef, resolve_trained
from loopos.models.task_layout import SCORE, backbone_part
from loopos.models.tokenizers import open_tokenizer, vocabulary_difference
from loopos.storage.json_files import read_object
from loopos.storage.manifest import check_manifest, is_weights
from loopos.storage.tensor_files import (
    WEIGHTS,
    StoredTensor,
    TensorSpec,
    folder_tensors,
    holds_weights,
    stored_tensors,
    weights_entry,
)

HEAD_TENSOR = "head.weight"
"""The name in a merge of a task model's head, which has its own file."""
# torch has no arithmetic for narrower floats and most unsigned integers.
_COMPUTED = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
                       torch.int16, torch.int8, torch.uint8, torch.bool})  # fmt: skip
_EXPECTED = "f64, f32, f16 or bf16 weights"
# Output embeddings, which a model with tied embeddings need not store.
OUTPUTS = frozenset({"lm_head.weight", "embed_out.weight"})
_STACK = re.compile(r"((?:[^.]*\.)*?)(\d+)\.")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json")


@dataclass(frozen=True, slots=True)
class LowRank:
    """A change of one tensor, scale·B·A: A `[r, in]`, B `[out, r]`; transposed if the layer stores its weight so."""

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
    """A change of one tensor to another tensor of the same shape."""

    whole: StoredTensor

    def applied(self, weight: Tensor) -> Tensor:
        """The changed weight, fp32."""
        return self.whole.read().float()


Change: TypeAlias = LowRank | Replaced


@dataclass(frozen=True)
class Source:
    """One model. `ref`: what the recipe names; `folder`: of its config and tokenizer; `config`: its config.json, for a
    model with a head the backbone's part; `description`: its loopos.json, empty for other models; `stored`: its tensors
    by name, the head of a task model as `HEAD_TENSOR`; `changes`: those of an adapter over them.
    """

    ref: ModelRef
    folder: Path
    config: Mapping[str, Any]
    description: Mapping[str, Any]
    stored: Mapping[str, StoredTensor]
    changes: Mapping[str, Change] = field(default_factory=dict)

    @property
    def location(self) -> str:
        """The model's name in the recipe."""
        return self.ref.name

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """The tensors to merge: without an output embedding that is tied to the input's, and without the copy of the
        head for transformers, which is made from the head.
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
        """The prefix of the names of layers, such as "model.layers."; "" for a model without layers."""
        stacks = [match[1] for name in self.stored if (match := _STACK.match(name)) and name != HEAD_TENSOR]
        return max(set(stacks), key=lambda stack: (stacks.count(stack), stack)) if stacks else ""

    @cached_property
    def num_layers(self) -> int:
        """Number of layers of the stack."""
        return 1 + max((layer for name in self.stored if (layer := self.layer_of(name)) is not None), default=-1)

    def layer_of(self, name: str) -> int | None:
        """The layer of a tensor, from 0; None outside the stack."""
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
        """A tensor in fp32, in its own memory."""
        return self.read(name).to(torch.float32)


def open_source(source: str | ModelRef) -> Source:
    """The model that a recipe names. Raises `UserError` if there is none, or none in safetensors."""
    ref = resolve_trained(source)
    name, folder, file = ref.name, ref.local_folder, ref.weights_file
    if file is not None and file.suffix != ".safetensors":
        raise UserError(_torch_file(name, file.name))
    if file is not None:
        check_manifest(file.parent, of=lambda name: name == file.name or not is_weights(name))
    config = backbone_part(read_object(folder / "config.json", advice="expected the config beside the weights"))
    stored = stored_tensors([file]) if file is not None else _tensors(name, folder)
    if "pooling" in ref.description:
        stored[HEAD_TENSOR] = _head(folder)
    if not stored:
        raise UserError(f"{name}: its weight files contain no tensor")
    for tensor, each in stored.items():
        if each.spec.dtype not in _COMPUTED:
            raise UserError(f"{name}: {tensor} is {each.spec.dtype}, which cannot be merged; expected {_EXPECTED}")
    return Source(ref, folder, config, ref.description, stored)


def _torch_file(source: str, name: str) -> str:
    return (
        f"{source}: {name} is a torch pickle, which cannot be read a tensor at a time; expected safetensors: open "
        "it with transformers and save it with save_pretrained"
    )


def _tensors(source: str, folder: Path) -> dict[str, StoredTensor]:
    """The tensors of the safetensors files that transformers opens in a folder. Raises `UserError`."""
    if holds_weights(folder):
        return folder_tensors(folder)
    if (entry := weights_entry(folder)) is not None:
        raise UserError(_torch_file(source, entry.name))
    others = sorted(file.name for file in folder.glob("*.safetensors") if file.name != HEAD)
    hint = f"; to use another file, name it: {folder / others[0]}" if others else ""
    raise UserError(f"{source}: {folder} contains no weights; expected {WEIGHTS} beside config.json{hint}")


def _head(folder: Path) -> StoredTensor:
    stored = stored_tensors([folder / HEAD])
    if "weight" not in stored:
        raise UserError(f"{folder}: {HEAD} contains no tensor weight; write it again: loopos train CONFIG --resume")
    return stored["weight"]


TOKENIZER = "tokenizer.json"
_NO_ROW = -1
# Parts of tokenizer.json that must be equal for equal tokens to mean the same.
_RULES = ("normalizer", "pre_tokenizer", "decoder")


def tokens_of(source: Source) -> dict[str, int]:
    """Token → id. Raises `UserError` for a tokenizer that cannot be read."""
    file = source.folder / TOKENIZER
    if not file.is_file():
        return dict(open_tokenizer(ModelRef(source.location, "folder", source.folder)).get_vocab())
    content = _content(file)
    vocabulary = content["model"].get("vocab", {})
    if isinstance(vocabulary, list):
        vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
    return {**vocabulary, **{token["content"]: token["id"] for token in content.get("added_tokens", [])}}


def _content(file: Path) -> dict[str, Any]:
    content = read_object(file)
    if not isinstance(content.get("model"), dict):
        raise UserError(f"{file}: does not describe a tokenizer")
    return content


def vocabulary_diagnostics(sources: Sequence[Source]) -> list[str]:
    """A message for each model whose tokens differ from the first's, with some of them and their number. Models without
    a tokenizer are assumed to match.
    """
    known = [source for source in sources if source.has_tokenizer]
    if not known:
        return []
    first, diagnostics = known[0], []
    own = tokens_of(first)
    for other in known[1:]:
        if _same_file(first.folder / TOKENIZER, other.folder / TOKENIZER):
            continue
        difference = vocabulary_difference(own, tokens_of(other), first.location)
        if difference:
            diagnostics.append(
                f"{other.location}: other tokens than {first.location}: {difference}; use models with one "
                'vocabulary, or tokenizer "union"'
            )
    return diagnostics


def _same_file(one: Path, other: Path) -> bool:
    return one.is_file() and other.is_file() and (one.samefile(other) or one.read_bytes() == other.read_bytes())


@dataclass(frozen=True)
class UnitedVocabulary:
    """`tokenizer`: the content of its tokenizer.json. `rows`: for each source the row of every id `[V]`, −1 if it has
    none.
    """

    tokenizer: Mapping[str, Any]
    rows: Sequence[Tensor]

    @property
    def size(self) -> int:
        return len(self.rows[0])

    def united(self, tensors: Sequence[Tensor], sources: Sequence[int]) -> list[Tensor]:
        """Tensors with one row per token, one per source, each expanded to V rows: its own row if it has the token,
        else the mean over the models that have it. sources: their indices in `rows`.
        """
        rows = [self.rows[index] for index in sources]
        absent = torch.stack([row == _NO_ROW for row in rows]).any(0).nonzero().squeeze(1)
        total = tensors[0].new_zeros((len(absent), *tensors[0].shape[1:]))
        count = torch.zeros(len(absent))
        found = []
        for tensor, row in zip(tensors, rows, strict=True):
            wide = tensor[row.clamp_min(0)]
            present = row[absent] != _NO_ROW
            total[present] += wide[absent[present]]
            count += present
            found.append(wide)
        mean = total / count.clamp_min(1).view(-1, *([1] * (total.ndim - 1)))
        for wide, row in zip(found, rows, strict=True):
            lacks = row[absent] == _NO_ROW
            wide[absent[lacks]] = mean[lacks]
        return found


def unite(sources: Sequence[Source]) -> UnitedVocabulary:
    """The union of vocabularies: ids of the first model stay, new tokens of the others follow in their order, and their
    merge rules come after the earlier ones. Raises `UserError` for tokenizers that split text by other rules.
    """
    diagnostics = [f"{each.location}: no {TOKENIZER}" for each in sources if not (each.folder / TOKENIZER).is_file()]
    if diagnostics:
        raise UserError("\n".join([*diagnostics, 'tokenizer "union" needs that file']))
    contents = [_content(source.folder / TOKENIZER) for source in sources]
    first = contents[0]
    for source, content in zip(sources[1:], contents[1:], strict=True):
        wrong = [name for name in _RULES if content.get(name) != first.get(name)]
        if content["model"].get("type") != first["model"].get("type"):
            wrong.insert(0, "model.type")
        if wrong:
            diagnostics.append(
                f"{source.location}: its {TOKENIZER} differs from that of {sources[0].location} in {', '.join(wrong)}"
            )
    if diagnostics:
        raise UserError("\n".join([*diagnostics, "tokenizers that split text by different rules cannot be united"]))
    ids = [tokens_of(source) for source in sources]
    for source, tokens in zip(sources, ids, strict=True):
        rows = int(source.text_config.get("vocab_size", 0))
        if tokens and max(tokens.values()) >= rows:
            diagnostics.append(
                f"{source.location}: token {max(tokens.values())} has no row among the {rows} of its embedding"
            )
    if diagnostics:
        raise UserError("\n".join(diagnostics))
    united = dict(ids[0])
    following = max(united.values(), default=-1) + 1
    for tokens in ids[1:]:
        for token in sorted(tokens, key=tokens.__getitem__):
            if token not in united:
                united[token] = following
                following += 1
    num_rows = max(following, int(sources[0].text_config.get("vocab_size", 0)))
    return UnitedVocabulary(
        _union(contents, united), [_rows(tokens, united, num_rows, own=index == 0) for index, tokens in enumerate(ids)]
    )


def _rows(tokens: Mapping[str, int], united: Mapping[str, int], num_rows: int, *, own: bool) -> Tensor:
    """own: rows of the first model without a token stay its own."""
    rows = torch.arange(num_rows) if own else torch.full((num_rows,), _NO_ROW)
    for token, number in united.items():
        rows[number] = tokens.get(token, _NO_ROW)
    return rows


def _union(contents: Sequence[Mapping[str, Any]], united: Mapping[str, int]) -> dict[str, Any]:
    """The first tokenizer's content with the tokens and merge rules of all."""
    union: dict[str, Any] = json.loads(json.dumps(contents[0]))
    model = union["model"]
    added = {token["content"]: token for token in union.get("added_tokens", [])}
    for content in contents[1:]:
        for token in content.get("added_tokens", []):
            added.setdefault(token["content"], {**token, "id": united[token["content"]]})
        new = content["model"].get("vocab", {})
        if isinstance(new, list):
            known = {token for token, _ in model["vocab"]}
            model["vocab"] += [[token, score] for token, score in new if token not in known]
        else:
            for token in sorted(new, key=new.__getitem__):
                model["vocab"].setdefault(token, united[token])
        if "merges" in model:
            have = {_pair(rule) for rule in model["merges"]}
            model["merges"] += [rule for rule in content["model"].get("merges", []) if _pair(rule) not in have]
    union["added_tokens"] = sorted(added.values(), key=lambda token: int(token["id"]))
    return union


def _pair(rule: Sequence[str] | str) -> tuple[str, ...]:
    """A merge rule; older files store it as one text."""
    return tuple(rule.split(" ")) if isinstance(rule, str) else tuple(rule)
