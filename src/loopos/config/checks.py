"""Checks that keys do not contradict each other, shared by all methods.

Each check yields `Problem`s; `effects` and `without_effect` find keys that have no effect.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

from pydantic import BaseModel

from loopos.config.diagnostics import Problem
from loopos.config.paths import NEW_WEIGHTS, is_bare_weights
from loopos.config.sections import LoraSection, TrainingSection
from loopos.config.variants import LOSSES

_NOT_TEXT_ENCODINGS = ("idna", "punycode", "unicode_escape", "raw_unicode_escape", "undefined", "mbcs", "oem")
"""Python codecs that escape text or depend on the machine."""
SIZES = ("d_model", "num_heads", "num_layers", "d_ff", "vocab_size")


class ModelSizes(Protocol):
    """The sizes under `model`; None if the config does not set one."""

    @property
    def d_model(self) -> int | None: ...
    @property
    def num_heads(self) -> int | None: ...
    @property
    def num_layers(self) -> int | None: ...
    @property
    def d_ff(self) -> int | None: ...
    @property
    def vocab_size(self) -> int | None: ...
    @property
    def num_key_value_heads(self) -> int | None: ...


def same_path(one: str, other: str) -> bool:
    """Whether two paths name the same file or folder."""
    return os.path.realpath(one.replace("\0", "")) == os.path.realpath(other.replace("\0", ""))


def check_sizes(model: ModelSizes, *, is_new: bool) -> Iterator[Problem]:
    """Check that the sizes fit each other; `is_new`: the weights are initialized from them."""
    heads, key_heads = model.num_heads, model.num_key_value_heads
    if model.d_model is not None and heads is not None and model.d_model % heads:
        expected = f"a multiple of num_heads ({heads})"
        lower = model.d_model // heads * heads
        hint = f"write {lower} or {lower + heads}" if lower else f"write {heads}"
        yield Problem(("model.d_model", "model.num_heads"), str(model.d_model), expected, hint)
    elif is_new and model.d_model is not None and heads is not None and model.d_model // heads % 2:
        actual = f"{model.d_model}, which gives {heads} heads of {model.d_model // heads} features"
        yield Problem(
            ("model.d_model", "model.num_heads"), actual, "an even number per head (rotary embeddings rotate pairs)"
        )
    if heads is not None and key_heads is not None and heads % key_heads:
        fields = ("model.num_key_value_heads", "model.num_heads")
        yield Problem(fields, str(key_heads), f"a divisor of num_heads ({heads})")


def check_weights_and_sizes(model: ModelSizes, weights: str, tokenizer: str | None) -> Iterator[Problem]:
    """`check_sizes`, and the sizes and tokenizer that new or bare weights need."""
    yield from check_sizes(model, is_new=weights == NEW_WEIGHTS)
    missing = [name for name in SIZES if getattr(model, name) is None]
    if missing and (weights == NEW_WEIGHTS or is_bare_weights(weights)):
        actual = f'no {", ".join(missing)} with "{weights}"'
        fields = ("model", "data.pretrained_weights", *(f"model.{name}" for name in missing))
        message = (
            f"{actual}: {'new weights' if weights == NEW_WEIGHTS else 'weights in a bare file'} need all five sizes"
        )
        yield Problem(fields, message, "", f"set {', '.join(f'model.{name}' for name in missing)}")
    if weights == NEW_WEIGHTS and tokenizer is None:
        hint = 'for example "tokenizer": "smollm2-135m"'
        yield Problem(("data.tokenizer", "data.pretrained_weights"), 'nothing with "new" weights', "a tokenizer", hint)


def check_trainable(training: TrainingSection, num_layers: int | None, adapter: str | None = None) -> Iterator[Problem]:
    """Check frozen layers and adapters. adapter: the one that trains on."""
    frozen, trainable, unfreeze = training.freeze_layers, training.trainable, training.unfreeze_step
    if trainable in ("head", "lora") and frozen > 0:
        fields = ("training.freeze_layers", "training.trainable")
        actual = f"{frozen} with trainable {trainable}"
        yield Problem(fields, actual, "0, or trainable all", f"{trainable} already freezes every pretrained weight")
    if trainable == "head" and training.lora is not None:
        fields = ("training.lora", "training.trainable")
        yield Problem(fields, "adapters with trainable head", 'no lora section, or "trainable": "lora"')
    if num_layers is not None and frozen > num_layers:
        actual = f"{frozen} of {num_layers} layers"
        yield Problem(("training.freeze_layers", "model.num_layers"), actual, f"at most num_layers ({num_layers})")
    if training.keep_zeros and trainable == "lora":
        fields = ("training.keep_zeros", "training.trainable")
        hint = "adapters fill the zeros when they are merged"
        yield Problem(fields, "true with trainable lora", "trainable all, or keep_zeros false", hint)
    if unfreeze is not None and frozen == 0:
        fields = ("training.unfreeze_step", "training.freeze_layers")
        yield Problem(fields, f"{unfreeze} with freeze_layers 0", "freeze_layers of at least 1, or null")
    if unfreeze is not None and training.max_steps is not None and unfreeze >= training.max_steps:
        fields = ("training.unfreeze_step", "training.max_steps")
        yield Problem(fields, str(unfreeze), f"a step before max_steps ({training.max_steps})")
    if training.lora is not None:
        yield from _check_lora(training.lora)
    if adapter is not None and trainable != "lora":
        hint = "to train on top of it, name it in data.pretrained_weights"
        fields = ("data.adapter", "training.trainable")
        yield Problem(fields, f"an adapter with trainable {trainable}", 'trainable "lora"', hint)
    if adapter is not None and training.lora is not None:
        for key in _OF_THE_FOLDER:
            if (value := getattr(training.lora, key)) != LoraSection.model_fields[key].default:
                fields = (f"training.lora.{key}", "data.adapter")
                yield Problem(fields, f"{json.dumps(value)} with data.adapter", "no such key: the adapter has its own")


def check_new_tokens(plain: list[str], special: list[str]) -> Iterator[Problem]:
    """Check that a token is named once."""
    seen: set[str] = set()
    for key, tokens in (("new_tokens", plain), ("new_special_tokens", special)):
        for token in tokens:
            if token in seen:
                yield Problem((f"data.{key}",), f"{json.dumps(token, ensure_ascii=False)} twice", "each token once")
            seen.add(token)


# What an adapter's folder decides; dropout and the rate of B are the run's.
_OF_THE_FOLDER = (
    "rank", "alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
    "init_lora_weights",
)  # fmt: skip
_STARTS = 'true, "gaussian", "pissa", "pissa_niter_N" or "olora"'
# Starts that peft has too → why they are refused.
_OTHER_STARTS = {
    "loftq": "it repairs the error of quantized weights, and quantized weights cannot be trained here",
    "eva": "it needs activations of training rows before the run",
    "corda": "it needs activations of training rows before the run",
    "lora_ga": "it needs gradients of training rows before the run",
    "orthogonal": "B·A is zero only to rounding, so the adapters would change the model before they train",
    "mica": "it freezes B",
}


def _check_lora(lora: LoraSection) -> Iterator[Problem]:
    """Check expressions and the start of the adapters."""
    for key in ("target_modules", "exclude_modules"):
        if isinstance(text := getattr(lora, key), str) and text != "all-linear":
            yield from _check_pattern(f"training.lora.{key}", text, is_whole=True)
    for key in ("rank_pattern", "alpha_pattern"):
        for text in getattr(lora, key):
            yield from _check_pattern(f"training.lora.{key}", text, is_whole=False)
    start = lora.init_lora_weights
    if isinstance(start, str) and re.fullmatch(r"gaussian|olora|pissa(_niter_[1-9]\d*)?", start) is None:
        hint = _OTHER_STARTS.get(start.lower(), "")
        yield Problem(("training.lora.init_lora_weights",), f'"{start}"', _STARTS, hint)


def _check_pattern(field: str, text: str, *, is_whole: bool) -> Iterator[Problem]:
    """Check a regular expression. is_whole: it matches whole names, so that a bare name would match no layer."""
    if is_whole and re.fullmatch(r"[\w, ]+", text):
        names = json.dumps([name.strip() for name in text.split(",")])
        default = '"all-linear", ' if field.endswith("target_modules") else ""
        yield Problem((field,), f'"{text}"', f'{default}a list of names, or a regular expression such as ".*q_proj"',
                      f"write a list: {names}")  # fmt: skip
        return
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as problem:
        yield Problem((field,), f'"{text}"', f"a regular expression ({problem})")


def check_loss(field: str, name: str, method: str) -> Iterator[Problem]:
    """Check that a loss is one of this method."""
    if method not in LOSSES[name].methods:
        yield Problem((field,), f'"{name}", a loss of {" and ".join(LOSSES[name].methods)}', f"a loss of {method}")


def check_no_head(training: TrainingSection) -> Iterator[Problem]:
    """Refuse `trainable: head` for methods whose models have no head."""
    if training.trainable == "head":
        hint = "a language model has no separate head"
        yield Problem(("training.trainable",), '"head"', '"all" or "lora"', hint)


def check_steps(training: TrainingSection) -> Iterator[Problem]:
    """Check warmup and schedule against the number of steps."""
    warmup, max_steps = training.warmup, training.max_steps
    fields: tuple[str, ...]
    if isinstance(warmup, int) and max_steps is not None and warmup >= max_steps:
        fields = ("training.warmup", "training.max_steps")
        yield Problem(
            fields, f"{warmup} steps", f"fewer than max_steps ({max_steps})", "or a fraction of all steps, such as 0.1"
        )
    if training.schedule == "warmup_stable_decay" and isinstance(warmup, float) and warmup + training.decay_share > 1:
        fields = ("training.warmup", "training.decay_share", "training.schedule")
        actual = f"a warmup of {warmup} and a decay of {training.decay_share}"
        yield Problem(fields, actual, "fractions that sum to at most 1")
    if training.schedule == "cosine_restarts" and max_steps is not None and training.num_cycles > max_steps:
        fields = ("training.num_cycles", "training.max_steps", "training.schedule")
        yield Problem(fields, str(training.num_cycles), f"at most max_steps ({max_steps})")


def check_optimizer(training: TrainingSection) -> Iterator[Problem]:
    """Refuse keys that the chosen optimizer or device does not support."""
    if training.momentum > 0 and training.optimizer not in ("sgd", "muon"):
        fields = ("training.momentum", "training.optimizer")
        actual = f"{training.momentum} with optimizer {training.optimizer}"
        hint = "" if training.optimizer == "adafactor" else "its first decay is betas[0]"
        yield Problem(fields, actual, "0, or optimizer sgd or muon", hint)
    if training.precision == "fp16" and training.device in ("cpu", "mps"):
        fields = ("training.precision", "training.device")
        yield Problem(fields, f"fp16 with device {training.device}", "auto, fp32 or bf16", "only CUDA trains in fp16")


def check_validation(training: TrainingSection, *, has_validation: bool) -> Iterator[Problem]:
    """Refuse keys that need validation if there is none; `has_validation`: there are validation rows."""
    cause: tuple[str, ...]
    if training.export_start and not (training.validate_at_start and training.keep_best):
        cause = tuple(f"training.{name}" for name in ("validate_at_start", "keep_best") if not getattr(training, name))
        fields = ("training.export_start", *cause)
        hint = "the start is exported only if it was validated, saved and the best"
        yield Problem(fields, "true", "false, or validate_at_start and keep_best true", hint)
    if has_validation and training.validate_every != "never":
        return
    if has_validation:
        reason, cause = 'validate_every "never"', ("training.validate_every",)
    else:
        reason = "no validation rows"
        cause = ("data.validation_share", "data.validation_data", "data.validation_split")
    expected = "validation rows (validation_data or validation_share) and validate_every"
    if training.early_stopping is not None:
        yield Problem(("training.early_stopping", *cause), f"early stopping with {reason}", expected)
    if training.export_start:
        yield Problem(("training.export_start", *cause), f"true with {reason}", f"{expected}, or false")
    if training.schedule == "plateau":
        yield Problem(("training.schedule", *cause), f'"plateau" with {reason}', f"{expected}, or another schedule")


def check_source(names: Mapping[str, str | None]) -> Iterator[Problem]:
    """Check that exactly one of two alternative keys of `data` is set; the first is the usual one."""
    fields = tuple(f"data.{name}" for name in names)
    actual = [name for name, value in names.items() if value is not None]
    if not actual:
        first = next(iter(names))
        yield Problem(fields, "nothing", "the rows to train on", f'add "{first}" to data')
    elif len(actual) > 1:
        fields = tuple(f"data.{name}" for name in reversed(list(names)))
        yield Problem(fields, f"{' and '.join(actual)}", "one of the two", "both name the rows to train on")


def check_reading(
    *, streaming: bool, max_rows: int | None, columns: Iterable[tuple[str, str | None]], encoding: str | None
) -> Iterator[Problem]:
    """Refuse a stream without an end, a column with two roles, and an unknown encoding.

    `columns` holds (role, column) pairs; None means no column.
    """
    if encoding is not None and not is_text_encoding(encoding):
        expected = 'the name of a text encoding, such as "utf-8", "cp1252" or "shift_jis"'
        yield Problem(("data.encoding",), f'"{encoding}"', expected)
    if streaming and max_rows is None:
        fields = ("data.streaming", "data.max_rows")
        yield Problem(fields, "true without data.max_rows", "data.max_rows", "the length of a stream is not known")
    roles: dict[str, str] = {}
    for role, column in columns:
        if column in roles:
            actual = f'"{column}", which already has the role {roles[column]}'
            yield Problem((f"data.columns.{role}",), actual, "one role per column")
        if column is not None:
            roles[column] = role


def is_text_encoding(name: str) -> bool:
    """Whether Python has a text encoding of this name; transformations such as base64 or punycode do not count."""
    try:
        found = codecs.lookup(name)
        return found.name.replace("-", "_") not in _NOT_TEXT_ENCODINGS and isinstance("a".encode(name), bytes)
    except (LookupError, UnicodeError, ValueError):
        return False


def effects(training: TrainingSection) -> dict[str, tuple[bool, str]]:
    """Keys of `training` that may have no effect → whether they have one, and the reason if not."""
    schedule, optimizer = training.schedule, training.optimizer
    reason = f"the schedule is {schedule}"
    return {
        "training.keep_zeros": (training.trainable != "head", "the pruned weights do not train"),
        "training.lora": (training.trainable == "lora", f"trainable is {training.trainable}"),
        "training.betas": (optimizer in ("adam", "adamw", "muon"), f"the optimizer is {optimizer}"),
        "training.num_cycles": (schedule == "cosine_restarts", reason),
        "training.decay_share": (schedule == "warmup_stable_decay", reason),
        "training.minimum_ratio": (schedule not in ("constant", "inverse_sqrt"), reason),
        "training.plateau_factor": (schedule == "plateau", reason),
        "training.plateau_patience": (schedule == "plateau", reason),
    }


def without_effect(config: BaseModel, has_effect: Mapping[str, tuple[bool, str]]) -> list[str]:
    """A note for each key of `has_effect` ("section.key") that is changed from its default without effect."""
    notes = []
    for field, (effective, reason) in has_effect.items():
        section, key = field.split(".")
        values = getattr(config, section)
        if values is None or effective or getattr(values, key) == type(values).model_fields[key].default:
            continue
        notes.append(f"{field} has no effect: {reason}")
    return notes
