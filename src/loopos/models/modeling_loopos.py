"""A transformer with a pooled linear head for transformers: `W·pool(h) + offset` of each text.

LoopOS copies this file beside the weights of a model that no class of transformers computes.
`AutoModelForSequenceClassification.from_pretrained(FOLDER, trust_remote_code=True)` runs it. It needs only torch and
transformers. For inference only: training is done with LoopOS.
Letters: B texts, T tokens of the longest, d hidden size, C outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

# Larger than every position of a text. A constant, because torch's ONNX exporter accepts no input size here.
_BEHIND = 1 << 30


class LoopOSConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """backbone_type, backbone_config: model_type and other keys of the transformer below the head. pooling: "mean",
    "last", "first" or "max" over the hidden states of a text. offset: added to the outputs `[C]`; None for no offset.
    """

    model_type = "loopos_pooled"

    def __init__(
        self,
        backbone_type: str = "",
        backbone_config: dict[str, Any] | None = None,
        pooling: str = "mean",
        offset: list[float] | None = None,
        **kwargs: Any,
    ) -> None:
        self.backbone_type, self.backbone_config = backbone_type, dict(backbone_config or {})
        self.pooling, self.offset = pooling, offset
        # A transformers class that is used directly would read this config as its own and get a random head or other
        # pooling. No weights have these sizes, so it fails instead.
        super().__init__(**{**kwargs, "vocab_size": 0, "num_hidden_layers": 0})

    def backbone(self) -> PretrainedConfig:
        """The config of the transformer below the head."""
        config: PretrainedConfig = AutoConfig.for_model(self.backbone_type, **self.backbone_config)
        return config


class LoopOSForSequenceClassification(PreTrainedModel):  # type: ignore[no-untyped-call]
    """The backbone has its own prefix, as in transformers' classifiers; the head `score` stays in fp32."""

    config_class = LoopOSConfig
    _keep_in_fp32_modules = ["score"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["score"]  # noqa: RUF012

    def __init__(self, config: LoopOSConfig) -> None:
        super().__init__(config)
        backbone: Any = AutoModel.from_config(config.backbone())  # type: ignore[no-untyped-call]
        self.base_model_prefix = backbone.base_model_prefix
        setattr(self, self.base_model_prefix, backbone)
        hidden_size: int = backbone.config.get_text_config().hidden_size
        self.score = nn.Linear(hidden_size, len(config.id2label or ()), bias=False, dtype=torch.float32)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple[Tensor]:
        """`[B, T]` each, attention_mask 1 = a token of the text, pads on either side → logits or values `[B, C]` in
        fp32.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        order = tokens_first(attention_mask)
        attention_mask = attention_mask.gather(1, order)
        backbone = getattr(self, self.base_model_prefix)
        extra: dict[str, Any] = {}
        # GPT-2 takes segments too, but adds the embedding of token 0 or 1 to every token.
        if token_type_ids is not None and (getattr(backbone.config, "type_vocab_size", None) or 0) > 1:
            extra["token_type_ids"] = token_type_ids.gather(1, order)
        if getattr(backbone.config, "use_cache", None) is not None:
            extra["use_cache"] = False
        output = backbone(input_ids=input_ids.gather(1, order), attention_mask=attention_mask, **extra)
        vectors = pooled(output.last_hidden_state.float(), attention_mask, self.config.pooling)
        with torch.autocast(vectors.device.type, enabled=False):
            logits = vectors @ self.score.weight.float().T
        if self.config.offset is not None:
            logits = logits + torch.tensor(self.config.offset, device=logits.device)
        return (logits,) if return_dict is False else SequenceClassifierOutput(logits=logits)


def tokens_first(mask: Tensor) -> Tensor:
    """Indices `[B, T]` that move the tokens of each text before its pads, in their order, so that positions count from
    the first token wherever the pads were. mask `[B, T]`.
    """
    positions = torch.arange(mask.shape[1], device=mask.device)
    order: Tensor = torch.argsort(positions + (mask == 0) * _BEHIND, dim=1)
    return order


def pooled(hidden: Tensor, mask: Tensor, how: str) -> Tensor:
    """One vector per text, over its tokens. hidden `[B, T, d]`, mask `[B, T]` with pads on the right → `[B, d]`."""
    if how == "first":
        return hidden[:, 0]
    if how == "last":
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), mask.sum(1) - 1]
    real = mask.unsqueeze(-1).to(hidden.dtype)
    if how == "mean":
        return (hidden * real).sum(1) / real.sum(1)
    if how == "max":
        return hidden.masked_fill(real == 0, float("-inf")).amax(1)
    raise ValueError(f"pooling: expected mean, last, first or max, got {how}")
