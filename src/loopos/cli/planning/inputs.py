"""What a run would read, opened without the weights: rows, tokenizer, architecture, tokens.

Enters: a fine-tuning config. Leaves: `Inputs`. The parts are those that the method itself uses, so that counts of
tokens and steps are true. Left out: the model's numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from loopos.config.fine_tuning import FineTuningConfig
from loopos.data.labelled import LabelledData, load_labelled
from loopos.data.tokens import Encoded, TokenReport, encode_labelled, longest
from loopos.models.load import Sizes, load_config
from loopos.models.sources import weights_source
from loopos.models.tokenizers import open_tokenizer


@dataclass(frozen=True)
class Inputs:
    """Rows and their tokens; `max_length` is where examples are cut (tokens)."""

    data: LabelledData
    tokenizer: PreTrainedTokenizerBase
    architecture: PreTrainedConfig
    max_length: int | None
    train: list[Encoded]
    train_report: TokenReport
    validation: list[Encoded]
    validation_report: TokenReport


def open_inputs(config: FineTuningConfig, *, trust_remote_code: bool) -> Inputs:
    """Reads and tokenises what the config names. Raises `UserError`, as training does."""
    section, model = config.data, config.model
    data = load_labelled(section, model, seed=config.training.seed)
    sizes = Sizes.of(model, max_length=config.training.max_length)
    architecture = load_config(section.pretrained_weights, sizes=sizes, trust_remote_code=trust_remote_code)
    source = weights_source(section.pretrained_weights)
    tokenizer = open_tokenizer(source, section.tokenizer, trust_remote_code=trust_remote_code)
    positions = getattr(architecture.get_text_config(), "max_position_embeddings", None)
    max_length = longest(tokenizer, positions, config.training.max_length)
    train, train_report = encode_labelled(
        tokenizer, data.train, max_length=max_length, on_truncation=section.on_truncation
    )
    validation, validation_report = encode_labelled(
        tokenizer, data.validation, max_length=max_length, on_truncation=section.on_truncation
    )
    return Inputs(data, tokenizer, architecture, max_length, train, train_report, validation, validation_report)
