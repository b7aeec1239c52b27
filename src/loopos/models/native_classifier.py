"""transformers' own sequence classifier of an architecture, where it computes what a LoopOS model does with pooling
"last": `W·h` of the last token, without a bias.

Enters: a config. Leaves: an empty classifier, or the pooling that a new model gets. Left out: writing it
(`task_layout.py`).
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)


def native_classifier(config: PreTrainedConfig) -> PreTrainedModel | None:
    """The classifier of `config` on the meta device: its backbone stands under `base_model_prefix`, its head is the
    linear layer `score`. None where transformers has none of that shape: encoders pool in another way.
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
    """What `model.pooling: auto` is for an architecture: "last" where transformers' own classifier reads the last
    token too, so that the trained folder opens there as it is; "mean" for all others.
    """
    return "mean" if native_classifier(config) is None else "last"
