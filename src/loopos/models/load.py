"""Loads the weights of every kind of source: fp32, headless or with the output embedding, with their tokenizer.

`resolve.py` says what a name is, `weight_files.py` reads the files, `folders.py` adds heads and ensembles.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from loopos.config.diagnostics import SettingError, UserError
from loopos.config.sections import LanguageModelSection, ModelSection
from loopos.models.adapter_folder import AdapterFolder, open_adapter_folder
from loopos.models.adapters import continued_folder
from loopos.models.broken_files import BROKEN, reason_of
from loopos.models.config_check import check_config
from loopos.models.folded_adapter import TASKS, embeddings, fold_adapter
from loopos.models.quantized import num_weights
from loopos.models.quantized_folder import from_quantized, holds_codes
from loopos.models.resolve import ModelRef, base_of_adapter, resolve
from loopos.models.task_layout import backbone_config
from loopos.models.tokenizers import open_tokenizer
from loopos.models.weight_files import from_file, from_folder, new_model
from loopos.storage.manifest import check_manifest, checked_meanwhile, is_weights

NUMBER_FORMATS: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# The config's names of sizes → transformers'.
_KEY = "data.pretrained_weights"
_SIZES = {
    "d_model": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "num_layers": "num_hidden_layers",
    "d_ff": "intermediate_size",
    "vocab_size": "vocab_size",
}
# Config keys that depend on transformers or the file's path, not on the weights.
_NOT_OF_THE_WEIGHTS = frozenset({"transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache"})


@dataclass(frozen=True)
class Sizes:
    """The sizes under `model`; None if the config does not set them. `max_length`: the longest sequence that a new
    model has positions for.
    """

    d_model: int | None = None
    num_heads: int | None = None
    num_key_value_heads: int | None = None
    num_layers: int | None = None
    d_ff: int | None = None
    vocab_size: int | None = None
    max_length: int = 2048

    @classmethod
    def of(cls, section: ModelSection | LanguageModelSection, *, max_length: int | None = None) -> Sizes:
        """From a config's `model` section, with positions for at least `max_length` and 2048 tokens."""
        named = {own_name: getattr(section, own_name) for own_name in _SIZES}
        return cls(**named, max_length=max(cls.max_length, max_length or 0))

    def as_transformers(self) -> dict[str, int]:
        """transformers' name → size, for the sizes that are set."""
        return {
            hf_name: getattr(self, own_name)
            for own_name, hf_name in _SIZES.items()
            if getattr(self, own_name) is not None
        }


@dataclass(frozen=True)
class Pretrained:
    """A model in fp32 on CPU and its tokenizer. `summary`: one line about what was loaded. `fingerprint`: identifies
    these weights. `stored`: the number format of the files, by their config; None if it says none.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    summary: str
    fingerprint: str
    stored: torch.dtype | None = None


def load_pretrained(
    source: str | ModelRef,
    *,
    causal: bool = False,
    sizes: Sizes = Sizes(),
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
    quantized: bool = False,
    adapter: str | None = None,
) -> Pretrained:
    """Loads a model: headless, or with `causal` the language model. source: as for `resolve`. quantized: accept
    quantized weights, which cannot be trained. adapter: one that will train on over these weights; it is not loaded
    here, but belongs to summary and fingerprint.

    Raises `UserError` for a missing or broken source, a file that would run code, tensors that are missing or do not
    fit the config, sizes that contradict the weights, and encoder-decoder models.
    """
    if adapter is not None:
        found = continued_folder(adapter)
        under = load_pretrained(
            source, causal=causal, sizes=sizes, tokenizer=tokenizer, trust_remote_code=trust_remote_code
        )
        summary = f"{under.summary}; continues the adapter of {adapter}"
        return replace(under, summary=summary, fingerprint=f"{under.fingerprint} with adapter {found.fingerprint}")
    ref = resolve(source)
    if ref.storage == "adapter":
        return load_adapted(
            open_adapter_folder(ref.name),
            causal=causal,
            sizes=sizes,
            tokenizer=tokenizer,
            trust_remote_code=trust_remote_code,
        )
    if ref.path is not None and ref.path.is_dir() and not (ref.path / "config.json").is_file() and ref.is_ensemble:
        raise SettingError(_KEY, f"{ref.name}: an ensemble, which is several models; expected one: name a member of it")
    with _files_checked(ref):
        config = _config(ref, sizes, trust_remote_code)
        stored = config.dtype if isinstance(config.dtype, torch.dtype) else None
        opened = open_tokenizer(ref, tokenizer, trust_remote_code=trust_remote_code)
        num_rows = config.get_text_config().vocab_size
        if len(opened) > num_rows:
            raise UserError(
                f"the tokenizer has {len(opened)} tokens but the model of {ref.name} only {num_rows} embeddings: "
                "name the tokenizer that belongs to the weights in data.tokenizer"
            )
        if holds_codes(config) and ref.folder is not None and not quantized:
            raise SettingError(
                _KEY,
                f"{ref.name} is quantized: its weights are codes, which cannot be trained or changed; expected the "
                "model that it was made from",
            )
        model = _filled(ref, config, causal=causal, trust_remote_code=trust_remote_code)
        summary = f"{ref.name}: {type(model).__name__}, {num_weights(model):,} parameters"
        return Pretrained(model, opened, summary, fingerprint(model), stored)


def _files_checked(ref: ModelRef) -> AbstractContextManager[None]:
    """A context that raises `UserError` if a file differs from its manifest, where there is one."""
    if (file := ref.weights_file) is not None:
        own = file.name
        return checked_meanwhile(file.parent, of=lambda name: name == own or not is_weights(name))
    if ref.storage == "gguf" and ref.path is not None:
        own = ref.path.name
        check_manifest(ref.path.parent, of=lambda name: name == own)
    return nullcontext() if ref.folder is None else checked_meanwhile(ref.folder)


def _filled(ref: ModelRef, config: PreTrainedConfig, *, causal: bool, trust_remote_code: bool) -> PreTrainedModel:
    """The model of `config` with its weights, by the way that they are stored."""
    if ref.storage == "new":
        return new_model(config, causal=causal)
    if ref.weights_file is not None:
        return from_file(ref, config, causal=causal)
    if ref.folder is not None and holds_codes(config):
        return from_quantized(ref.name, ref.folder, config, causal=causal)
    return from_folder(str(ref.folder or ref.name), config, causal=causal, trust_remote_code=trust_remote_code)


def load_adapted(
    adapter: AdapterFolder,
    *,
    base: str | ModelRef | None = None,
    causal: bool = True,
    sizes: Sizes = Sizes(),
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
) -> Pretrained:
    """An adapter merged into its base, or into the weights that `base` names. Raises `UserError` for an adapter of
    another task or model, and for one that cannot be merged exactly.
    """
    if adapter.task not in TASKS:
        raise UserError(f"{adapter.source}: an adapter of task {adapter.task}; expected one of task CAUSAL_LM")
    is_causal = TASKS[adapter.task]
    if causal and not is_causal:
        raise UserError(
            f"{adapter.source}: an adapter of a model without an output embedding ({adapter.task}), which cannot "
            "generate text; expected one of task CAUSAL_LM"
        )
    named = resolve(base or base_of_adapter(adapter.folder))
    under = load_pretrained(
        named, causal=is_causal, sizes=sizes, tokenizer=tokenizer, trust_remote_code=trust_remote_code
    )
    model = fold_adapter(under.model, adapter)
    own = under.tokenizer
    if tokenizer is None and (adapter.folder / "tokenizer_config.json").is_file():
        own = open_tokenizer(ModelRef(adapter.source, "adapter", adapter.folder), trust_remote_code=trust_remote_code)
    rows = embeddings(model)[0].weight.shape[0]
    if len(own) > rows:
        raise UserError(
            f"{adapter.source}: its tokenizer has {len(own)} tokens, but the model only {rows} embeddings: those of "
            f"{', '.join(own.convert_ids_to_tokens(list(range(rows, len(own)))[:3]))} were not saved with the adapter; "
            "expected an adapter saved with save_embedding_layers=True, or no tokenizer in its folder, so that the "
            "base's is taken"
        )
    if is_causal and not causal:
        assert isinstance(model.base_model, PreTrainedModel)
        model = model.base_model
    size = f"{type(model).__name__}, {num_weights(model):,} parameters"
    summary = f"{adapter.source}: {size}, an adapter folded into {named.name}"
    return Pretrained(model, own, summary, fingerprint(model), under.stored)


def load_config(source: str | ModelRef, *, sizes: Sizes = Sizes(), trust_remote_code: bool = False) -> PreTrainedConfig:
    """Only the architecture, without weights, for dry runs. Raises `UserError`."""
    return _config(resolve(source), sizes, trust_remote_code)


def _config(source: ModelRef, sizes: Sizes, trust_remote_code: bool) -> PreTrainedConfig:
    if source.storage == "new":
        return new_config(sizes)
    if source.storage == "adapter":
        assert source.path is not None
        return _config(resolve(base_of_adapter(source.path)), sizes, trust_remote_code)
    folder = source.folder
    if source.weights_file is not None:
        folder = source.weights_file.parent
        if not (folder / "config.json").is_file():
            return new_config(sizes)
    path = str(folder or source.name)
    if folder is not None:
        check_config(folder / "config.json")
    try:
        config = backbone_config(path) or AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except BROKEN as problem:
        raise SettingError(_KEY, _why(source, problem)) from problem
    assert isinstance(config, PreTrainedConfig)
    _check_config(config, sizes, source.name)
    return config


def new_config(sizes: Sizes) -> LlamaConfig:
    """A Llama-style decoder of these sizes with tied embeddings."""
    missing = [
        own_name for own_name in _SIZES if own_name != "num_key_value_heads" and getattr(sizes, own_name) is None
    ]
    if missing:
        raise UserError(
            f"model: {', '.join(missing)} missing; a new model, or a weights file without config.json beside it, "
            "needs all of them"
        )
    assert sizes.d_model is not None
    assert sizes.num_heads is not None
    config = LlamaConfig.from_dict(
        {
            "num_key_value_heads": sizes.num_heads,
            **sizes.as_transformers(),
            "head_dim": sizes.d_model // sizes.num_heads,
            "max_position_embeddings": sizes.max_length,
            "tie_word_embeddings": True,
        }
    )
    assert isinstance(config, LlamaConfig)
    return config


def _check_config(config: PreTrainedConfig, sizes: Sizes, source_name: str) -> None:
    if config.is_encoder_decoder:
        raise UserError(
            f"{source_name} is an encoder-decoder model ({config.model_type}); expected a causal language model or an "
            "encoder"
        )
    text = config.get_text_config()
    own_name = {hf_name: name for name, hf_name in _SIZES.items()}
    wrong = [
        f"model.{own_name[hf_name]}: got {size}, but the weights have {getattr(text, hf_name)}"
        for hf_name, size in sizes.as_transformers().items()
        if getattr(text, hf_name, size) != size
    ]
    if wrong:
        raise UserError(
            "\n".join([*wrong, f"remove these keys (the weights of {source_name} define them) or choose other weights"])
        )


def _why(source: ModelRef, problem: Exception) -> str:
    first = reason_of(problem)
    if source.storage == "hub":
        return (
            f"{source.name} is neither a file or folder here nor reachable on a hub: {first}\n"
            'use the embedded model ("smollm2-135m"), a local folder, or set HF_TOKEN for a private model'
        )
    return f"cannot read the config of {source.name}: {first}"


def fingerprint(model: PreTrainedModel) -> str:
    """A digest of the architecture and the first values of every tensor, as 16 hexadecimal digits."""
    described = {name: value for name, value in model.config.to_diff_dict().items() if name not in _NOT_OF_THE_WEIGHTS}
    digest = hashlib.sha256(repr(sorted(described.items())).encode())
    for parameter in model.parameters():
        digest.update(parameter.detach().reshape(-1)[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def cast_parameters(model: nn.Module, number_format: torch.dtype) -> None:
    """Casts the parameters, in place. Buffers keep their format: rotary frequencies must stay fp32, as in training.
    Codes of quantized weights stay codes.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(number_format)
