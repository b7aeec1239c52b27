"""Saves and loads quantized weights.

    model.safetensors   NAME._weight_qdata  NAME._weight_scale  (NAME._weight_zero_point  NAME._weight_act_pre_scale)
                        and every other tensor under its own name
    config.json         quantization_config

Names, shapes and header metadata are those of torchao 0.18 (Int8Tensor, Int4Tensor), so that transformers'
`from_pretrained` opens the folder if torchao is installed. LoopOS itself does not need torchao.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from loopos.config.diagnostics import UserError
from loopos.models.broken_files import broken_as_user_error, reason_of
from loopos.models.quantized import (
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedWeight,
    is_quantized,
    quantized_layers,
)
from loopos.models.quiet import quiet_libraries
from loopos.models.weight_files import check_sizes, fill, new_model
from loopos.storage.tensor_files import check_readable, require_finite, stored_tensors

WEIGHTS = "model.safetensors"
CODES = "torchao"
"""Whose codes these are, by the config."""
_PARTS = ("qdata", "scale", "zero_point", "act_pre_scale")
_ROUNDED_ROWS = {
    "_type": "QuantizeTensorToInt8Kwargs",
    "_data": {
        "granularity": {"_type": "PerRow", "_data": {"dim": -1}},
        "mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"},
        "reduce_range": False,
    },
}


def save_weights(folder: Path, model: PreTrainedModel) -> None:
    """Writes config and weights, plain or quantized. Raises `UserError` for weights that are not finite, and `OSError`
    or `SafetensorError` when the disk is full.
    """
    for name, tensor in model.state_dict().items():
        require_finite(name, tensor)
    if not is_quantized(model):
        with quiet_libraries():
            model.save_pretrained(folder)
        return
    tensors, first_of = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        # A tied output layer shares the codes of the embedding, which comes first.
        if id(tensor) not in first_of:
            first_of.add(id(tensor))
            tensors[name] = tensor.detach().cpu().contiguous()
    layers = {name: layer for name, layer in quantized_layers(model) if f"{name}._weight_qdata" in tensors}
    described = {name: {"_type": "Tensor"} for name in tensors if "._weight_" not in name}
    described |= {f"{name}.weight": _described(layer) for name, layer in layers.items()}
    header = {name: json.dumps(value) for name, value in described.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, {"format": "pt", "tensor_names": json.dumps(list(described)), **header})
    config = model.config
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    config.quantization_config = _torchao_config(model, layers)
    config.save_pretrained(folder)
    del config.quantization_config
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def holds_codes(config: PreTrainedConfig) -> bool:
    """Whether a config belongs to quantized weights of this kind."""
    return (getattr(config, "quantization_config", None) or {}).get("quant_method") == CODES


def from_quantized(source_name: str, folder: Path, config: PreTrainedConfig, *, causal: bool) -> PreTrainedModel:
    """The headless model, or the causal language model, with the quantized weights of a folder; everything else in
    fp32. Raises `UserError` for codes of another program, and for weights that do not fill the model.
    """
    file = folder / WEIGHTS
    check_readable(file)
    stored = stored_tensors([file])
    with broken_as_user_error(f"{file}: broken", advice="make it again: loopos quantize"):
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
        tensors = load_file(file)
    # The model is first built with plain layers.
    del config.quantization_config
    # A byte contains two 4-bit codes.
    check_sizes(source_name, config, causal=causal, num_tensors=len(stored), num_bytes=2 * file.stat().st_size)
    with no_init_weights():
        model = new_model(config, causal=causal)
    for name, header_entry in _codes_in(source_name, header).items():
        _replace_layer(source_name, model, name, header_entry, tensors)
    output, entry = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[no-untyped-call]
    tied = config.get_text_config().tie_word_embeddings
    if tied and isinstance(output, nn.Linear) and isinstance(entry, QuantizedEmbedding):
        model.set_output_embeddings(entry.as_output())  # type: ignore[no-untyped-call]
    fill(source_name, model, tensors)
    if tied and isinstance(entry, nn.Embedding):
        model.tie_weights()
    model.train(False)
    return model


def _codes_in(source_name: str, header: Mapping[str, str]) -> dict[str, Mapping[str, Any]]:
    """Name of each quantized weight → its header entry."""
    try:
        described = {name: json.loads(header[name]) for name in json.loads(header["tensor_names"])}
        found = {name: header_entry for name, header_entry in described.items() if header_entry["_type"] != "Tensor"}
    except (KeyError, ValueError, TypeError, RecursionError) as problem:
        raise UserError(
            f"{source_name}: the header that describes its quantized weights is missing or broken: {reason_of(problem)}"
        ) from problem
    if other := {header_entry["_type"] for header_entry in found.values()} - {"Int8Tensor", "Int4Tensor"}:
        raise UserError(
            f"{source_name}: codes of the kind {', '.join(sorted(other))}; expected a folder of loopos quantize"
        )
    return found


def _replace_layer(
    source_name: str, model: PreTrainedModel, name: str, header_entry: Mapping[str, Any], tensors: dict[str, Tensor]
) -> None:
    """Replaces the plain layer of weight `name` by a quantized one."""
    stem = name.removesuffix(".weight")
    location = _locate(model, stem)
    if location is None:
        return
    above, last = location
    plain = getattr(above, last)
    parts = {part: tensors.get(f"{stem}._weight_{part}") for part in _PARTS}
    qdata, scale = parts["qdata"], parts["scale"]
    if qdata is None or scale is None:
        raise UserError(f"{source_name}: {name}: a tensor is missing; make it again: loopos quantize")
    # Copied, because kernels need aligned addresses, which a mapped file does not guarantee.
    qdata = qdata.clone()
    layer: QuantizedWeight
    if isinstance(plain, nn.Embedding):
        layer = QuantizedEmbedding(qdata, scale.float())
    else:
        zero, factors = parts["zero_point"], parts["act_pre_scale"]
        layer = QuantizedLinear(
            qdata,
            scale.float(),
            None if zero is None else zero.float(),
            factors=None if factors is None else factors.float(),
            bias=getattr(plain, "bias", None),
            rounds_activations=header_entry["_data"].get("act_quant_kwargs") is not None,
        )
    setattr(above, last, layer)


def _locate(model: PreTrainedModel, stem: str) -> tuple[nn.Module, str] | None:
    """The parent module of a layer and the layer's name in it, with or without the base model's prefix. None for a
    layer that the model lacks, such as a language model's head in a headless model.
    """
    prefix = f"{model.base_model_prefix}."
    for name in (stem, stem.removeprefix(prefix), prefix + stem):
        above, _, last = name.rpartition(".")
        try:
            module = model.get_submodule(above)
        except AttributeError:
            continue
        if isinstance(getattr(module, last, None), nn.Module):
            return module, last
    return None


def _described(layer: QuantizedWeight) -> dict[str, Any]:
    """The header entry of a tensor in torchao's format."""
    names = [part for part in _PARTS if getattr(layer, f"_weight_{part}", None) is not None]
    data: dict[str, Any] = {"block_size": [1, layer.group]}
    if layer.bits == 8:
        rounds = isinstance(layer, QuantizedLinear) and layer.rounds_activations
        data |= {"dtype": {"_type": "torch.dtype", "_data": "bfloat16"}, "reduce_range": False}
        data["act_quant_kwargs"] = _ROUNDED_ROWS if rounds else None
    else:
        data |= {"shape": list(layer.shape), "activation_dtype": {"_type": "torch.dtype", "_data": "bfloat16"}}
    return {"_type": "Int8Tensor" if layer.bits == 8 else "Int4Tensor", "_data": data, "_tensor_data_names": names}


def _torchao_config(model: PreTrainedModel, layers: Mapping[str, QuantizedWeight]) -> dict[str, Any]:
    """The quantization config that transformers reads before it opens the weights."""
    bits, groups = min(layer.bits for layer in layers.values()), {layer.group for layer in layers.values()}
    rounds = any(isinstance(each, QuantizedLinear) and each.rounds_activations for each in layers.values())
    kind = {"Int4WeightOnlyConfig": {"group_size": min(groups)}} if bits == 4 else {"Int8WeightOnlyConfig": {}}
    if rounds:
        kind = {"Int8DynamicActivationInt8WeightConfig": {}}
    [(name, data)] = kind.items()
    quantized = [name for name, _ in quantized_layers(model)]
    plain = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding) and name not in quantized
    ]
    return {
        "quant_method": CODES,
        "quant_type": {"default": {"_type": name, "_version": 2, "_data": data}},
        "modules_to_not_convert": plain or None,
        "include_input_output_embeddings": model.get_input_embeddings() in layers.values(),
        "untie_embedding_weights": False,
    }
