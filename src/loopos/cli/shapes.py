"""The model of a run as shapes without numbers, and its parameters counted.

Enters: a config and the architecture of its weights. Leaves: `Model`. It is built on torch's "meta" device, so no
weight is read and no memory taken.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from loopos.cli import estimate
from loopos.cli.inputs import Inputs
from loopos.config.fine_tuning import FineTuningConfig
from loopos.models.adapters import set_trained


@dataclass(frozen=True)
class Model:
    """The model as shapes: its parameters counted, and the layers that keep activations."""

    name: str
    parameters: estimate.Parameters
    shape: estimate.Architecture
    num_layers: int


def meta_model(config: FineTuningConfig, inputs: Inputs, *, trust_remote_code: bool) -> Model:
    """The headless model and its head as shapes, with what the config trains."""
    with torch.device("meta"):
        model = AutoModel.from_config(  # type: ignore[no-untyped-call]
            inputs.architecture, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    assert isinstance(model, PreTrainedModel)
    later = {id(parameter) for parameter in set_trained(model, config.training)}
    if config.training.unfreeze_step is None:
        later = set()
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = inputs.data.space.num_outputs * inputs.architecture.get_text_config().hidden_size
    counts = Counter(total=head, rest=head)
    for parameter in model.parameters():
        size, matrix = parameter.numel(), parameter.ndim == 2 and id(parameter) not in embeddings
        counts["total"] += size
        counts["multiplied"] += size if matrix else 0
        if parameter.requires_grad or id(parameter) in later:
            counts["matrices" if matrix else "rest"] += size
            counts["largest"] = max(counts["largest"], size)
            counts["sides"] += sum(parameter.shape) if parameter.ndim == 2 else size
    parameters = estimate.Parameters(
        counts["total"],
        counts["matrices"],
        counts["rest"],
        counts["sides"] + head,
        counts["multiplied"],
        max(counts["largest"], head),
    )
    layers = inputs.architecture.get_text_config().num_hidden_layers
    return Model(type(model).__name__, parameters, architecture(config, inputs.architecture, layers), layers)


def architecture(config: FineTuningConfig, described: PreTrainedConfig, num_layers: int) -> estimate.Architecture:
    """The sizes that activations depend on; frozen lower layers keep none, unless they train later."""
    training, text = config.training, described.get_text_config()
    kept = 0 if training.trainable == "head" else num_layers
    if training.unfreeze_step is None:
        kept = max(0, kept - training.freeze_layers)
    heads = text.num_attention_heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return estimate.Architecture(
        width=text.hidden_size,
        key_width=(getattr(text, "num_key_value_heads", None) or heads) * head_width,
        feed_forward=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        heads=heads,
        layers=kept,
    )
