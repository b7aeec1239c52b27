"""Saves models as folders, and opens models of every kind: with a head, reward models, language models and ensembles.

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
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loopos.config.diagnostics import UserError
from loopos.config.paths import HEAD_FILE, MANIFEST, MODEL_DESCRIPTION
from loopos.config.sections import LoraSection
from loopos.functional.mixing import MixtureMethod
from loopos.functional.packing import PackedLayout
from loopos.models.backbone import Backbone
from loopos.models.description import FORMAT
from loopos.models.heads import PooledModel
from loopos.models.language_ensemble import LanguageEnsemble, check_one_vocabulary
from loopos.models.load import NUMBER_FORMATS, cast_parameters, load_pretrained
from loopos.models.quantized import is_quantized
from loopos.models.quantized_folder import save_weights
from loopos.models.resolve import ModelRef, refuse_votes, resolve_trained
from loopos.models.saved_adapters import merge_lora, save_lora
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
    source: str | Path | ModelRef, *, attention: str = "auto"
) -> tuple[PooledModel, PreTrainedTokenizerBase, dict[str, Any]]:
    """The model in fp32, its tokenizer and its description. Raises `UserError` for what is not such a model, is broken,
    or has a newer format.
    """
    ref = resolve_trained(source)
    if ref.kind == "ensemble":
        raise UserError(f"{ref.name}: an ensemble of several models; loopos predict and loopos evaluate open it")
    if ref.kind == "language" or ref.folder is None:
        raise UserError(f"{ref.name}: a language model, without a head; loopos generate and loopos chat open it")
    head = read_head(ref.folder)
    # The run's own merged weights, also where its adapter is named: the head was trained with them.
    pretrained = load_pretrained(ref.folder_ref, quantized=True)
    model = PooledModel(
        Backbone(pretrained.model, attention=attention),
        num_outputs=len(head),
        pooling=ref.description["pooling"],
        seed=0,
    )
    with torch.no_grad():
        model.head.weight.copy_(head)
    return model, pretrained.tokenizer, dict(ref.description)


@dataclass(frozen=True)
class OpenedReward:
    """`model` gives raw scores `[N, k]`. `description`: what training wrote about it. `adapter`: the PEFT folder of the
    adapter that is merged into the model, over weights with the fingerprint `description["base"]`; None without one.
    """

    model: PooledModel
    tokenizer: PreTrainedTokenizerBase
    description: Mapping[str, Any]
    adapter: Path | None


def open_reward_model(source: str | Path | ModelRef) -> OpenedReward:
    """source: the output folder of a reward_model run, or its folder model/. Raises `UserError` for anything else."""
    ref = resolve_trained(source)
    if ref.kind != "reward":
        raise UserError(
            f"{ref.name}: a model of task {ref.description.get('task', 'text generation')}; expected a reward model, "
            'trained with "method": "reward_model"'
        )
    model, tokenizer, description = open_task_model(ref)
    return OpenedReward(model, tokenizer, description, ref.adapter)


class RewardEnsemble(nn.Module):
    """Several reward models as one, with the heads of all."""

    def __init__(self, members: Sequence[PooledModel]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, ids: Tensor, layout: PackedLayout, *, positions: Tensor | None = None) -> Tensor:
        """ids `[T]`, layout of N responses → raw scores `[N, Σ k]` in fp32, in the members' order; with positions `[M]`
        those of these tokens, `[M, Σ k]`.
        """
        return torch.cat([member(ids, layout, positions=positions) for member in self.members], dim=1)


def descriptions_together(descriptions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How to read an ensemble's scores: mean and deviation of each head, and how steps are scored. Raises `UserError`
    for members that do not score alike.
    """
    names = ("score_mean", "score_std")
    processes = [each.get("process") for each in descriptions]
    if any(process != processes[0] for process in processes):
        raise UserError(
            "data.reward_model: its models do not score alike: some score whole responses and some steps, or steps "
            "with another reward.process; expected one kind"
        )
    found: dict[str, Any] = {name: [value for each in descriptions for value in each[name]] for name in names}
    return {**found, "process": processes[0] if processes else None}


def check_same_tokens(
    own: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, key: str, *, of: str = "policy"
) -> None:
    """Raises `UserError` unless both tokenizers have the same tokens. key: the config key of the other model; of: what
    the run trains.
    """
    if own.get_vocab() != other.get_vocab():
        raise UserError(
            f"{key}: its tokenizer has other tokens than the {of}'s ({len(other)} and {len(own)}); expected a "
            f"model trained from weights with the {of}'s tokenizer"
        )


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
        save_lora(causal, run_dir / "adapter", base=base, task="CAUSAL_LM", tokenizer=tokenizer)
        merge_lora(causal)
    save_language_model(run_dir / "model", causal, tokenizer, description)


@dataclass(frozen=True)
class OpenedModel:
    """`model` in fp32 on CPU: a causal language model, or the headless model of `pooled`, the model with a head.
    `precision`: the format of the saved weights. `description`: what LoopOS wrote about the model, empty for others.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    description: Mapping[str, Any]
    precision: str
    pooled: PooledModel | None = None

    def save(self, folder: Path) -> None:
        """Saves the model as the same kind, in its own format. Raises `OSError` when the disk is full."""
        self.model.to("cpu")  # type: ignore[arg-type]
        if self.pooled is not None:
            save_task_model(folder, self.pooled, self.tokenizer, self.description)
        elif self.description:
            save_language_model(folder, self.model, self.tokenizer, self.description)
        else:
            cast_parameters(self.model, NUMBER_FORMATS[self.precision])
            save_pretrained(folder, self.model, self.tokenizer)


def open_model(source: str | ModelRef, *, quantized: bool = False) -> OpenedModel:
    """Any single model, to be changed. quantized: accept quantized weights, which cannot be changed. Raises
    `UserError`.
    """
    ref = resolve_trained(source)
    if ref.kind == "language":
        opened = open_language_model(ref)
    else:
        # The padded path keeps transformers' own attention.
        pooled, tokenizer, description = open_task_model(ref, attention="padded")
        opened = OpenedModel(pooled.backbone.model, tokenizer, description, description["precision"], pooled)
    if is_quantized(opened.model) and not quantized:
        raise UserError(
            f"{ref.name}: quantized: its weights are codes, which cannot be changed; expected the model it was made "
            "from"
        )
    return opened


def open_language_model(source: str | ModelRef, *, trust_remote_code: bool = False) -> OpenedModel:
    """A causal language model, also a quantized one. Raises `UserError`."""
    ref = resolve_trained(source)
    if ref.kind != "language":
        raise UserError(
            f"{ref.name}: a {ref.description['task']} model; it cannot generate text. Use loopos predict and loopos "
            "evaluate"
        )
    if ref.is_ensemble:
        raise UserError(f"{ref.name}: an ensemble of language models; expected a single one: name a member of it")
    pretrained = load_pretrained(ref, causal=True, trust_remote_code=trust_remote_code, quantized=True)
    if ref.description:
        precision = str(ref.description["precision"])
    else:
        precision = next((name for name, dtype in NUMBER_FORMATS.items() if dtype == pretrained.stored), "fp32")
    return OpenedModel(pretrained.model, pretrained.tokenizer, ref.description, precision)


@dataclass(frozen=True)
class GenerationModel:
    """A model that generates. `description`: what LoopOS wrote about it, for an ensemble about its first member; empty
    for others.
    """

    model: PreTrainedModel | LanguageEnsemble
    tokenizer: PreTrainedTokenizerBase
    description: Mapping[str, Any]


def open_generation_model(
    source: str | ModelRef, *, device: str = "cpu", precision: str | None = None, trust_remote_code: bool = False
) -> GenerationModel:
    """A language model, or an ensemble of several. precision: fp32, bf16 or fp16 for all members; by default that of
    training, bf16 for quantized models and fp32 for others. Raises `UserError`, also for an ensemble that votes and for
    members with different tokens.
    """
    if precision is not None and precision not in NUMBER_FORMATS:
        raise UserError(f"precision: got {precision}, expected one of {', '.join(NUMBER_FORMATS)}")
    ref = resolve_trained(source)
    refuse_votes(ref)
    members, opened = (ref,) if ref.ensemble is None else ref.ensemble.members, []
    for member in members:
        found = open_language_model(member, trust_remote_code=trust_remote_code)
        usual = found.precision if found.description else "bf16" if is_quantized(found.model) else "fp32"
        cast_parameters(found.model, NUMBER_FORMATS[precision or usual])
        found.model.to(torch.device(device))  # type: ignore[arg-type]
        opened.append(found)
    first = opened[0]
    if ref.ensemble is None:
        return GenerationModel(first.model, first.tokenizer, first.description)
    models = tuple(each.model for each in opened)
    sizes = [int(model.config.get_text_config().vocab_size) for model in models]
    check_one_vocabulary(ref.ensemble.members, [each.tokenizer for each in opened], sizes)
    ensemble = LanguageEnsemble(models, ref.ensemble.weights, cast(MixtureMethod, ref.ensemble.method))
    return GenerationModel(ensemble, first.tokenizer, first.description)


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
