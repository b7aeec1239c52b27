"""How GGUF lays out a model: the metadata of its architecture, the names of its tensors, and the order of their rows.

Enters: a config of transformers and the names of its tensors. Leaves: keys and values, and a `Place` for each tensor.
What llama.cpp could not compute as transformers does is refused here, before anything is written. Left out: the
vocabulary (`gguf_vocabulary.py`), bytes (`gguf_file.py`).
Names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
Letters: h heads, d size of a head, n columns.

A tokenizer as GGUF holds it: tokens with their types, merges, the name of the pre-tokenizer, special tokens.

Enters: a folder with tokenizer.json. Leaves: a `Vocabulary`. llama.cpp knows pre-tokenizers by name; the name is found
from what tokenizer.json itself does, and a tokenizer that does something else is refused, since the same text would
become other tokens. Left out: SentencePiece, Unigram and WordPiece vocabularies.

A GGUF file, written tensor by tensor.

Enters: a folder with a language model as safetensors. Leaves: one file that llama.cpp opens, and the types that its
tensors took. Metadata and shapes are known before the first tensor is read, so that one tensor at a time is in memory.
Left out: what the keys mean (`gguf_layout.py`, `gguf_vocabulary.py`).

Types: vectors (norms, biases) are F32. Matrices are of the type that was asked for, but for Q4_0 embeddings are Q8_0:
they are read a row at a time, and their rounding reaches every position. A matrix whose rows do not divide into
blocks of 32 is F16.
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
from loopos.evaluation.progress import Tell
from loopos.exporting.huggingface import cast
from loopos.models.gguf_tokenizer import CONTROL, NORMAL, SPLITS, UNUSED, USER_DEFINED, WHOLE_WORDS, unused_name
from loopos.storage.tensor_files import StoredTensor, TensorSpec, folder_tensors, require_finite

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


def check_layout(config: PreTrainedConfig, actual: str) -> None:
    """Raises `UserError`, with every reason, for a model that llama.cpp would not compute as transformers does."""
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise UserError(
            f"{actual}: the architecture {kind} is not exported to GGUF; expected one of {', '.join(ARCHITECTURES)}: "
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
            f"{actual}: this {kind} is not exported to GGUF: {'; '.join(reasons)}; llama.cpp would compute something "
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


def places(config: PreTrainedConfig, names: Iterable[str], actual: str) -> list[Place]:
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
            f"{actual}: {len(unknown)} of its tensors have no place in a GGUF {architecture}, the first {unknown[0]}; "
            "expected a plain language model with its adapters merged"
        )
    if not config.tie_word_embeddings and not any(place.source == _OUTPUT for place in found):
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


@dataclass(frozen=True)
class Vocabulary:
    """tokens, types: one for each row of the embedding. merges: "a b", in their order. pre: llama.cpp's name of the
    pre-tokenizer. special: GGUF's key (such as bos_token_id) → token. adds_bos, adds_eos: whether text gets them.
    template: the chat template, in Jinja.
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
    """The vocabulary for an embedding of `num_rows`. Raises `UserError` for a tokenizer that llama.cpp would not
    repeat.
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
        raise UserError(f"{actual}: its tokenizer puts more than begin and end tokens around a text, which GGUF lacks")
    template = tokenizer.chat_template
    if isinstance(template, dict):
        # Of several, GGUF's one key holds the one that is taken where none is named.
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
    """What ends a text, by the generation config: the first token is GGUF's end, another one its end of a turn."""
    file = folder / "generation_config.json"
    found = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
    ends = [found] if isinstance(found, int) else list(found or ())
    return dict(zip(("eos_token_id", "eot_token_id"), ends, strict=False))


def _tokens(described: Mapping[str, Any], num_rows: int, actual: str) -> tuple[list[str], list[int]]:
    by_id: dict[int, tuple[str, int]] = {place: (token, NORMAL) for token, place in described["model"]["vocab"].items()}
    for added in described.get("added_tokens", ()):
        if added["lstrip"] or added["rstrip"] or added["single_word"]:
            raise UserError(
                f"{actual}: its token {added['content']} takes spaces around it or stands for whole words alone, which "
                "llama.cpp does not; export it with --format huggingface"
            )
        by_id[added["id"]] = (added["content"], CONTROL if added["special"] else USER_DEFINED)
    if by_id and max(by_id) >= num_rows:
        raise UserError(f"{actual}: its tokenizer has {max(by_id) + 1} tokens, its embedding {num_rows} rows")
    # Rows of the embedding beyond the vocabulary still need a name, each its own.
    listed = [by_id.get(place, (unused_name(place), UNUSED)) for place in range(num_rows)]
    return [token for token, _ in listed], [kind for _, kind in listed]


def _pre_tokenizer(described: Mapping[str, Any], actual: str) -> str:
    """llama.cpp's name of what tokenizer.json does before merges."""
    model = described.get("model", {})
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        kind = "SentencePiece" if model.get("byte_fallback") else model.get("type")
        raise _refusal(actual, f"its vocabulary is {kind}")
    steps = _steps(described.get("pre_tokenizer"))
    last = steps[-1] if steps else {}
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        raise _refusal(actual, "it does not work on bytes, or puts a space before the first word")
    before = steps[:-1]
    name = None
    if not before and last.get("use_regex", True):
        name = "gpt-2"
    elif len(before) == 1 and _digits_apart(before[0]) and last.get("use_regex", True):
        name = "smollm"
    elif len(before) == 1 and before[0].get("type") == "Split" and not last.get("use_regex", True):
        pattern = before[0].get("pattern", {}).get("Regex")
        plain = before[0].get("behavior") == "Isolated" and not before[0].get("invert")
        name = SPLITS.get(pattern) if plain else None
    if name is None:
        raise _refusal(actual, f"it splits text by {', '.join(str(step.get('type')) for step in steps)} in its own way")
    normalizer = described.get("normalizer")
    if normalizer is not None and not (name == "qwen2" and normalizer.get("type") == "NFC"):
        raise _refusal(actual, f"it normalises text by {normalizer.get('type')}")
    if bool(model.get("ignore_merges")) != (name in WHOLE_WORDS):
        raise _refusal(actual, f"ignore_merges is {bool(model.get('ignore_merges'))}, unlike that of {name}")
    return name


def _digits_apart(step: Mapping[str, Any]) -> bool:
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
        f"{actual}: its tokenizer is none that llama.cpp has a name for here: {why}; expected a byte-level BPE that "
        f"splits text as one of {known} does: export it with --format huggingface"
    )


Numbers: TypeAlias = NDArray[Any]
_BLOCK = 32
# general.file_type: what most tensors are.
_FILE_TYPES: Mapping[str, int] = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}
_QUANTISATION_VERSION = 2


@dataclass(frozen=True)
class PreparedGguf:
    """All that is known before the first tensor is read."""

    config: PreTrainedConfig
    vocabulary: Vocabulary
    weights: Mapping[str, StoredTensor]
    places: list[Place]


def require_gguf() -> None:
    """Raises `MissingRequirement` where the package is not installed."""
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
        config, read_vocabulary(folder, config.vocab_size, actual), weights, places(config, weights, actual)
    )


def write_gguf(prepared: PreparedGguf, file: Path, kind: str, *, name: str, tell: Tell) -> dict[str, int]:
    """Writes the file and fsyncs it; returns type → number of tensors. kind: one of `GGUF_TYPES`. name: `general.name`.

    Raises `UserError` where f16 is too narrow, `OSError` when the disk is full.
    """
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quant_shape_to_byte_shape

    writer = GGUFWriter(file, ARCHITECTURES[prepared.config.model_type])
    _add_metadata(writer, prepared, kind, name)
    types = {place.name: _type_of(place, prepared.weights[place.source].spec, kind) for place in prepared.places}
    for place in prepared.places:
        shape = prepared.weights[place.source].spec.shape
        type_ = GGMLQuantizationType[types[place.name].upper()]
        if types[place.name] in ("f32", "f16"):
            dtype = numpy.dtype(numpy.float32 if types[place.name] == "f32" else numpy.float16)
            writer.add_tensor_info(place.name, shape, dtype, int(numpy.prod(shape)) * dtype.itemsize)
        else:
            packed = quant_shape_to_byte_shape(shape, type_)
            writer.add_tensor_info(place.name, packed, numpy.dtype(numpy.uint8), int(numpy.prod(packed)), type_)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, place in enumerate(prepared.places):
            tell(done, len(prepared.places), place.name)
            tensor = prepared.weights[place.source].read()
            require_finite(place.source, tensor)
            tensor = place.arranged(tensor)
            writer.write_tensor_data(encoded(place.name, tensor, types[place.name]))
        writer.flush()
        for stream in writer.fout or ():
            os.fsync(stream.fileno())
    finally:
        writer.close()
    tell(len(prepared.places), len(prepared.places), "")
    return dict(Counter(types.values()))


def encoded(name: str, tensor: Tensor, kind: str) -> Numbers:
    """A tensor's numbers in a type of GGUF: Q8_0 is 32 numbers by one scale and 8 bits each, Q4_0 by one scale and 4
    bits each. Raises `UserError` where f16 is too narrow.
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    if kind == "f16":
        tensor = cast(name, tensor, torch.float16)
        found: Numbers = tensor.contiguous().numpy()
        return found
    quantised: Numbers = quantize(as_float32(tensor).numpy(), GGMLQuantizationType[kind.upper()])
    return quantised


def _type_of(place: Place, spec: TensorSpec, kind: str) -> str:
    if len(spec.shape) < 2:
        return "f32"
    if kind in ("q8_0", "q4_0") and spec.shape[-1] % _BLOCK:
        return "f16"
    return "q8_0" if kind == "q4_0" and is_embedding(place) else kind


def _add_metadata(writer: Any, prepared: PreparedGguf, kind: str, name: str) -> None:
    vocabulary, prefix = prepared.vocabulary, ARCHITECTURES[prepared.config.model_type]
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(_FILE_TYPES[kind])
    writer.add_quantization_version(_QUANTISATION_VERSION)
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
