"""A GGUF file, written tensor by tensor.

Enters: a folder with a language model as safetensors. Leaves: one file that llama.cpp opens, and the types that its
tensors took. Metadata and shapes are known before the first tensor is read, so that one tensor at a time is in memory.
Left out: what the keys mean (`gguf_layout.py`, `gguf_vocabulary.py`).

Types: vectors (norms, biases) are F32. Matrices are of the type that was asked for, but for Q4_0 embeddings are Q8_0:
they are read a row at a time, and their rounding reaches every position. A matrix whose rows do not divide into
blocks of 32 is F16.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from loopos.config.faults import EnvironmentFault
from loopos.deploy.exporting.gguf_layout import (
    ARCHITECTURES,
    Place,
    as_float32,
    check_layout,
    is_embedding,
    metadata,
    places,
)
from loopos.deploy.exporting.gguf_vocabulary import Vocabulary, read_vocabulary
from loopos.deploy.exporting.number_formats import cast
from loopos.evaluation.progress import Tell
from loopos.storage.tensor_files import StoredTensor, folder_tensors, require_finite
from loopos.storage.tensor_format import TensorSpec

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
    """Raises `EnvironmentFault` where the package is not installed."""
    try:
        import gguf  # noqa: F401
    except ModuleNotFoundError as problem:
        raise EnvironmentFault("--format gguf needs the package gguf; run pip install gguf") from problem


def prepare(folder: Path, given: str) -> PreparedGguf:
    """Reads config, tokenizer and the shapes of the weights. Raises `UserError` for a model that GGUF cannot hold."""
    config = AutoConfig.from_pretrained(str(folder))
    check_layout(config, given)
    weights = folder_tensors(folder)
    return PreparedGguf(
        config, read_vocabulary(folder, config.vocab_size, given), weights, places(config, weights, given)
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
