"""Writes a language model as a GGUF file: metadata, tensor names and row order, and the tokenizer's vocabulary.

A model that llama.cpp would compute differently from transformers, or whose text it would tokenize differently, is
refused before anything is written. Metadata and shapes are known before the first tensor is read, so one tensor at a
time is in memory. SentencePiece, Unigram and WordPiece vocabularies are not supported.

Types: vectors (norms, biases) are F32. Matrices have the requested type, except that for Q4_0 embeddings are Q8_0: they
are read a row at a time, and their rounding reaches every position. A matrix whose rows do not divide into blocks of 32
is F16. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md Letters: h heads, d size of a head, n columns.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from loopos.config.diagnostics import MissingRequirement, UserError
from loopos.evaluation.progress import OnProgress
from loopos.exporting.huggingface import cast
from loopos.models.gguf_tokenizer import CONTROL, NORMAL, SPLITS, UNUSED, USER_DEFINED, WHOLE_WORDS, unused_name
from loopos.storage.tensor_files import StoredTensor, TensorSpec, folder_tensors, require_finite

# transformers' model_type → GGUF's architecture.
ARCHITECTURES: Mapping[str, str] = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_NOT_WEIGHTS = "rotary_emb.inv_freq"
_OUTPUT = "lm_head.weight"


@dataclass(frozen=True)
class TensorLayout:
    """The GGUF name of a tensor. heads: number of heads whose rotary halves are interleaved in the rows; 0: rows stay
    as they are.
    """

    name: str
    source: str
    heads: int = 0

    def arranged(self, tensor: Tensor) -> Tensor:
        """The tensor with its rows in GGUF's order."""
        return interleaved(tensor, self.heads) if self.heads else tensor


def interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Reorders rows `[h·d, n]` of each head from transformers' order, first and then second halves of the rotary pairs,
    to pair by pair, as llama.cpp's `llama` architecture has them.
    """
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def check_layout(config: PreTrainedConfig, actual: str) -> None:
    """Raises `UserError`, with all reasons, for a model that llama.cpp would compute differently from transformers."""
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise UserError(
            f"{actual}: architecture {kind} cannot be exported to GGUF; expected one of {', '.join(ARCHITECTURES)}; "
            "use --format huggingface"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    reasons = []
    if rope.get("rope_type", "default") != "default":
        reasons.append(f"positions are scaled by rope_type {rope['rope_type']}")
    if rope.get("partial_rotary_factor", 1.0) not in (None, 1, 1.0):
        reasons.append(f"rotary embeddings cover only part of each head ({rope['partial_rotary_factor']})")
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
            f"{actual}: this {kind} cannot be exported to GGUF: {'; '.join(reasons)}; llama.cpp would compute "
            "something else: use --format huggingface"
        )


def head_size(config: PreTrainedConfig) -> int:
    """d, which some configs state and others leave to be derived."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def metadata(config: PreTrainedConfig) -> dict[str, int | float]:
    """Key → value, without the architecture's prefix. Integers are unsigned, other values fp32."""
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


def layouts(config: PreTrainedConfig, names: Iterable[str], actual: str) -> list[TensorLayout]:
    """The layout of every tensor, in the order of a forward pass. Raises `UserError` for tensors that GGUF does not
    have, and for a missing output embedding.
    """
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    architecture = ARCHITECTURES[config.model_type]
    key = next(each for each in MODEL_ARCH if MODEL_ARCH_NAMES[each] == architecture)
    table = get_tensor_name_map(key, config.num_hidden_layers)
    found: list[TensorLayout] = []
    unknown: list[str] = []
    for source in names:
        if source.endswith(_NOT_WEIGHTS) or (source == _OUTPUT and config.tie_word_embeddings):
            continue
        name = table.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            unknown.append(source)
        else:
            found.append(TensorLayout(name, source, _heads(config, source)))
    if unknown:
        raise UserError(
            f"{actual}: {len(unknown)} tensors do not exist in a GGUF {architecture}, first {unknown[0]}; "
            "expected a plain language model with its adapters merged"
        )
    if not config.tie_word_embeddings and not any(layout.source == _OUTPUT for layout in found):
        raise UserError(f"{actual}: {_OUTPUT} is missing and the config does not tie it to the input embedding")
    return sorted(found, key=_order)


def _heads(config: PreTrainedConfig, source: str) -> int:
    if ARCHITECTURES[config.model_type] != "llama":
        return 0
    if ".q_proj." in source:
        return int(config.num_attention_heads)
    if ".k_proj." in source:
        return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    return 0


def _order(layout: TensorLayout) -> tuple[int, str]:
    parts = layout.name.split(".")
    if parts[0] == "blk":
        return int(parts[1]), layout.name
    return (-1 if parts[0] == "token_embd" else 1_000_000), layout.name


def is_embedding(layout: TensorLayout) -> bool:
    """Whether the tensor is the input or output embedding."""
    return layout.name.split(".")[0] in ("token_embd", "output")


def as_float32(tensor: Tensor) -> Tensor:
    """The tensor in fp32, contiguous, as quantization reads it."""
    return tensor.to(torch.float32).contiguous()


@dataclass(frozen=True)
class Vocabulary:
    """tokens, types: one for each row of the embedding. merges: "a b", in order. pre: llama.cpp's name of the
    pre-tokenizer. special: GGUF's key (such as bos_token_id) → token. adds_bos, adds_eos: whether tokenization adds
    them. template: the chat template, in Jinja.
    """

    tokens: Sequence[str]
    types: Sequence[int]
    merges: Sequence[str]
    pre: str
    special: Mapping[str, int]
    adds_bos: bool
    adds_eos: bool
    template: str | None


def read_vocabulary(folder: Path, num_rows: int, actual: str) -> Vocabulary:
    """The vocabulary for an embedding of `num_rows`. Raises `UserError` for a tokenizer that llama.cpp cannot
    reproduce.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{actual}: no tokenizer.json; expected a byte-level BPE tokenizer as transformers saves it")
    described = json.loads(file.read_text(encoding="utf-8"))
    pre = _pre_tokenizer(described, actual)
    tokens, types = _tokens(described, num_rows, actual)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in described["model"]["merges"]]
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    fast = Tokenizer.from_file(str(file))
    bare, whole = (fast.encode("a", add_special_tokens=added).ids for added in (False, True))
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "unknown_token_id": tokenizer.unk_token_id,
        "padding_token_id": tokenizer.pad_token_id,
        **_ends(folder),
    }
    adds_bos = whole[:1] == [tokenizer.bos_token_id] and bare[:1] != whole[:1]
    adds_eos = whole[-1:] == [tokenizer.eos_token_id] and bare[-1:] != whole[-1:]
    if len(whole) != len(bare) + adds_bos + adds_eos:
        raise UserError(
            f"{actual}: its tokenizer adds more than begin and end tokens to a text, which GGUF does not support"
        )
    template = tokenizer.chat_template
    if isinstance(template, dict):
        # Of several templates, GGUF's single key holds the default one.
        template = template.get("default")
    return Vocabulary(
        tokens=tokens,
        types=types,
        merges=merges,
        pre=pre,
        special={name: int(token) for name, token in special.items() if token is not None},
        adds_bos=adds_bos,
        adds_eos=adds_eos,
        template=template if isinstance(template, str) else None,
    )


def _ends(folder: Path) -> dict[str, int]:
    """Stop tokens of the generation config: the first is GGUF's end token, another one its end of a turn."""
    file = folder / "generation_config.json"
    found = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
    ends = [found] if isinstance(found, int) else list(found or ())
    return dict(zip(("eos_token_id", "eot_token_id"), ends, strict=False))


def _tokens(described: Mapping[str, Any], num_rows: int, actual: str) -> tuple[list[str], list[int]]:
    by_id: dict[int, tuple[str, int]] = {index: (token, NORMAL) for token, index in described["model"]["vocab"].items()}
    for added in described.get("added_tokens", ()):
        if added["lstrip"] or added["rstrip"] or added["single_word"]:
            raise UserError(
                f"{actual}: its token {added['content']} strips spaces around it or matches only whole words, which "
                "llama.cpp does not support; use --format huggingface"
            )
        by_id[added["id"]] = (added["content"], CONTROL if added["special"] else USER_DEFINED)
    if by_id and max(by_id) >= num_rows:
        raise UserError(f"{actual}: its tokenizer has {max(by_id) + 1} tokens, its embedding {num_rows} rows")
    # Rows of the embedding beyond the vocabulary need unique names too.
    listed = [by_id.get(index, (unused_name(index), UNUSED)) for index in range(num_rows)]
    return [token for token, _ in listed], [kind for _, kind in listed]


def _pre_tokenizer(described: Mapping[str, Any], actual: str) -> str:
    """llama.cpp's name of tokenizer.json's pre-tokenizer."""
    model = described.get("model", {})
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        kind = "SentencePiece" if model.get("byte_fallback") else model.get("type")
        raise _refusal(actual, f"its vocabulary is {kind}")
    steps = _steps(described.get("pre_tokenizer"))
    last = steps[-1] if steps else {}
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        raise _refusal(actual, "it is not byte-level, or adds a space before the first word")
    before = steps[:-1]
    name = None
    if not before and last.get("use_regex", True):
        name = "gpt-2"
    elif len(before) == 1 and _splits_digits(before[0]) and last.get("use_regex", True):
        name = "smollm"
    elif len(before) == 1 and before[0].get("type") == "Split" and not last.get("use_regex", True):
        pattern = before[0].get("pattern", {}).get("Regex")
        plain = before[0].get("behavior") == "Isolated" and not before[0].get("invert")
        name = SPLITS.get(pattern) if plain else None
    if name is None:
        raise _refusal(
            actual, f"it splits text by {', '.join(str(step.get('type')) for step in steps)} in an unknown way"
        )
    normalizer = described.get("normalizer")
    if normalizer is not None and not (name == "qwen2" and normalizer.get("type") == "NFC"):
        raise _refusal(actual, f"it normalizes text by {normalizer.get('type')}")
    if bool(model.get("ignore_merges")) != (name in WHOLE_WORDS):
        raise _refusal(actual, f"ignore_merges is {bool(model.get('ignore_merges'))}, unlike that of {name}")
    return name


def _splits_digits(step: Mapping[str, Any]) -> bool:
    return step.get("type") == "Digits" and bool(step.get("individual_digits"))


def _steps(described: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if described is None:
        return []
    if described.get("type") == "Sequence":
        return [step for part in described["pretokenizers"] for step in _steps(part)]
    return [described]


def _refusal(actual: str, why: str) -> UserError:
    known = ", ".join(["gpt-2", "smollm", *SPLITS.values()])
    return UserError(
        f"{actual}: its tokenizer cannot be exported to GGUF: {why}; expected a byte-level BPE that "
        f"splits text like one of {known}: use --format huggingface"
    )


Numbers: TypeAlias = NDArray[Any]
_BLOCK = 32
# general.file_type: the type of most tensors.
_FILE_TYPES: Mapping[str, int] = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}
_QUANTIZATION_VERSION = 2


@dataclass(frozen=True)
class PreparedGguf:
    """Everything that is known before the first tensor is read."""

    config: PreTrainedConfig
    vocabulary: Vocabulary
    weights: Mapping[str, StoredTensor]
    layouts: list[TensorLayout]


def require_gguf() -> None:
    """Raises `MissingRequirement` if the package gguf is not installed."""
    try:
        import gguf  # noqa: F401
    except ModuleNotFoundError as problem:
        raise MissingRequirement("--format gguf needs the package gguf; run pip install gguf") from problem


def prepare(folder: Path, actual: str) -> PreparedGguf:
    """Reads config, tokenizer and the shapes of the weights. Raises `UserError` for a model that GGUF cannot hold."""
    config = AutoConfig.from_pretrained(str(folder))
    check_layout(config, actual)
    weights = folder_tensors(folder)
    return PreparedGguf(
        config, read_vocabulary(folder, config.vocab_size, actual), weights, layouts(config, weights, actual)
    )


def write_gguf(prepared: PreparedGguf, file: Path, kind: str, *, name: str, on_progress: OnProgress) -> dict[str, int]:
    """Writes the file and fsyncs it; returns type → number of tensors. kind: one of `GGUF_TYPES`. name: `general.name`.

    Raises `UserError` if f16 is too narrow, `OSError` if the disk is full.
    """
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quant_shape_to_byte_shape

    writer = GGUFWriter(file, ARCHITECTURES[prepared.config.model_type])
    _add_metadata(writer, prepared, kind, name)
    types = {layout.name: _type_of(layout, prepared.weights[layout.source].spec, kind) for layout in prepared.layouts}
    for layout in prepared.layouts:
        shape = prepared.weights[layout.source].spec.shape
        type_ = GGMLQuantizationType[types[layout.name].upper()]
        if types[layout.name] in ("f32", "f16"):
            dtype = numpy.dtype(numpy.float32 if types[layout.name] == "f32" else numpy.float16)
            writer.add_tensor_info(layout.name, shape, dtype, int(numpy.prod(shape)) * dtype.itemsize)
        else:
            packed = quant_shape_to_byte_shape(shape, type_)
            writer.add_tensor_info(layout.name, packed, numpy.dtype(numpy.uint8), int(numpy.prod(packed)), type_)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for finished, layout in enumerate(prepared.layouts):
            on_progress(finished, len(prepared.layouts), layout.name)
            tensor = prepared.weights[layout.source].read()
            require_finite(layout.source, tensor)
            tensor = layout.arranged(tensor)
            writer.write_tensor_data(encoded(layout.name, tensor, types[layout.name]))
        writer.flush()
        for stream in writer.fout or ():
            os.fsync(stream.fileno())
    finally:
        writer.close()
    on_progress(len(prepared.layouts), len(prepared.layouts), "")
    return dict(Counter(types.values()))


def encoded(name: str, tensor: Tensor, kind: str) -> Numbers:
    """A tensor's numbers in a GGUF type: blocks of 32 numbers with one scale, 8 bits each in Q8_0, 4 bits in Q4_0.
    Raises `UserError` if f16 is too narrow.
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    if kind == "f16":
        tensor = cast(name, tensor, torch.float16)
        found: Numbers = tensor.contiguous().numpy()
        return found
    quantized: Numbers = quantize(as_float32(tensor).numpy(), GGMLQuantizationType[kind.upper()])
    return quantized


def _type_of(layout: TensorLayout, spec: TensorSpec, kind: str) -> str:
    if len(spec.shape) < 2:
        return "f32"
    if kind in ("q8_0", "q4_0") and spec.shape[-1] % _BLOCK:
        return "f16"
    return "q8_0" if kind == "q4_0" and is_embedding(layout) else kind


def _add_metadata(writer: Any, prepared: PreparedGguf, kind: str, name: str) -> None:
    vocabulary, prefix = prepared.vocabulary, ARCHITECTURES[prepared.config.model_type]
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(_FILE_TYPES[kind])
    writer.add_quantization_version(_QUANTIZATION_VERSION)
    for key, value in metadata(prepared.config).items():
        if isinstance(value, int):
            writer.add_uint32(f"{prefix}.{key}", value)
        else:
            writer.add_float32(f"{prefix}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.types))
    writer.add_token_merges(list(vocabulary.merges))
    for key, token in vocabulary.special.items():
        writer.add_uint32(f"tokenizer.ggml.{key}", token)
    writer.add_bool("tokenizer.ggml.add_bos_token", vocabulary.adds_bos)
    writer.add_bool("tokenizer.ggml.add_eos_token", vocabulary.adds_eos)
    if vocabulary.template is not None:
        writer.add_chat_template(vocabulary.template)
