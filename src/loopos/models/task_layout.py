"""The folder layout of a model with a head, so that transformers either computes what LoopOS computes, or refuses.

    native   transformers' own sequence classifier, if it is equivalent: pooling "last" and no offset
    own      `modeling_loopos.py` beside the weights: opens with `trust_remote_code=True`, otherwise refused
    bare     a backbone whose code is not in transformers: only LoopOS opens it

In the first two, the backbone's tensors have its prefix and the head is `score.weight` in fp32, scaled to LoopOS's
outputs: logits, values in the user's unit, normalized scores. LoopOS itself reads `head.safetensors`.
Letters: C outputs of the head, O those of the folder, d hidden size.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from loopos.config.diagnostics import UserError
from loopos.models import modeling_loopos
from loopos.models.description import read_description
from loopos.models.modeling_loopos import LoopOSConfig, LoopOSForSequenceClassification
from loopos.storage.tensor_files import TensorSpec


def native_classifier(config: PreTrainedConfig) -> PreTrainedModel | None:
    """transformers' sequence classifier of `config` on the meta device, with its backbone under `base_model_prefix` and
    the linear head `score`. None if transformers has no such class; encoders pool differently.
    """
    causal: Container[Any] = MODEL_FOR_CAUSAL_LM_MAPPING
    classifiers: Container[Any] = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    if type(config) not in causal or type(config) not in classifiers:
        return None
    with torch.device("meta"):
        classifier = AutoModelForSequenceClassification.from_config(config)  # type: ignore[no-untyped-call]
    assert isinstance(classifier, PreTrainedModel)
    expected: Any = MODEL_MAPPING[type(config)]
    score, backbone = getattr(classifier, "score", None), getattr(classifier, classifier.base_model_prefix, None)
    has_bias = getattr(score, "bias", None) is not None
    if not isinstance(score, nn.Linear) or has_bias or type(backbone) is not expected:
        return None
    return classifier


def default_pooling(config: PreTrainedConfig) -> str:
    """`model.pooling: auto` for an architecture: "last" if transformers' own classifier reads the last token too, so
    that the trained folder opens there; otherwise "mean".
    """
    return "mean" if native_classifier(config) is None else "last"


SCORE = "score.weight"
MODELING = "modeling_loopos.py"
Layout: TypeAlias = Literal["native", "own", "bare"]
ProblemType: TypeAlias = Literal["regression", "single_label_classification", "multi_label_classification"]
_PROBLEM_TYPES: Mapping[str, ProblemType] = {
    "classification": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
    "reward": "regression",
}
# Config keys that describe the whole folder, not the backbone.
_OF_THE_FOLDER = frozenset({"model_type", "transformers_version", "dtype", "quantization_config", "architectures"})
_CLASS = LoopOSForSequenceClassification.__name__
_AUTO_CLASS = "AutoModelForSequenceClassification"
_AUTO_MAP = {
    "AutoConfig": f"{Path(MODELING).stem}.{LoopOSConfig.__name__}",
    _AUTO_CLASS: f"{Path(MODELING).stem}.{_CLASS}",
}


@dataclass(frozen=True)
class Outputs:
    """The outputs of the folder's head, `W·h + offset`. weight: `[O, d]` fp32. offset: `[O]`, None if it is 0."""

    weight: Tensor
    offset: list[float] | None


def outputs_of_head(head: Tensor, description: Mapping[str, Any]) -> Outputs:
    """The head `[C, d]` in LoopOS's output units: a regressor's in the user's unit, a reward model's as the mean of its
    normalized heads.
    """
    task, weight = description["task"], head.double()
    offset = torch.zeros(len(weight), dtype=torch.float64)
    if task == "regression":
        weight, offset = weight * description["target_std"], offset + description["target_mean"]
    elif task == "reward":
        mean = torch.tensor(description["score_mean"], dtype=torch.float64)
        std = torch.tensor(description["score_std"], dtype=torch.float64)
        weight, offset = (weight / std[:, None]).mean(0, keepdim=True), (-mean / std).mean(0, keepdim=True)
    return Outputs(weight.float(), offset.tolist() if bool(offset.any()) else None)


@dataclass(frozen=True)
class TaskLayout:
    """The layout of one model. backbone: its config. classifier: the empty native classifier on the meta device."""

    kind: Layout
    backbone: PreTrainedConfig
    outputs: Outputs
    description: Mapping[str, Any]
    classifier: PreTrainedModel | None = None

    @classmethod
    def of(
        cls,
        backbone: PreTrainedConfig,
        head: Tensor,
        description: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
    ) -> TaskLayout:
        """backbone: config of the headless model. tokenizer: as `folder_tokenizer` returned it."""
        outputs = outputs_of_head(head, description)
        if type(backbone) not in MODEL_MAPPING:
            return cls("bare", backbone, outputs, description)
        # transformers' classifier takes the last token whose id is not the pad token.
        knows_pads = tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in _ends(tokenizer)
        if description["pooling"] == "last" and outputs.offset is None and knows_pads:
            classifier = native_classifier(backbone)
            if classifier is not None:
                return cls("native", backbone, outputs, description, classifier)
        return cls("own", backbone, outputs, description)

    @property
    def prefix(self) -> str:
        """Prefix of the backbone's tensor names; empty in a bare folder."""
        if self.kind == "bare":
            return ""
        backbone: Any = MODEL_MAPPING[type(self.backbone)]
        return f"{backbone.base_model_prefix}."

    def tensor_name(self, name: str) -> str:
        """The name of a tensor of the backbone, which may already have the prefix."""
        return name if name.startswith(self.prefix) else self.prefix + name

    def config(self, pad_token_id: int | None) -> PreTrainedConfig:
        """The folder's config, with class names and problem type where transformers looks for them."""
        if self.kind == "own":
            inner = {key: value for key, value in self.backbone.to_dict().items() if key not in _OF_THE_FOLDER}
            config: PreTrainedConfig = LoopOSConfig(
                backbone_type=self.backbone.model_type,
                backbone_config=inner,
                pooling=self.description["pooling"],
                offset=self.outputs.offset,
            )
            config.auto_map, config.architectures, config.dtype = dict(_AUTO_MAP), [_CLASS], self.backbone.dtype
        else:
            config = copy.deepcopy(self.backbone)
            if self.classifier is not None:
                config.architectures = [type(self.classifier).__name__]
            elif isinstance(getattr(config, "auto_map", None), dict):
                # Its own classifier would have a random head.
                config.auto_map = {name: code for name, code in config.auto_map.items() if name != _AUTO_CLASS}
        config.problem_type = _PROBLEM_TYPES[self.description["task"]]
        names = list(self.description["class_names"])
        if len(names) != len(self.outputs.weight):
            names = ["score" if self.description["task"] == "reward" else "value"]
        config.id2label = dict(enumerate(names))
        config.label2id = {name: i for i, name in config.id2label.items()}
        config.pad_token_id = config.get_text_config().pad_token_id = pad_token_id
        return config

    def module(self, backbone: PreTrainedModel, pad_token_id: int | None) -> PreTrainedModel:
        """The model whose `save_pretrained` writes the folder's config and weights; wraps this backbone without a
        copy.
        """
        if self.kind == "bare":
            return backbone
        config = self.config(pad_token_id)
        if self.classifier is not None:
            module = self.classifier
            module.config = config
        else:
            with torch.device("meta"):
                module = LoopOSForSequenceClassification(config)  # type: ignore[arg-type]
        setattr(module, self.prefix.rstrip("."), backbone)
        score = nn.Linear(self.outputs.weight.shape[1], len(self.outputs.weight), bias=False, dtype=torch.float32)
        score.weight = nn.Parameter(self.outputs.weight.cpu(), requires_grad=False)
        module.score = score
        return module

    def head_specs(self) -> dict[str, TensorSpec]:
        """The head among the weights, by name."""
        if self.kind == "bare":
            return {}
        return {SCORE: TensorSpec(torch.float32, tuple(self.outputs.weight.shape))}

    def write_beside(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Writes the other files for transformers: the tokenizer, and the code that the config names."""
        tokenizer.save_pretrained(folder)
        if self.kind == "own":
            shutil.copyfile(str(modeling_loopos.__file__), folder / MODELING)


def folder_tokenizer(tokenizer: PreTrainedTokenizerBase, backbone: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer that pads on the right, because positions count from the first token in every model. Its
    pad token never ends a text, because transformers' classifiers skip pads by id. It returns segment ids only for
    models with an embedding for them.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "right"
    ends = _ends(tokenizer)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in ends:
        special = [
            tokenizer.unk_token,
            *(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special),
        ]
        num_embeddings = backbone.get_text_config().vocab_size
        token_ids = {token: tokenizer.convert_tokens_to_ids(token) for token in special if token is not None}
        fitting = [token for token, token_id in token_ids.items() if token_id not in ends and token_id < num_embeddings]
        tokenizer.pad_token = next(iter(fitting), tokenizer.pad_token or tokenizer.eos_token)
    if (getattr(backbone, "type_vocab_size", None) or 0) < 2:
        tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    return tokenizer


def _ends(tokenizer: PreTrainedTokenizerBase) -> set[int | None]:
    """Special tokens that may end a text: the tokenizer's end token, and what it adds around texts."""
    empty = tokenizer("")["input_ids"]
    return {tokenizer.eos_token_id, tokenizer.sep_token_id, *empty[-1:]}


def backbone_config(folder: str | Path) -> PreTrainedConfig | None:
    """The backbone's config in a folder of the own layout; None for a folder or hub id of another layout. Raises
    `OSError` and `ValueError` as transformers does.
    """
    raw, _ = PreTrainedConfig.get_config_dict(str(folder))
    inner = backbone_part(raw)
    if inner is raw:
        return None
    config = AutoConfig.for_model(**inner)
    assert isinstance(config, PreTrainedConfig)
    return config


def backbone_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The backbone's part of a config.json, with number format and quantization of the folder's weights; the whole
    config if the backbone is not a part.
    """
    if config.get("model_type") != LoopOSConfig.model_type:
        return config
    weights = {key: config[key] for key in ("dtype", "quantization_config") if config.get(key) is not None}
    return {"model_type": config["backbone_type"], **config["backbone_config"], **weights}


def layout_at(folder: Path, head: Tensor) -> tuple[TaskLayout, PreTrainedTokenizerBase]:
    """The layout and tokenizer for the model in a folder of any layout. Raises `UserError`."""
    try:
        backbone = backbone_config(folder) or AutoConfig.from_pretrained(str(folder))
        opened = AutoTokenizer.from_pretrained(str(folder), config=backbone)
    except (OSError, ValueError, KeyError, TypeError) as problem:
        first = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise UserError(f"{folder}: cannot be opened: {first}") from problem
    tokenizer = folder_tokenizer(opened, backbone)
    return TaskLayout.of(backbone, head, read_description(folder), tokenizer), tokenizer


def layout_in(folder: Path) -> Layout:
    """The layout of a folder; "bare" also for folders of older versions."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") == LoopOSConfig.model_type:
        return "own"
    classifies = str((config.get("architectures") or [""])[0]).endswith("ForSequenceClassification")
    return "native" if classifies else "bare"


def how_it_opens(folder: Path) -> str:
    """One line: which programs open a model with a head."""
    kind = layout_in(folder)
    if kind == "bare":
        return "opens by LoopOS only: transformers has no class for its code"
    if kind == "native":
        return 'opens in transformers: pipeline("text-classification", model=FOLDER)'
    return (
        'opens in transformers with pipeline("text-classification", model=FOLDER, trust_remote_code=True): '
        f"{MODELING} beside the weights computes the head; without trust_remote_code transformers refuses the folder"
    )
