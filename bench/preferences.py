"""Learning from comparisons side by side with TRL: same model, comparisons, order, batch, steps, learning rate and schedule.

    python bench/preferences.py [--method reward_model] [--data FILE] [--test FILE] [--rounds 2] [--steps 12] [--cases loopos,trl-best,...]

--method is reward_model (TRL's RewardTrainer) or dpo (its DPOTrainer). Rates are comparisons a second and tokens a second of both whole conversations, prompt and
response, without pads, whether or not a prompt was computed once for both; "seconds_in_all" is from opening
the weights to the trained model, with the log-probabilities of DPO's reference where they are computed before. Rows are texts of prompt, chosen and rejected; TRL gets them as messages, which its tokenizer's chat template writes. Without --data they are the
packaged replies. --epochs instead of --steps trains whole passes, and --test adds the accuracy on that file. TRL 1.16 ignores padding_free in DPO. Needs the extra
bench.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import side_by_side as bench

CASES: dict[str, dict[str, Any]] = {
    "loopos": {},
    "loopos-fp32": {"precision": "fp32"},
    "loopos-lora": {"trainable": "lora"},
    # The reference computed before the first step, as in the cases below, where LoRA's passes are in the steps otherwise.
    "loopos-lora-cached": {"trainable": "lora", "reference": "cached"},
    "trl-defaults": {},
    "trl-bf16": {"bf16": True, "gradient_checkpointing": False, "allocator": True},
    # What a knowledgeable user would set: half-precision weights, no recomputation, the allocator that keeps freed memory.
    "trl-best": {"weights": "bfloat16", "gradient_checkpointing": False, "allocator": True},
    "trl-lora-best": {"lora": True, "weights": "bfloat16", "gradient_checkpointing": False, "allocator": True},
    # DPO's reference computed before the first step, so that no second model is held.
    "trl-precomputed": {"weights": "bfloat16", "gradient_checkpointing": False, "allocator": True, "precompute_ref_log_probs": True},
    # A processor without bf16 products is quicker in fp32.
    "trl-fp32-precomputed": {"gradient_checkpointing": False, "allocator": True, "precompute_ref_log_probs": True},
    "trl-lora-fp32-precomputed": {"lora": True, "gradient_checkpointing": False, "allocator": True, "precompute_ref_log_probs": True},
    # A step in four parts: less memory for activations.
    "loopos-accumulating": {"gradient_accumulation": 4},
    "trl-fp32-precomputed-accumulating": {"gradient_checkpointing": False, "allocator": True, "precompute_ref_log_probs": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "trl-lora-precomputed": {"lora": True, "weights": "bfloat16", "gradient_checkpointing": False, "allocator": True, "precompute_ref_log_probs": True},
}  # fmt: skip


def method_of(case: str, options: argparse.Namespace, file: str, folder: str) -> Any:
    from loopos.config.preference import PreferenceConfig
    from loopos.config.reward_model import RewardModelConfig
    from loopos.methods.preference import PreferenceTrainer
    from loopos.methods.reward_model import RewardModelTrainer
    from loopos.training.progress import RunProgress

    training = {"learning_rate": options.learning_rate, "batch_size": options.batch, "num_epochs": 1, "shuffle": False, "schedule": options.schedule,
                "warmup": options.warmup or 0, "validate_every": "never", "save_every": "never", "keep_best": False, "log_every": 1}  # fmt: skip
    own = dict(CASES[case])
    reference = {"reference": own.pop("reference")} if "reference" in own else {}
    if own.get("trainable") == "lora":
        training |= {"lora": {"rank": 16, "alpha": 32}, "learning_rate": options.lora_learning_rate}
    is_dpo = options.method == "dpo"
    config = (PreferenceConfig if is_dpo else RewardModelConfig).model_validate(
        {
            "computation": {"mode": "posttraining", "method": options.method},
            "training": {**training, **own},
            "data": {"pretrained_weights": options.model, "preference_data": file, "validation_share": 0.0, "output_dir": folder},
            # TRL has no soft labels: every chosen response counts as certainly preferred.
            "preference" if is_dpo else "reward": {"soft_labels": False, **reference},
        }
    )  # fmt: skip
    return (PreferenceTrainer if is_dpo else RewardModelTrainer)(config, progress=RunProgress(quiet=True))


def rows_in_order(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows that a run meets, in order: --epochs passes over --data, or the rows of --steps steps."""
    rows = bench.rows_of(options.data)
    number = options.steps * options.batch if options.steps else options.epochs * len(rows)
    return list(itertools.islice(itertools.cycle(rows), number))


def run_loopos(case: str, options: argparse.Namespace) -> dict[str, Any]:
    from loopos.evaluation.reward_predictor import RewardPredictor

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows_in_order(options)), encoding="utf-8")
        method, began = method_of(case, options, str(file), f"{folder}/run"), time.perf_counter()
        method.train()
        whole = time.perf_counter() - began
        steps = bench.steps_of(f"{folder}/run")
        seconds = [step["timing"]["seconds"] for step in steps]
        lengths = [sum(len(row.prompt) + len(each) for each in row.responses) for row in method.train_rows]
        groups = [lengths[first : first + options.batch] for first in range(0, len(lengths), options.batch)]
        losses = [step["metrics"]["loss"] for step in steps]
        answer: dict[str, Any] = {
            "comparisons_per_second": bench.rate_of(map(len, groups), seconds),
            "tokens_per_second": bench.rate_of(map(sum, groups), seconds),
            "seconds_in_all": whole,
            **bench.ends_of(losses),
            "losses": losses,
        }
        if options.test and options.method == "reward_model":
            scored = RewardPredictor.open(f"{folder}/run").score_file(options.test, {})
            answer["pair_accuracy"] = scored.metrics["pair_accuracy"]
    return answer


def run_trl(case: str, options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

    is_dpo, place = options.method == "dpo", bench.folder_of(options.model)
    rows, began = rows_in_order(options), time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(place)
    weights = getattr(torch, CASES[case].get("weights", "float32"))
    if is_dpo:
        model = AutoModelForCausalLM.from_pretrained(place, dtype=weights)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(place, num_labels=1, dtype=weights)
    model.config.pad_token_id = tokenizer.pad_token_id

    def dataset(rows: list[dict[str, Any]]) -> Dataset:
        answers = {
            name: [[{"role": "assistant", "content": row[name]}] for row in rows] for name in ("chosen", "rejected")
        }
        return Dataset.from_dict({"prompt": [[{"role": "user", "content": row["prompt"]}] for row in rows], **answers})

    comparisons: list[int] = []
    tokens: list[int] = []

    class Counting(DPOTrainer if is_dpo else RewardTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            mask = inputs["attention_mask"]
            comparisons.append(len(mask) // 2)
            tokens.append(int(mask.sum()))
            return super().training_step(model, inputs, *rest, **named)

    clock = bench.clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (DPOConfig if is_dpo else RewardConfig)(
            folder,
            num_train_epochs=1,
            **{
                "bf16": False,
                "per_device_train_batch_size": options.batch,
                **bench.trainer_settings(CASES[case], options),
            },
        )
        adapter, data = (
            bench.adapter_of(CASES[case], "CAUSAL_LM" if is_dpo else "SEQ_CLS"),
            dataset(rows),
        )
        trainer = Counting(
            model=model,
            args=arguments,
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[clock],
            peft_config=adapter,
        )
        trainer.train()
        whole = time.perf_counter() - began
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        parts = arguments.gradient_accumulation_steps
        counted = ([sum(group) for group in zip(*[iter(each)] * parts, strict=True)] for each in (comparisons, tokens))
        by_comparisons, by_tokens = (bench.rate_of(each, clock.seconds) for each in counted)
        answer: dict[str, Any] = {
            "comparisons_per_second": by_comparisons,
            "tokens_per_second": by_tokens,
            "seconds_in_all": whole,
            **bench.ends_of(losses),
            "losses": losses,
        }
        if options.test and not is_dpo:
            answer["pair_accuracy"] = trainer.evaluate(dataset(bench.rows_of(options.test)))["eval_accuracy"]
    return answer


def main() -> None:
    data = str(resources.files("loopos.demo").joinpath("replies_train.jsonl"))
    defaults = {
        "method": "reward_model",
        "data": data,
        "test": "",
        "steps": 0,
        "epochs": 0,
        "batch": 8,
        "learning_rate": 5e-5,
        "lora_learning_rate": 4e-4,
        "warmup": 0.0,
    }
    options = bench.parser(__doc__, {**defaults, "cases": "loopos,trl-best"}).parse_args()  # fmt: skip
    if not options.epochs:
        options.steps = options.steps or 12
    if options.child:
        run = run_loopos if options.child.startswith("loopos") else run_trl
        bench.measured(options.child, partial(run, options.child, options))
        return
    bench.take_turns(__file__, CASES, options, rate="comparisons_per_second")


if __name__ == "__main__":
    main()
