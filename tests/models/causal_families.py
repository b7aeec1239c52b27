"""Every causal language model family of transformers at pico size: two layers of width 32, a vocabulary of 416.

The sizes go by the names that families share; `SPECIAL` holds what a family needs beside them.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 416  # more than the pico tokenizer has, to which some families add tokens
FAMILIES: tuple[str, ...] = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
_WIDTH = ("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "emb_dim", "lru_width", "embedding_dim")
_FEED_FORWARD = (
    "intermediate_size",
    "n_inner",
    "ffn_dim",
    "d_ff",
    "ffn_hidden_size",
    "decoder_ffn_dim",
    "encoder_ffn_dim",
)
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads")
_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "n_words", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(_WIDTH, 32),
    **dict.fromkeys(_FEED_FORWARD, 64),
    **dict.fromkeys(_LAYERS, 2),
    **dict.fromkeys(_HEADS, 4),
    **dict.fromkeys(_POSITIONS, 256),
    **dict.fromkeys(_EXPERTS, 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "num_key_value_heads"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("head_dim", "attention_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_state", "state_size"), 8),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "mamba_n_groups", "n_groups", "moe_layer_start_index"), 1),
    "sliding_window": 6, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.05,
    "query_pre_attn_scalar": 8, "rotary_dim": 4, "attention_window_size": 16, "hidden_size_per_layer_input": 8,
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_chunk_size": 16, "chunk_size": 16, "time_step_rank": 4,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "num_nextn_predict_layers": 0, "moe_layer_interval": 1,
}  # fmt: skip
SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"], "n_group": 2, "topk_group": 1, "partial_rotary_factor": 1.0},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16},
    "deepseek_v4": {"hc_mult": 2, "o_groups": 2, "o_lora_rank": 16, "index_n_heads": 2, "index_head_dim": 8, "qk_rope_head_dim": 4},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dots1": {"n_shared_experts": 1},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 0,
        "laurel_rank": 8,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 6},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"expert_ffn_hidden_size": 16, "num_layers": 1, "zero_expert_num": 1, "head_dim": 8, "num_key_value_heads": 4},

    "mamba2": {"num_heads": 4, "head_dim": 16, "expand": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "hc_lowrank": 8,
        "ple_embed_dim": 32,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [16, 16]},
    "roc_bert": dict.fromkeys(("pronunciation_vocab_size", "shape_vocab_size"), VOCABULARY)
    | dict.fromkeys(("pronunciation_embed_dim", "shape_embed_dim"), 32),
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"layer_types": ["mamba", "hybrid", "mamba", "hybrid"], "attention_head_dim": 16, "mamba_dt_rank": 4,
              "use_mamba_kernels": False, "attention_hidden_size": 64},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
NOT_TRIED: dict[str, str] = {
    "blt": "four models of its own that read bytes by patches; no small config of it",
    "dbrx": "transformers cannot build it from its own config class (rope_theta)",
    "dots3_note": "no small config of it",
    "dots3_note_text": "no small config of it",
    "gemma3n": "its vision tower needs the package timm; gemma3n_text is tried",
    "gemma4_assistant": "drafts for a larger model, whose states it reads",
    "gemma4_unified_assistant": "drafts for a larger model, whose states it reads",
    "musicgen": "writes sound",
    "musicgen_melody": "writes sound",
    "prophetnet": "predicts several tokens at once; no small config of it",
    "xlnet": "not causal: it reads tokens in permuted order",
    "xlstm": "transformers' own forward pass fails at small sizes",
}
_DECODERS = ("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
             "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl",
             "xmod", "trocr")  # fmt: skip


def pico_config(model_type: str) -> PreTrainedConfig:
    """The family's config with small sizes. Encoders that can be decoders are made decoders."""
    config_class = CONFIG_MAPPING[model_type]
    base = config_class()
    settings = _small(base)
    for name in base.sub_configs:
        part = getattr(base, name, None)
        if isinstance(part, PreTrainedConfig):
            settings[name] = _small(part)
    if model_type in _DECODERS:
        settings["is_decoder"] = True
    config = config_class(**settings)
    assert isinstance(config, PreTrainedConfig)
    return config


def pico_causal(model_type: str) -> PreTrainedModel:
    """A model of the family with random weights, the same ones each time, in fp32."""
    config = pico_config(model_type)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    assert size < 8e6, f"{model_type} is not small: {size:,} parameters"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    assert isinstance(model, PreTrainedModel)
    return model


def _small(config: PreTrainedConfig) -> dict[str, Any]:
    special = SPECIAL.get(config.model_type, {})
    settings = {name: size for name, size in SIZES.items() if _takes(config, name)}
    if _takes(config, "qk_rope_head_dim") and "head_dim" not in special:
        # Latent attention: every head has keys of its own, of two parts.
        settings.pop("head_dim", None)
        settings["num_key_value_heads"] = 4
    kinds = special.get("layer_types") or (_kinds_of_layer(config) if _can_be_set(config, "layer_types") else [])
    if kinds:
        settings["layer_types"] = kinds
        settings["num_hidden_layers"] = len(kinds)
    return {**settings, **special}


def _takes(config: PreTrainedConfig, name: str) -> bool:
    if name in type(config).attribute_map or not _can_be_set(config, name):
        return False
    try:
        value = getattr(config, name)
    except (AttributeError, AmbiguousGlobalPerLayerAttributeError):  # a size that differs by layer is no single number
        return False
    return not isinstance(value, (list, tuple, dict))


def _can_be_set(config: PreTrainedConfig, name: str) -> bool:
    attribute = getattr(type(config), type(config).attribute_map.get(name, name), None)
    return not (isinstance(attribute, property) and attribute.fset is None)


def _kinds_of_layer(config: PreTrainedConfig) -> list[str]:
    """Each kind of layer of the family once, and at least two layers."""
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or []))
    return kinds * 2 if len(kinds) == 1 else kinds
