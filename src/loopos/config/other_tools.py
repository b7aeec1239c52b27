"""Names of methods and keys in other tools, and what they are here.

Enters: the name of a method or a key, as TRL, Axolotl, LLaMA-Factory or a paper has it. Leaves: LoopOS's own name, or a
sentence on what there is instead. Left out: whole configs of other tools (`foreign_configs`).
"""

from __future__ import annotations

from collections.abc import Mapping

METHOD_ALIASES = {"sft": "chain_of_thought"}
"""Other names under which a method may be asked for."""

_SAME_METHOD = {
    "sft": "supervised supervised_fine_tuning supervised_finetuning instruction_tuning instruct chat chat_sft",
    "fine_tuning": "classification classifier classify cls sequence_classification text_classification regression "
    "finetuning finetune",
    "reward_model": "rm reward reward_modeling reward_modelling reward_trainer",
    "autoregressive": "pt pretrain pretraining clm causal_lm language_modeling",
}
METHODS_HERE = {other: name for name, others in _SAME_METHOD.items() for other in others.split()}
"""The name of a method elsewhere → its name here."""
_NOT_HERE = {
    "preference": "dpo ipo kto orpo simpo cpo bco aot apo online_dpo xpo nash_md rrhf",
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
    "training.early_stopping.patience": "early_stopping_patience",
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
    """What there is for a method that another tool calls `name`: the advice, and whether the method exists here under
    another name. None for a name that no tool uses.
    """
    folded = name.lower().replace("-", "_").removesuffix("_trainer").removesuffix("trainer")
    if folded in METHOD_ALIASES:
        return f'write "{folded}"', True
    if folded in METHODS_HERE:
        here = METHODS_HERE[folded]
        mode = ', and "mode": "pretraining"' if here == "autoregressive" else ""
        return f'it is "{here}" here{mode}', True
    upper = name.upper()
    kind = _KINDS.get(folded)
    if kind == "preference":
        return f'{upper} is not available; preferences are learned with "rlhf" ("reward_model", then "ppo")', False
    if kind == "reward":
        return f'{upper} is not available; rewards, a model\'s or of functions, are learned from with "ppo"', False
    if kind == "adapter":
        return 'adapters go with any method: "training": {"trainable": "lora"}', False
    return None
