"""Merges a PEFT adapter into its base model, and checks on outputs that the merge is exact."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loopos.config.diagnostics import UserError
from loopos.models.adapter_folder import PREFIX, REPEATED_STARTS, AdapterFolder
from loopos.models.resolve import ADAPTER_CONFIG

if TYPE_CHECKING:
    from collections.abc import Iterator

    from peft import PeftConfig, PeftModel

TASKS: Mapping[str | None, bool] = {None: True, "CAUSAL_LM": True, "FEATURE_EXTRACTION": False}
"""Task of an adapter whose model is known here → whether that is a language model, or one without a head."""
_NAME = "default"
# Exceptions that peft raises for an adapter that it cannot load or merge; it has no type of its own.
_REFUSALS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip
# Relative to the largest output; a merge in fp32 differs by a hundredth of this.
_TOLERANCE = 1e-3
_MOST_PROBED = 64


def fold_adapter(model: PreTrainedModel, adapter: AdapterFolder) -> PreTrainedModel:
    """The model with the adapter merged; `model` itself is consumed. Embeddings are untied if the adapter made them
    differ, and get more rows if the adapter has them. Raises `UserError` for an adapter of another model, and for one
    that cannot be merged exactly.
    """
    _require_known(adapter)
    _resize(model, adapter)
    adapter.check_patterns([name for name, _ in model.named_modules()])
    tied = bool(model.config.get_text_config().tie_word_embeddings)
    with _refused(adapter, "put into"):
        wrapped = _wrapped(model, adapter)
    ids = _probe(model, adapter)
    with _refused(adapter, "run over"):
        expected = _outputs(wrapped, ids)
    _give_each_its_own(wrapped)
    with _refused(adapter, "merged into"), _hushed():
        tuner: Any = wrapped.base_model
        merged = tuner.merge_and_unload(safe_merge=True)
    assert isinstance(merged, PreTrainedModel)
    _tie_again(merged, tied=tied)
    merged.eval()  # type: ignore[no-untyped-call]
    found = _outputs(merged, ids)
    scale, largest = float(expected.abs().max()), float((found - expected).abs().max())
    if not largest <= _TOLERANCE * scale:
        raise UserError(
            f"{adapter.source}: {_described(adapter)}: the merged model differs from base plus adapter: "
            f"outputs differ by {largest:.3g} (largest output {scale:.3g}); it cannot be merged"
        )
    return merged.requires_grad_(True)


def embeddings(model: PreTrainedModel) -> tuple[Any, Any]:
    """The modules of the input and output embedding; None for a missing output embedding."""
    opened: Any = model
    return opened.get_input_embeddings(), opened.get_output_embeddings()


def saved_rows(adapter: AdapterFolder, embedding: str) -> int | None:
    """The number of rows that an adapter has for the embedding of this name; None if it does not change it."""
    key = re.compile(rf"{re.escape(PREFIX + embedding)}(\.token_adapter)?(\.base_layer)?\.weight")
    shapes = (stored.spec.shape for name, stored in adapter.tensors.items() if key.fullmatch(name))
    return next((shape[0] for shape in shapes if len(shape) == 2), None)


def _require_known(adapter: AdapterFolder) -> None:
    """Raises `UserError` for a method or setting that this peft does not know, or that cannot be merged into
    weights.
    """
    from peft import __version__
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    file = adapter.folder / ADAPTER_CONFIG
    kind: Any = PEFT_TYPE_TO_CONFIG_MAPPING.get(adapter.method)  # type: ignore[call-overload]
    if kind is None:
        raise UserError(
            f"{file}: peft_type: got {adapter.method}; expected one that peft {__version__} knows, such as LORA"
        )
    known = {field.name for field in fields(kind)}
    new = [key for key, value in adapter.config.items() if key not in known and value not in (None, False, [], {})]
    if new:
        raise UserError(f"{file}: {new[0]}: no setting of {adapter.method} that peft {__version__} knows; expected an "
                        "adapter of this version of peft, or install a newer one")  # fmt: skip
    start = adapter.config.get("init_lora_weights", True)
    if adapter.method == "LORA" and start not in REPEATED_STARTS:
        raise UserError(
            f"{adapter.source}: init_lora_weights {start}: its change begins at a start that is neither in its folder "
            "nor found again from the base; expected an adapter that peft has turned into plain LoRA: save it with "
            "path_initial_model_for_weight_conversion"
        )
    if adapter.config.get("alora_invocation_tokens"):
        raise UserError(
            f"{adapter.source}: an activated LoRA (alora_invocation_tokens), which changes the model only after some "
            "tokens; expected an adapter that can be merged into weights"
        )


def _wrapped(model: PreTrainedModel, adapter: AdapterFolder) -> PeftModel:
    """The model under the adapter, as `PeftModel.from_pretrained` creates it, with every tensor loaded."""
    from peft import PeftConfig, PeftModel

    config: PeftConfig = PeftConfig.from_pretrained(str(adapter.folder))
    if config.is_prompt_learning or not _merges(config):
        raise UserError(
            f"{adapter.source}: {_described(adapter)}, which changes no weights and so cannot be merged; expected an "
            "adapter such as LoRA"
        )
    config.inference_mode = True
    with _hushed():
        wrapped = PeftModel(model, config, adapter_name=_NAME, autocast_adapter_dtype=False)
        result = wrapped.load_adapter(str(adapter.folder), _NAME, torch_device="cpu", autocast_adapter_dtype=False)
    if result.unexpected_keys:
        raise ValueError(f"it contains {result.unexpected_keys[0]}, which the model does not have")
    if result.missing_keys:
        raise ValueError(f"it lacks {result.missing_keys[0]}")
    return wrapped.eval()


def _merges(config: PeftConfig) -> bool:
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    return hasattr(PEFT_TYPE_TO_TUNER_MAPPING.get(PeftType(config.peft_type)), "merge_and_unload")


@contextmanager
def _refused(adapter: AdapterFolder, what: str) -> Iterator[None]:
    """Turns peft's errors into a `UserError` with the adapter's kind. what: the operation, for the message."""
    try:
        yield
    except _REFUSALS as problem:
        lines = [line.strip() for line in str(problem).splitlines() if line.strip()] or [type(problem).__name__]
        # torch lists the mismatches after a general first line.
        reason = lines[1] if lines[0].startswith("Error(s) in loading") and len(lines) > 1 else lines[0]
        raise UserError(
            f"{adapter.source}: {_described(adapter)} that cannot be {what} {adapter.base}: {reason[:300]}"
        ) from problem


@contextmanager
def _hushed() -> Iterator[None]:
    with warnings.catch_warnings():
        # peft warns about ties and keys; the outputs are compared instead.
        warnings.simplefilter("ignore")
        yield


def _described(adapter: AdapterFolder) -> str:
    features = [each for each in adapter.beyond_lora if not each.startswith(("peft_type", "the tensor"))]
    with_ = f" with {', '.join(features[:3])}" if features else ""
    return f"an adapter of peft_type {adapter.method}{with_}"


def _resize(model: PreTrainedModel, adapter: AdapterFolder) -> None:
    """Resizes the embeddings to the adapter's rows. Raises `UserError` if it has them only for one side."""
    entry, output = embeddings(model)
    names = {id(module): name for name, module in model.named_modules()}
    rows = saved_rows(adapter, names[id(entry)])
    if rows is None or rows == entry.weight.shape[0]:
        return
    tied = output is None or output.weight is entry.weight
    if not tied and saved_rows(adapter, names[id(output)]) != rows:
        raise UserError(
            f"{adapter.source}: brings {rows} rows of {names[id(entry)]} for a model with {entry.weight.shape[0]}, and "
            f"not as many of {names[id(output)]}; expected both: save the adapter with save_embedding_layers=True"
        )
    model.resize_token_embeddings(rows, mean_resizing=False)


def _give_each_its_own(model: nn.Module) -> None:
    """Unties weights, so that a change of one does not affect another."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) in seen:
                setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
            seen.add(id(parameter))


def _tie_again(model: PreTrainedModel, *, tied: bool) -> None:
    """Ties the embeddings if they are still equal; otherwise updates the config."""
    if not tied:
        return
    entry, output = embeddings(model)
    equal = output is None or torch.equal(entry.weight, output.weight)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = equal
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    if equal:
        model.tie_weights()


def _probe(model: PreTrainedModel, adapter: AdapterFolder) -> Tensor:
    """Tokens `[1, T]` from the whole vocabulary, and those that the adapter trains individually."""
    rows = embeddings(model)[0].weight.shape[0]
    trained = adapter.config.get("trainable_token_indices") or adapter.config.get("token_indices") or []
    indices = [each for part in trained.values() for each in part] if isinstance(trained, dict) else list(trained)
    spread = torch.linspace(0, rows - 1, 24).long().tolist()
    chosen = [token for token in [*indices[:16], *spread] if 0 <= token < rows]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _MOST_PROBED
    return torch.tensor([chosen[: min(positions, _MOST_PROBED)]])


@torch.no_grad()
def _outputs(model: Any, ids: Tensor) -> Tensor:
    with _hushed():
        output = model(input_ids=ids)
    found: Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return found
