"""A trained causal language model as a folder, out and in.

    model/   config.json  generation_config.json  model.safetensors  tokenizer…  chat_template
             loopos.json   how reasoning and turns are written

What `AutoModelForCausalLM.from_pretrained` opens, with the chat template that the model was trained with, so that other
programs speak to it in the same format. Left out: checkpoints (`training.checkpoint`), generation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loopos.config.faults import UserError
from loopos.config.paths import MODEL_DESCRIPTION
from loopos.config.sections import LoraSection
from loopos.models.adapters import merge_lora, save_lora
from loopos.models.load import NUMBER_FORMATS, cast_parameters, load_pretrained
from loopos.models.model_folder import FORMAT, LANGUAGE_ENSEMBLE, described, kind_of, model_folder
from loopos.models.quantized import is_quantized
from loopos.models.quantized_folder import save_weights
from loopos.storage.json_files import save_json
from loopos.storage.whole_folder import whole_folder


@dataclass(frozen=True)
class OpenedLanguageModel:
    """A causal language model in fp32 on CPU. `description`: what LoopOS wrote beside it; empty for other models."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    description: Mapping[str, Any]
    said: str

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


def open_language_model(place: str, *, trust_remote_code: bool = False) -> OpenedLanguageModel:
    """place: the output folder of a run, a model folder, or whatever `data.pretrained_weights` may name. Raises
    `UserError`.
    """
    description = described(place)
    if description:
        folder = model_folder(place)
        if kind_of(description) != "language":
            raise UserError(
                f"{folder}: a {description['task']} model; it cannot generate text. Use loopos predict and loopos "
                "evaluate"
            )
        if LANGUAGE_ENSEMBLE in description:
            raise UserError(f"{folder}: an ensemble of language models; wanted a single one: name a member of it")
        place = str(folder)
    pretrained = load_pretrained(place, causal=True, trust_remote_code=trust_remote_code, quantized=True)
    return OpenedLanguageModel(pretrained.model, pretrained.tokenizer, description, pretrained.said)
