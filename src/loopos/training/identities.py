"""What each method learns from, and what its outputs mean: the traits that a resumed run must have the same.

Enters: a method's config, its encoded rows, the tokenizer and template that made them, and `base`, a fingerprint of the
weights that training begins with. Leaves: an `Identity`. Left out: how two of them are compared, and what all methods
share (`run_identity.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, TypeAlias

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loopos.config.chain_of_thought import ChainOfThoughtConfig
from loopos.config.fine_tuning import FineTuningConfig
from loopos.config.ppo import PpoConfig
from loopos.config.pretraining import PretrainingConfig
from loopos.config.reward_model import RewardModelConfig
from loopos.data.digest import comparisons_digest, prompts_digest, rows_digest, text_digest, tokenizer_digest
from loopos.data.label_space import LabelSpace
from loopos.data.preference_encoder import PreferenceEncoder
from loopos.data.preference_tokens import EncodedComparison
from loopos.data.supervised_encoder import SupervisedEncoder
from loopos.data.tokens import Encoded
from loopos.training.run_identity import Identity, Trait, setting

_Config: TypeAlias = FineTuningConfig | ChainOfThoughtConfig | RewardModelConfig | PpoConfig | PretrainingConfig


def of_task(
    config: FineTuningConfig,
    space: LabelSpace,
    rows: Sequence[Encoded],
    targets: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    base: str,
) -> Identity:
    """A head's: rows with their targets, the classes, pooling, and the loss."""
    section = config.model
    losses: tuple[tuple[str, Any], ...] = (("class_weights", section.class_weights),)
    if space.task == "classification":
        losses += (("label_smoothing", section.label_smoothing),)
    elif space.task == "regression":
        losses = (("regression_loss", section.regression_loss), ("huber_delta", section.huber_delta))
    named = (("task", space.task), ("labels", list(space.class_names)), ("pooling", section.pooling), *losses)
    return {
        **_learned_from(config, "training_data", rows_digest(rows, targets), tokenizer, max_length, base),
        **{f"model.{key}": Trait(value, (f"model.{key}",)) for key, value in named},
    }


def of_reasoning(
    config: ChainOfThoughtConfig, rows: Sequence[Encoded], encoder: SupervisedEncoder, *, base: str
) -> Identity:
    """A language model's: rows with the weight of each token, template and step format."""
    key = "reasoning_examples" if config.data.reasoning_examples else "training_data"
    return {
        **_learned_from(config, key, rows_digest(rows), encoder.tokenizer, encoder.max_length, base),
        **_template(encoder.template.source),
        **setting("data.step_format", asdict(encoder.step_format)),
    }


def of_preferences(
    config: RewardModelConfig, rows: Sequence[EncodedComparison], encoder: PreferenceEncoder, *, base: str
) -> Identity:
    """A reward model's: comparisons with their pairs, and what is learned from a pair."""
    key = "preference_data" if config.data.preference_data else "training_data"
    learned = ("heads", "centring", "margins", "soft_labels")
    return {
        **_learned_from(config, key, comparisons_digest(rows), encoder.tokenizer, encoder.max_length, base),
        **_template(encoder.template.source),
        **{f"reward.{name}": Trait(getattr(config.reward, name), (f"reward.{name}",)) for name in learned},
    }


def of_policy(
    config: PpoConfig, prompts: Sequence[Sequence[int]], encoder: PreferenceEncoder, *, base: str
) -> Identity:
    """A policy's: the prompts, and what an answer is worth. base: of policy and reward models."""
    key = "prompts" if config.data.prompts else "training_data"
    return {
        **_learned_from(config, key, prompts_digest(prompts), encoder.tokenizer, encoder.max_length, base),
        **_template(encoder.template.source),
        **setting("reward", config.reward.model_dump(mode="json")),
        **setting("training.value_model", config.training.value_model),
    }


def of_text(
    config: PretrainingConfig, pieces: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> Identity:
    """A new language model's: pieces of text, and the sizes that no count of weights tells."""
    key = "input_file" if config.data.input_file else "training_data"
    return {
        **_learned_from(config, key, rows_digest(pieces), tokenizer, max_length, "new"),
        **setting("model.num_heads", config.model.num_heads),
        **setting("model.num_key_value_heads", config.model.num_key_value_heads),
    }


def _learned_from(
    config: _Config, key: str, rows: str, tokenizer: PreTrainedTokenizerBase, max_length: int | None, base: str
) -> dict[str, Trait]:
    """What every method learns from. key: that of `data` that names the rows. rows: their digest, as they were encoded
    and in their order. max_length: in force.
    """
    decides = (f"data.{key}", "data.", "training.max_length", "training.seed", "model.labels", "model.task")
    return {
        **setting("computation.method", config.computation.method),
        "base": Trait(base, ("data.pretrained_weights", "data.reward_model"), "the weights"),
        "training rows": Trait(rows, decides, "the encoded rows"),
        "data.tokenizer": Trait(tokenizer_digest(tokenizer), ("data.tokenizer",), "the tokenizer's tokens"),
        **setting("training.max_length", max_length),
    }


def _template(source: str) -> dict[str, Trait]:
    return {"data.chat_template": Trait(text_digest(source), ("data.chat_template",), "the templates")}
