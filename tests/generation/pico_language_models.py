"""Pico language models of several families, a model that follows a table, and prompts of mixed length."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GenerationMixin,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.modeling_outputs import CausalLMOutput

VOCABULARY = 400
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Far from uniform distributions, so that equal tokens mean equal logits.
    "initializer_range": 0.3,
}
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**COMMON),
    "qwen2 with biases": lambda: Qwen2Config(**COMMON),
    "qwen3": lambda: Qwen3Config(**COMMON, head_dim=8),
    "gpt2": lambda: GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_inner=64, n_positions=256,
                               pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.3),
    "gemma": lambda: GemmaConfig(**COMMON, head_dim=8),
    "gemma2 soft caps": lambda: Gemma2Config(**COMMON, head_dim=8, query_pre_attn_scalar=8, sliding_window=6,
                                             attn_logit_softcapping=2.0, final_logit_softcapping=5.0),
    "gemma3 two kinds of layer": lambda: Gemma3TextConfig(**COMMON, head_dim=8, sliding_window=6,
                                                          layer_types=["sliding_attention", "full_attention"]),
    "mistral sliding window": lambda: MistralConfig(**COMMON, sliding_window=6),
}  # fmt: skip


def pico_model(name: str) -> PreTrainedModel:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(FAMILIES[name](), attn_implementation="eager", dtype=torch.float32).eval()
    for parameter_name, parameter in model.named_parameters():
        # transformers begins with biases of 0, which a mistake would leave unseen.
        if parameter_name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def mixed_prompts(number: int, *, longest: int = 24, seed: int = 0) -> list[list[int]]:
    """Random tokens that are neither pad, begin nor end; lengths from 1 to `longest`."""
    draw = random.Random(seed)
    return [[draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, longest))] for _ in range(number)]


class Scripted(PreTrainedModel, GenerationMixin):
    """A model without attention whose next-token logits are a table's row: of the last token, or of its position.

    `logits`: `[V, V]` by token or `[positions, V]` by position.
    """

    config_class = PreTrainedConfig

    def __init__(self, logits: Tensor, *, by_position: bool) -> None:
        config = PreTrainedConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2)
        config.vocab_size = logits.shape[1]
        super().__init__(config)
        self.table = torch.nn.Parameter(logits)
        self.by_position = by_position

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None = None, logits_to_keep: Any = 0, cached_pass: Any = None
    ) -> CausalLMOutput:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        keys = position_ids.clamp(max=len(self.table) - 1) if self.by_position else input_ids
        tokens = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutput(logits=self.table[keys][:, tokens])
