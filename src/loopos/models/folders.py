"""A trained task model as a folder, out and in.

    model/   config.json  model.safetensors  tokenizer…   what transformers opens, or refuses (`task_layout.py`)
             head.safetensors  loopos.json                the head as it was trained, and what its outputs mean

Written beside and renamed, so that a folder is whole or absent. Left out: checkpoints of a run in progress
(`training.checkpoint`).

A trained reward model, opened: one that scores, and the adapter that it was trained as, if it was one; and several
as one.

Enters: the folder of a run, or of its model. Leaves: the model in fp32 with its tokenizer and how its scores are read.
Left out: writing it (`task_folder.py`), normalising (`evaluation.reward_scores`).
Letters: T tokens, N responses, k heads.

A trained causal language model as a folder, out and in.

    model/   config.json  generation_config.json  model.safetensors  tokenizer…  chat_template
             loopos.json   how reasoning and turns are written

What `AutoModelForCausalLM.from_pretrained` opens, with the chat template that the model was trained with, so that other
programs speak to it in the same format. Left out: checkpoints (`training.checkpoint`), generation.

Pretrained weights as other configs name them: a folder, or a file with its config and tokenizer beside it.

Enters: a causal language model and its tokenizer. Leaves: files. Left out: reading them (`load.py`).
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
    """Writes backbone, head, tokenizer and `description` (needs task, pooling, class_names and precision, the format
    that the backbone takes); replaces the folder at once. LoRA layers must be merged before. Raises `OSError` when
    the disk is full.
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
    """The head's weight `[C, d]`. Raises `UserError` for a file that is missing or broken."""
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
    """The model in fp32, its tokenizer and its description. Raises `UserError` for a folder that is none, is
    broken, or is of a newer format.
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
    """`model` gives raw scores `[N, k]`. `description`: what training wrote of it. `adapter`: the PEFT folder of the
    adapter that is merged in the model, over the weights with the fingerprint `description["base"]`; None without one.
    """

    model: PooledModel
    tokenizer: PreTrainedTokenizerBase
    description: Mapping[str, Any]
    adapter: Path | None


def open_reward_model(source: str | Path) -> OpenedReward:
    """place: the output folder of a reward_model run, or its folder model/. Raises `UserError` for another one."""
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
    """Several reward models as one, whose heads are those of all."""

    def __init__(self, members: Sequence[PooledModel]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, ids: Tensor, layout: PackedLayout) -> Tensor:
        """ids `[T]`, layout of N responses → raw scores `[N, Σ k]` in fp32, in the members' order."""
        return torch.cat([member(ids, layout) for member in self.members], dim=1)


def descriptions_together(descriptions: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """How an ensemble's scores are read: each head by its own mean and deviation."""
    names = ("score_mean", "score_std")
    return {name: [value for each in descriptions for value in each[name]] for name in names}


def check_same_tokens(policy: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, told: str) -> None:
    """Raises `UserError` unless both make the same tokens, so that one may read what the other wrote."""
    if policy.get_vocab() != other.get_vocab():
        raise UserError(
            f"{told}: its tokenizer has other tokens than the policy's ({len(other)} and {len(policy)}); expected a "
            "reward model trained from weights with the policy's tokenizer"
        )


@dataclass(frozen=True)
class OpenedLanguageModel:
    """A causal language model in fp32 on CPU. `description`: what LoopOS wrote beside it; empty for other models."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    description: Mapping[str, Any]
    summary: str

    @property
    def precision(self) -> str:
        """What the model runs in where nothing else is asked for: the format of its training, bf16 where its weights
        are codes, fp32 for others.
        """
        return str(self.description.get("precision", "bf16" if is_quantized(self.model) else "fp32"))


def save_language_model(
    folder: Path, causal: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, description: Mapping[str, Any]
) -> None:
    """Writes model, tokenizer and `description` (needs precision, the format that the weights take, and stop_tokens,
    which end what the model says); replaces the folder at once. LoRA layers must be merged before. Raises `OSError`
    when the disk is full.
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
    """Writes `model/` of a run and, of one with adapters, `adapter/` too, which are then merged. base: the weights that
    the adapters belong to. Raises `OSError` when the disk is full.
    """
    if lora is not None:
        save_lora(causal, run_dir / "adapter", base=base, task="CAUSAL_LM")
        merge_lora(causal)
    save_language_model(run_dir / "model", causal, tokenizer, description)


def open_language_model(source: str, *, trust_remote_code: bool = False) -> OpenedLanguageModel:
    """place: the output folder of a run, a model folder, or whatever `data.pretrained_weights` may name. Raises
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
    """Writes model and tokenizer to the folder `place`, or, where `place` ends in .bin or .safetensors, the weights to
    that file (safetensors inside, under either name) and the rest beside it.

    Each file is written beside its place, flushed to the disk and renamed, the weights last; the folder's manifest, in
    which files of other weights keep their lines, is taken away before and written after. Raises `OSError` when the
    disk is full.
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
    """What the manifest of a folder holds so far. A broken one is replaced, and checks nothing from then on."""
    try:
        return read_manifest(folder)
    except UserError:
        return {}
