"""How GGUF lays out a model: the metadata of its architecture, the names of its tensors, and the order of their rows.

Enters: a config of transformers and the names of its tensors. Leaves: keys and values, and a `Place` for each tensor.
What llama.cpp could not compute as transformers does is refused here, before anything is written. Left out: the
vocabulary (`gguf_vocabulary.py`), bytes (`gguf_file.py`).
Names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
Letters: h heads, d size of a head, n columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from loopos.config.faults import UserError

# transformers' model_type → GGUF's architecture.
ARCHITECTURES: Mapping[str, str] = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_NOT_WEIGHTS = "rotary_emb.inv_freq"
_OUTPUT = "lm_head.weight"


@dataclass(frozen=True)
class Place:
    """Where a tensor goes. heads: the rows are those of so many heads, whose rotary halves are interleaved; 0 where
    the rows stay as they are.
    """

    name: str
    source: str
    heads: int = 0

    def arranged(self, tensor: Tensor) -> Tensor:
        """The tensor with its rows in GGUF's order."""
        return interleaved(tensor, self.heads) if self.heads else tensor


def interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Rows `[h·d, n]` of each head from the order of transformers, first halves and then second halves of the rotary
    pairs, to that of llama.cpp's `llama` architecture, pair by pair.
    """
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def check_layout(config: PreTrainedConfig, given: str) -> None:
    """Raises `UserError`, with every reason, for a model that llama.cpp would not compute as transformers does."""
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise UserError(
            f"{given}: the architecture {kind} is not exported to GGUF; wanted one of {', '.join(ARCHITECTURES)}: "
            "export it with --format huggingface"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    reasons = []
    if rope.get("rope_type", "default") != "default":
        reasons.append(f"positions are scaled by rope_type {rope['rope_type']}")
    if rope.get("partial_rotary_factor", 1.0) not in (None, 1, 1.0):
        reasons.append(f"positions turn a part of each head alone ({rope['partial_rotary_factor']})")
    if getattr(config, "hidden_act", "silu") not in ("silu", "swish"):
        reasons.append(f"hidden_act is {config.hidden_act}")
    if kind in ("llama", "qwen3") and getattr(config, "attention_bias", False):
        reasons.append("its attention has biases")
    if getattr(config, "mlp_bias", False):
        reasons.append("its feed-forward layers have biases")
    window = getattr(config, "sliding_window", None)
    in_use = kind == "mistral" or getattr(config, "use_sliding_window", False)
    if in_use and window is not None and window < config.max_position_embeddings:
        reasons.append(f"attention slides over {window} tokens")
    if reasons:
        raise UserError(
            f"{given}: this {kind} is not exported to GGUF: {'; '.join(reasons)}; llama.cpp would compute something "
            "else: export it with --format huggingface"
        )


def head_size(config: PreTrainedConfig) -> int:
    """d, which some configs say and others leave to be reckoned."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def metadata(config: PreTrainedConfig) -> dict[str, int | float]:
    """Key → value, without the architecture's name in front. Whole numbers are unsigned, others are single floats."""
    size, heads = head_size(config), config.num_attention_heads
    values: dict[str, int | float] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None) or heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": size,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    if size * heads != config.hidden_size or config.model_type == "qwen3":
        values |= {"attention.key_length": size, "attention.value_length": size}
    return values


def places(config: PreTrainedConfig, names: Iterable[str], given: str) -> list[Place]:
    """A place for every tensor, in the order of a forward pass. Raises `UserError` for tensors that have none, and for
    an output embedding that is missing.
    """
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    architecture = ARCHITECTURES[config.model_type]
    key = next(each for each in MODEL_ARCH if MODEL_ARCH_NAMES[each] == architecture)
    table = get_tensor_name_map(key, config.num_hidden_layers)
    found: list[Place] = []
    unknown: list[str] = []
    for source in names:
        if source.endswith(_NOT_WEIGHTS) or (source == _OUTPUT and config.tie_word_embeddings):
            continue
        name = table.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            unknown.append(source)
        else:
            found.append(Place(name, source, _heads(config, source)))
    if unknown:
        raise UserError(
            f"{given}: {len(unknown)} of its tensors have no place in a GGUF {architecture}, the first {unknown[0]}; "
            "wanted a plain language model with its adapters merged"
        )
    if not config.tie_word_embeddings and not any(place.source == _OUTPUT for place in found):
        raise UserError(f"{given}: {_OUTPUT} is missing and the config does not tie it to the input embedding")
    return sorted(found, key=_order)


def _heads(config: PreTrainedConfig, source: str) -> int:
    if ARCHITECTURES[config.model_type] != "llama":
        return 0
    if ".q_proj." in source:
        return int(config.num_attention_heads)
    if ".k_proj." in source:
        return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    return 0


def _order(place: Place) -> tuple[int, str]:
    parts = place.name.split(".")
    if parts[0] == "blk":
        return int(parts[1]), place.name
    return (-1 if parts[0] == "token_embd" else 1_000_000), place.name


def is_embedding(place: Place) -> bool:
    """Whether the tensor embeds tokens, on the way in or out."""
    return place.name.split(".")[0] in ("token_embd", "output")


def as_float32(tensor: Tensor) -> Tensor:
    """The tensor in fp32, contiguous, as quantisation reads it."""
    return tensor.to(torch.float32).contiguous()
