"""Methods, keys and whole configs of other tools, and their counterparts in LoopOS.

Configs of TRL (transformers' TrainingArguments), Axolotl and LLaMA-Factory are recognized by their keys and translated
as far as there are counterparts (`Translation`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from loopos.config.json_text import MappingNode, Plain, plain

_SAME_METHOD = {
    "sft": "supervised supervised_fine_tuning supervised_finetuning instruction_tuning instruct chat chat_sft",
    "fine_tuning": "classification classifier classify cls sequence_classification text_classification regression "
    "finetuning finetune",
    "dpo": "preference preference_optimization direct_preference_optimization",
    "apo_zero": "apo",
    "slic": "hinge",
    "reward_model": "rm reward reward_modeling reward_modelling reward_trainer",
    "autoregressive": "pt pretrain pretraining clm causal_lm language_modeling",
}
METHODS_HERE = {other: name for name, others in _SAME_METHOD.items() for other in others.split()}
"""The name of a method elsewhere → its name here."""
_NOT_HERE = {
    "preference": "xpo nash_md rrhf",
    "reward": "grpo rloo gspo dapo drgrpo reinforce reinforce++ remax raft",
    "adapter": "lora qlora dora peft adapter",
}
_KINDS = {name: kind for kind, names in _NOT_HERE.items() for name in names.split()}

_NAMES: Mapping[str, str] = {
    "training.learning_rate": "lr",
    "training.num_epochs": "epochs num_train_epochs",
    "training.batch_size": "bs per_device_train_batch_size micro_batch_size train_batch_size",
    "training.gradient_accumulation": "gradient_accumulation_steps grad_accum accumulate",
    "training.warmup": "warmup_steps warmup_ratio",
    "training.schedule": "lr_scheduler lr_scheduler_type scheduler",
    "training.optimizer": "optim",
    "training.epsilon": "eps adam_epsilon",
    "training.weight_decay": "wd",
    "training.max_grad_norm": "grad_clip clip_grad",
    "training.precision": "dtype torch_dtype bf16 fp16",
    "training.validate_every": "eval_steps eval_every eval_strategy evaluation_strategy",
    "training.validate_at_start": "eval_on_start",
    "training.save_every": "save_steps save_strategy",
    "training.log_every": "logging_steps",
    "training.keep_last": "save_total_limit",
    "training.max_length": "max_seq_length max_seq_len sequence_len cutoff_len seq_length",
    "training.trainable": "finetuning_type adapter use_peft",
    "training.lora.rank": "lora_r lora_rank",
    "training.lora.alpha": "lora_alpha",
    "training.lora.dropout": "lora_dropout",
    "training.lora.target_modules": "lora_target lora_target_modules lora_target_linear",
    "training.lora.use_rslora": "use_rslora peft_use_rslora",
    "training.lora.use_dora": "use_dora peft_use_dora",
    "training.lora.init_lora_weights": "init_lora_weights peft_init_lora_weights",
    "training.lora.lora_plus_ratio": "loraplus_lr_ratio lora_plus_ratio",
    "training.early_stopping.patience": "early_stopping_patience",
    "reward.center_rewards": "center_rewards_coefficient centering",
    "model.d_model": "hidden_size n_embd",
    "model.num_heads": "num_attention_heads n_head n_heads",
    "model.num_layers": "num_hidden_layers n_layer n_layers",
    "model.d_ff": "intermediate_size",
    "model.num_classes": "num_labels n_classes",
    "model.labels": "classes class_names label_names",
    "data.pretrained_weights": "model_name_or_path checkpoint weights base_model",
    "data.tokenizer": "tokenizer_name tokenizer_name_or_path tokenizer_config",
    "data.training_data": "train_data train_file dataset dataset_name datasets",
    "data.validation_data": "val_data validation_file eval_dataset test_datasets",
    "data.validation_share": "val_size val_set_size",
    "data.training_split": "dataset_train_split",
    "data.validation_split": "dataset_test_split",
    "data.subset": "dataset_config",
    "data.max_rows": "max_samples",
    "data.train_on": "train_on_inputs assistant_only_loss train_on_prompt",
}
OTHER_KEYS = {other: key for key, others in _NAMES.items() for other in others.split()}
"""A key of another tool → the dotted key here."""


def method_advice(name: str) -> tuple[str, bool] | None:
    """Advice for another tool's method name, and whether LoopOS has the method; None for an unknown name."""
    folded = name.lower().replace("-", "_").removesuffix("_trainer").removesuffix("trainer")
    if folded == "sft":
        return 'write "sft"', True
    if folded in ("online_dpo", "oaif"):
        return 'it is "dpo" here, with the section "online"', True
    if folded in METHODS_HERE:
        here = METHODS_HERE[folded]
        mode = ', and "mode": "pretraining"' if here == "autoregressive" else ""
        return f'it is "{here}" here{mode}', True
    upper = name.upper()
    kind = _KINDS.get(folded)
    if kind == "preference":
        return (
            f'{upper} is not available; learn from preferences with "dpo", or with "rlhf" (a reward model, then PPO)',
            False,
        )
    if kind == "reward":
        return f'{upper} is not available; a policy learns from rewards of a model or of functions with "ppo"', False
    if kind == "adapter":
        return 'adapters go with any method: "training": {"trainable": "lora"}', False
    return None


_SAME_KEYS = {
    key: f"training.{key}"
    for key in ("learning_rate", "num_epochs", "max_steps", "weight_decay", "max_grad_norm", "gradient_checkpointing")
} | {
    "seed": "training.seed",
    "optimizer": "training.optimizer",
    "max_length": "training.max_length",
    "output_dir": "data.output_dir",
    "streaming": "data.streaming",
}
_SIGNS: Mapping[str, str] = {
    "Axolotl": "base_model micro_batch_size sequence_len datasets adapter val_set_size sample_packing "
    "lora_target_linear train_on_inputs dataset_prepared_path flash_attention pad_to_sequence_len load_in_4bit rl",
    "LLaMA-Factory": "stage finetuning_type cutoff_len template dataset lora_target lora_rank dataset_dir do_train "
    "plot_loss overwrite_cache preprocessing_num_workers val_size pref_beta",
    "TRL": "model_name_or_path dataset_name dataset_train_split per_device_train_batch_size num_train_epochs use_peft "
    "lora_r lora_target_modules max_seq_length packing lr_scheduler_type warmup_ratio logging_steps bf16 report_to "
    "gradient_accumulation_steps eval_strategy output_dir learning_rate torch_dtype attn_implementation",
}
_SIGNATURES = {tool: frozenset(signs.split()) for tool, signs in _SIGNS.items()}
_FEWEST_SIGNS = 2
_OPTIONS = {"trust_remote_code": "--trust-remote-code", "resume_from_checkpoint": "--resume", "dataset_dir": "the path"}
"""Keys without a setting here, and the option that replaces them."""
_NOTHING: tuple[object, ...] = (None, False, "", "none", "no", "steps", [], {})
"""Values without effect: their keys need no counterpart."""
_OWN_SECTIONS = ("model", "computation", "training", "data")


@dataclass
class Translation:
    """A translated config: its tool, our method name and sections, old key → new key, and keys without counterpart.

    `advice` says why there is no method, if there is none.
    """

    tool: str
    method: str | None
    advice: str
    config: dict[str, dict[str, Any]] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The translation as text: a config to paste, the keys, and what is left out."""
        lines = []
        if self.method is not None:
            sections = [f'  "{name}": {json.dumps(part, ensure_ascii=False)}' for name, part in self.config.items()]
            lines += ["as a config of LoopOS:", "{", ",\n".join(sections), "}"]
        else:
            lines.append(self.advice)
        if self.keys:
            lines.append("keys: " + ", ".join(f"{key} → {target}" for key, target in self.keys.items()))
        if self.left_out:
            lines.append(f"without counterpart: {', '.join(self.left_out)}")
        return "\n".join(lines)


def tool_of(root: MappingNode) -> str | None:
    """The tool whose keys a config has; None for LoopOS's own configs and unknown keys."""
    if any(name in root.entries for name in _OWN_SECTIONS if isinstance(root.entries.get(name), MappingNode)):
        return None
    counts = {tool: len(signs.intersection(root.entries)) for tool, signs in _SIGNATURES.items()}
    best = max(counts, key=lambda tool: counts[tool])
    return best if counts[best] >= _FEWEST_SIGNS else None


def translated(root: MappingNode, tool: str) -> Translation:
    """Translate a config of `tool`, as far as there are counterparts."""
    values = plain(root)
    assert isinstance(values, dict)
    method, advice = _method_of(values)
    found = Translation(tool, method, advice)
    settings: dict[str, Any] = {}
    for key, value in values.items():
        if key in ("stage", "rl", "reward_model") and method is not None:
            found.keys[key] = "computation.method"
            continue
        if key in _OPTIONS:
            found.keys[key] = _OPTIONS[key]
            continue
        target = _SAME_KEYS.get(key) or OTHER_KEYS.get(key)
        setting = _setting(key, target, value) if target is not None else None
        if setting is None:
            found.left_out += [key] if value not in _NOTHING else []
            continue
        settings.setdefault(*setting)
        found.keys[key] = setting[0]
    if method is None:
        return found
    if settings.get("training.trainable") != "lora":
        settings = {key: value for key, value in settings.items() if not key.startswith("training.lora.")}
    defaults = {
        "computation.mode": "pretraining" if method == "autoregressive" else "posttraining",
        "computation.method": method,
        "training.learning_rate": 1e-5,
        "data.pretrained_weights": "smollm2-135m",
        "data.training_data": "train.jsonl",
        "data.output_dir": "outputs/run",
    }
    if method == "autoregressive":
        del defaults["data.pretrained_weights"]
        settings.pop("data.pretrained_weights", None)
    if method != "sft":
        settings.pop("data.train_on", None)
    for key, value in {**defaults, **settings}.items():
        *path, name = key.split(".")
        section: dict[str, Any] = found.config
        for step in path:
            section = section.setdefault(step, {})
        section[name] = value
    return found


def _method_of(values: Mapping[str, Plain]) -> tuple[str | None, str]:
    """Our method name for a tool's config, or None and the reason."""
    named = values.get("stage") or values.get("rl") or ("reward" if values.get("reward_model") is True else "sft")
    name = str(named)
    advice = method_advice(name)
    folded = METHODS_HERE.get(name.lower())
    if folded is not None:
        return folded, ""
    return (
        (name, "")
        if name in ("sft", "ppo")
        else (None, advice[0] if advice is not None else f"{name} is not available")
    )


def _setting(key: str, target: str, value: Plain) -> tuple[str, Any] | None:
    """Our key and its value; None if the value has no counterpart."""
    convert = _VALUES.get(target)
    result = value if convert is None else convert(key, value)
    return None if result is None else (target, result)


def _schedule(key: str, value: Plain) -> Plain:
    names = {
        "constant_with_warmup": "constant",
        "cosine_with_restarts": "cosine_restarts",
        "reduce_lr_on_plateau": "plateau",
    }
    known = ("constant", "linear", "cosine", "cosine_restarts", "warmup_stable_decay", "plateau", "inverse_sqrt")
    name = names.get(str(value), str(value))
    return name if name in known else None


def _optimizer(key: str, value: Plain) -> Plain:
    text = str(value)
    return next((name for name in ("adamw", "adafactor", "muon", "sgd", "adam") if name in text), None)


def _precision(key: str, value: Plain) -> Plain:
    if key in ("bf16", "fp16"):
        return key if value is True else "auto" if value == "auto" else None
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(str(value), "auto")


def _trainable(key: str, value: Plain) -> Plain:
    return "lora" if value in (True, "lora", "qlora") else "all" if value in (False, "full", "") else None


def _target_modules(key: str, value: Plain) -> Plain:
    if value in (True, "all", "all-linear"):
        return "all-linear"
    if isinstance(value, str):
        return [name.strip() for name in value.split(",")]
    return value if isinstance(value, list) else None


def _interval(key: str, value: Plain) -> Plain:
    if value in ("no", "epoch"):
        return "never" if value == "no" else "epoch"
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _rows(key: str, value: Plain) -> Plain:
    """The first data set in the value. LLaMA-Factory lists several with commas, as files of its data/ folder."""
    first = value[0] if isinstance(value, list) and value else value
    if isinstance(first, dict):
        first = first.get("path")
    if not isinstance(first, str) or not first.strip():
        return None
    name = first.split(",")[0].strip()
    is_registered = key in ("dataset", "eval_dataset") and not set(name) & set("/.")
    return f"data/{name}.json" if is_registered else name


def _fraction(key: str, value: Plain) -> Plain:
    return value if isinstance(value, int | float) and 0 <= value < 1 else None


def _positive(key: str, value: Plain) -> Plain:
    return value if isinstance(value, int | float) and not isinstance(value, bool) and value > 0 else None


def _epochs(key: str, value: Plain) -> Plain:
    return max(1, round(value)) if isinstance(value, int | float) and value > 0 else None


def _warmup(key: str, value: Plain) -> Plain:
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or value < 0
        or (key == "warmup_ratio" and not value)
    ):
        return None
    return float(value) if 0 < value < 1 else int(value) if float(value).is_integer() else None


def _train_on(key: str, value: Plain) -> Plain:
    is_all = value if key in ("train_on_inputs", "train_on_prompt") else not value
    return "all" if is_all else "assistant"


_VALUES: Mapping[str, Callable[[str, Plain], Plain]] = {
    "training.schedule": _schedule,
    "training.optimizer": _optimizer,
    "training.precision": _precision,
    "training.trainable": _trainable,
    "training.lora.target_modules": _target_modules,
    "training.validate_every": _interval,
    "training.save_every": _interval,
    "training.log_every": _interval,
    "training.keep_last": _interval,
    "training.max_steps": _positive,
    "training.learning_rate": _positive,
    "training.max_grad_norm": _positive,
    "training.num_epochs": _epochs,
    "training.warmup": _warmup,
    "training.early_stopping.patience": _positive,
    "data.training_data": _rows,
    "data.validation_data": _rows,
    "data.validation_share": _fraction,
    "data.max_rows": _positive,
    "data.train_on": _train_on,
}
