"""Saves and opens trained models as folders: models with a head, reward models, causal language models, and pretrained
weights.

    model/   config.json  model.safetensors  tokenizer…   transformers' files (`task_layout.py`), with the chat template
             head.safetensors                             the head as trained, for models with a head
             loopos.json                                  what LoopOS knows about the model

Folders are written under another name and renamed, so they are complete or absent.
Letters: T tokens, N responses, k heads.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loopos.config.diagnostics import UserError
from loopos.config.paths import HEAD_FILE, MANIFEST, MODEL_DESCRIPTION
from loopos.config.sections import LoraSection
from loopos.functional.packing import PackedLayout
from loopos.models.adapters import merge_lora, save_lora
from loopos.models.backbone import Backbone
from loopos.models.heads import PooledModel
from loopos.models.load import NUMBER_FORMATS, cast_parameters, load_pretrained
from loopos.models.model_folder import FORMAT, LANGUAGE_ENSEMBLE, described, kind_of, model_folder, read_description
from loopos.models.quantized import is_quantized
from loopos.models.quantized_folder import save_weights
from loopos.models.task_layout import TaskLayout, folder_tokenizer
from loopos.storage.durable import FileRecord, fsync_path
from loopos.storage.json_files import save_json
from loopos.storage.manifest import check_manifest, read_manifest, write_manifest
from loopos.storage.tensor_files import read_tensors, require_finite, save_tensors
from loopos.storage.whole_folder import partial_folder, whole_folder

HEAD = HEAD_FILE


def save_task_model(
    folder: Path,
    model: PooledModel,
    tokenizer: PreTrainedTokenizerBase,
    description: Mapping[str, Any],
) -> None:
    """Writes backbone, head, tokenizer and `description` (requires task, pooling, class_names and precision, the
    backbone's format); replaces the folder atomically. LoRA layers must be merged before. Raises `OSError` when the
    disk is full.
    """
    backbone, head = model.backbone.model, model.head.weight.detach().float().cpu()
    tokenizer = folder_tokenizer(tokenizer, backbone.config)
    layout = TaskLayout.of(backbone.config, head, description, tokenizer)
    cast_parameters(backbone, NUMBER_FORMATS[description["precision"]])
    with whole_folder(folder) as partial:
        save_weights(partial, layout.module(backbone, tokenizer.pad_token_id))
        layout.write_beside(partial, tokenizer)
        save_tensors(partial / HEAD, {"weight": head})
        save_json(partial / MODEL_DESCRIPTION, {**description, "format": FORMAT})


def read_head(folder: Path) -> Tensor:
    """The head's weight `[C, d]`. Raises `UserError` for a missing or broken file."""
    check_manifest(folder, of=lambda name: name == HEAD)
    try:
        weight = read_tensors(folder / HEAD)["weight"]
        require_finite("the head", weight)
        return weight
    except (KeyError, UserError) as problem:
        raise UserError(f"{folder}: broken: {problem}; make it again: loopos train CONFIG --resume") from problem


def open_task_model(
    source: str | Path, *, attention: str = "auto"
) -> tuple[PooledModel, PreTrainedTokenizerBase, dict[str, Any]]:
    """The model in fp32, its tokenizer and its description. Raises `UserError` for a folder that is not such a model,
    is broken, or has a newer format.
    """
    folder = model_folder(source)
    description = read_description(folder)
    if kind_of(description) == "ensemble":
        raise UserError(f"{folder}: an ensemble of several models; loopos predict and loopos evaluate open it")
    if kind_of(description) == "language":
        raise UserError(f"{folder}: a language model, without a head; loopos generate and loopos chat open it")
    head = read_head(folder)
    pretrained = load_pretrained(str(folder), quantized=True)
    model = PooledModel(
        Backbone(pretrained.model, attention=attention), num_outputs=len(head), pooling=description["pooling"], seed=0
    )
    with torch.no_grad():
        model.head.weight.copy_(head)
    return model, pretrained.tokenizer, description


@dataclass(frozen=True)
class OpenedReward:
    """`model` gives raw scores `[N, k]`. `description`: what training wrote about it. `adapter`: the PEFT folder of the
    adapter that is merged into the model, over weights with the fingerprint `description["base"]`; None without one.
    """

    model: PooledModel
    tokenizer: PreTrainedTokenizerBase
    description: Mapping[str, Any]
    adapter: Path | None


def open_reward_model(source: str | Path) -> OpenedReward:
    """source: the output folder of a reward_model run, or its folder model/. Raises `UserError` for anything else."""
    folder = model_folder(source)
    description = read_description(folder)
    if kind_of(description) != "reward":
        raise UserError(
            f"{folder}: a model of task {description.get('task', 'text generation')}; expected a reward model, trained "
            'with "method": "reward_model"'
        )
    model, tokenizer, _ = open_task_model(folder)
    adapter = folder.parent / "adapter"
    return OpenedReward(model, tokenizer, description, adapter if adapter.is_dir() else None)


class RewardEnsemble(nn.Module):
    """Several reward models as one, with the heads of all."""

    def __init__(self, members: Sequence[PooledModel]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, ids: Tensor, layout: PackedLayout) -> Tensor:
        """ids `[T]`, layout of N responses → raw scores `[N, Σ k]` in fp32, in the members' order."""
        return torch.cat([member(ids, layout) for member in self.members], dim=1)


def descriptions_together(descriptions: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """How to read an ensemble's scores: mean and deviation of each head."""
    names = ("score_mean", "score_std")
    return {name: [value for each in descriptions for value in each[name]] for name in names}


def check_same_tokens(policy: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, key: str) -> None:
    """Raises `UserError` unless both tokenizers have the same tokens. key: the config key of the other model."""
    if policy.get_vocab() != other.get_vocab():
        raise UserError(
            f"{key}: its tokenizer has other tokens than the policy's ({len(other)} and {len(policy)}); expected a "
            "reward model trained from weights with the policy's tokenizer"
        )


@dataclass(frozen=True)
class OpenedLanguageModel:
    """A causal language model in fp32 on CPU. `description`: what LoopOS wrote about it; empty for other models."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    description: Mapping[str, Any]
    summary: str

    @property
    def precision(self) -> str:
        """The default format to run in: that of training, bf16 for quantized weights, fp32 for others."""
        return str(self.description.get("precision", "bf16" if is_quantized(self.model) else "fp32"))


def save_language_model(
    folder: Path, causal: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, description: Mapping[str, Any]
) -> None:
    """Writes model, tokenizer and `description` (requires precision, the format of the weights, and stop_tokens, which
    end a response); replaces the folder atomically. LoRA layers must be merged before. Raises `OSError` when the disk
    is full.
    """
    cast_parameters(causal, NUMBER_FORMATS[description["precision"]])
    if causal.generation_config is not None:
        stops = list(description["stop_tokens"])
        causal.generation_config.eos_token_id = stops if len(stops) > 1 else stops[0]
        causal.generation_config.pad_token_id = tokenizer.pad_token_id
    with whole_folder(folder) as partial:
        save_weights(partial, causal)
        tokenizer.save_pretrained(partial)
        save_json(partial / MODEL_DESCRIPTION, {**description, "format": FORMAT})


def export_language_model(
    run_dir: Path,
    causal: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    description: Mapping[str, Any],
    *,
    lora: LoraSection | None,
    base: str,
) -> None:
    """Writes `model/` of a run and, for LoRA runs, `adapter/`; then merges the adapters. base: the adapters' base
    weights. Raises `OSError` when the disk is full.
    """
    if lora is not None:
        save_lora(causal, run_dir / "adapter", base=base, task="CAUSAL_LM")
        merge_lora(causal)
    save_language_model(run_dir / "model", causal, tokenizer, description)


def open_language_model(source: str, *, trust_remote_code: bool = False) -> OpenedLanguageModel:
    """source: the output folder of a run, a model folder, or a value of `data.pretrained_weights`. Raises
    `UserError`.
    """
    description = described(source)
    if description:
        folder = model_folder(source)
        if kind_of(description) != "language":
            raise UserError(
                f"{folder}: a {description['task']} model; it cannot generate text. Use loopos predict and loopos "
                "evaluate"
            )
        if LANGUAGE_ENSEMBLE in description:
            raise UserError(f"{folder}: an ensemble of language models; expected a single one: name a member of it")
        source = str(folder)
    pretrained = load_pretrained(source, causal=True, trust_remote_code=trust_remote_code, quantized=True)
    return OpenedLanguageModel(pretrained.model, pretrained.tokenizer, description, pretrained.summary)


_FILES = (".bin", ".safetensors")
_WEIGHTS = "model.safetensors"


def save_pretrained(path: Path, causal: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes model and tokenizer to the folder `path`. If `path` ends in .bin or .safetensors, the weights go to that
    file (safetensors under either name) and the rest beside it.

    Each file is written under a temporary name, flushed and renamed, the weights last. The folder's manifest is removed
    first and written last; it keeps the entries of other weights. Raises `OSError` when the disk is full.
    """
    folder = path.parent if path.suffix in _FILES else path
    with partial_folder(folder / _WEIGHTS) as partial:
        save_weights(partial, causal)
        tokenizer.save_pretrained(partial)
    weights, final = partial / _WEIGHTS, path if path.suffix in _FILES else folder / _WEIGHTS
    try:
        written = read_manifest(partial)
        records = {**_lines_of_others(folder), **written}
        if final.name != _WEIGHTS:
            records[final.name] = records.pop(_WEIGHTS)
        (folder / MANIFEST).unlink(missing_ok=True)
        for file in sorted(partial.iterdir()):
            if file != weights and file.name != MANIFEST:
                file.replace(folder / file.name)
        fsync_path(folder)
        weights.replace(final)
        write_manifest(folder, records)
        fsync_path(folder / MANIFEST)
        fsync_path(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _lines_of_others(folder: Path) -> dict[str, FileRecord]:
    """The current manifest of a folder; empty if it is broken."""
    try:
        return read_manifest(folder)
    except UserError:
        return {}
