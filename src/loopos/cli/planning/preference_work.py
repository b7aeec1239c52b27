"""What reward_model, ppo and rlhf would read, opened without the weights: comparisons, prompts, their tokens' rules.

Enters: a config. Leaves: `ComparisonInputs` or `PromptInputs`, and what a reward model is before it is opened. The
parts are those that the methods themselves use. Left out: the models' numbers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from loopos.config.faults import UserError
from loopos.config.ppo import PpoConfig
from loopos.config.reward_model import RewardModelConfig
from loopos.config.rlhf import RlhfConfig
from loopos.config.sections import LoraSection
from loopos.data.preference_data import PreferenceData, load_comparisons, load_prompts
from loopos.data.preference_encoder import PreferenceEncoder
from loopos.data.preferences import Comparison
from loopos.data.prompts import Prompt
from loopos.data.tokens import longest
from loopos.models.load import Sizes, load_config
from loopos.models.model_folder import model_folder, read_description
from loopos.models.reward_folder import check_same_tokens
from loopos.models.sources import weights_source
from loopos.models.tokenizers import open_tokenizer


@dataclass(frozen=True)
class ComparisonInputs:
    """Comparisons, what makes their tokens, and the architecture that scores them."""

    data: PreferenceData[Comparison]
    encoder: PreferenceEncoder
    architecture: PreTrainedConfig


@dataclass(frozen=True)
class PromptInputs:
    """Prompts, those of them that validation answers, what makes their tokens, and the policy's architecture."""

    data: PreferenceData[Prompt]
    asked: list[Prompt]
    encoder: PreferenceEncoder
    architecture: PreTrainedConfig


@dataclass(frozen=True)
class RewardShape:
    """A reward model's architecture and heads. `adapter`: its adapters, where it is one over the policy's weights."""

    architecture: PreTrainedConfig
    heads: int
    adapter: LoraSection | None


def open_comparisons(config: RewardModelConfig, *, trust_remote_code: bool) -> ComparisonInputs:
    """The comparisons of a config, with nothing tokenised yet. Raises `UserError`, as training does."""
    data = load_comparisons(config.data, config.data.source, seed=config.training.seed)
    architecture, tokenizer, max_length = _opened(config, trust_remote_code)
    return ComparisonInputs(data, PreferenceEncoder(config.data, tokenizer, max_length=max_length), architecture)


def open_prompts(config: PpoConfig, *, trust_remote_code: bool) -> PromptInputs:
    """The prompts of a config, with nothing tokenised yet. Raises `UserError`, as training does."""
    section = config.data
    data = load_prompts(section, section.source, seed=config.training.seed)
    architecture, tokenizer, whole = _opened(config, trust_remote_code)
    room = None if whole is None else whole - config.generation.max_new_tokens
    limit = min((each for each in (room, section.max_prompt_tokens) if each is not None), default=None)
    encoder = PreferenceEncoder(section, tokenizer, max_length=limit)
    asked = data.validation[: config.evaluation.prompts] if config.validates else []
    return PromptInputs(data, asked, encoder, architecture)


def _opened(
    config: RewardModelConfig | PpoConfig, trust_remote_code: bool
) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase, int | None]:
    """Architecture, tokenizer, and the longest sequence."""
    section, asked = config.data, config.training.max_length
    sizes = Sizes.of(config.model, max_length=asked)
    architecture = load_config(section.pretrained_weights, sizes=sizes, trust_remote_code=trust_remote_code)
    source = weights_source(section.pretrained_weights)
    tokenizer = open_tokenizer(source, section.tokenizer, trust_remote_code=trust_remote_code)
    positions = getattr(architecture.get_text_config(), "max_position_embeddings", None)
    return architecture, tokenizer, longest(tokenizer, positions, asked)


def trained_reward_shapes(config: PpoConfig, tokenizer: PreTrainedTokenizerBase) -> list[RewardShape]:
    """The shapes of the reward models that a config names. An adapter is taken to be over the policy's weights where
    the names of the weights are the same: training compares the weights themselves. Raises `UserError`.
    """
    policy, found = Path(config.data.pretrained_weights.rstrip("/")).name, []
    for place in config.data.reward_models:
        folder = model_folder(place)
        description = read_description(folder)
        own = open_tokenizer(weights_source(str(folder)), None)
        check_same_tokens(tokenizer, own, f"data.reward_model: {place}")
        adapter = folder.parent / "adapter"
        lora = _adapter(adapter) if adapter.is_dir() and description.get("pretrained_weights") == policy else None
        found.append(RewardShape(load_config(str(folder)), len(description["score_mean"]), lora))
    return found


def planned_reward_shape(config: RlhfConfig, architecture: PreTrainedConfig) -> RewardShape:
    """The shape of the reward model that the first phase will train."""
    training = config.reward_model_config().training
    lora = training.lora or LoraSection() if training.trainable == "lora" else None
    return RewardShape(architecture, config.reward.heads, lora)


def _adapter(folder: Path) -> LoraSection:
    """The adapters that a PEFT folder describes."""
    file = folder / "adapter_config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return LoraSection(rank=found["r"], target_modules=sorted(found["target_modules"]))
    except (OSError, ValueError, TypeError, KeyError) as problem:
        raise UserError(f"{file}: no adapter that can be read: {problem}") from problem
