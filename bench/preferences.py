"""Training of a reward model side by side with TRL's RewardTrainer: same model, comparisons, batch, steps, learning rate and schedule.

    python bench/preferences.py [--data FILE] [--test FILE] [--rounds 2] [--steps 12] [--cases loopos,trl-best,...]

Rates are comparisons a second and tokens a second of both whole conversations, prompt and response, without pads, whether or not a prompt was computed once for
both. Rows are texts of prompt, chosen and rejected; TRL gets them as messages, which its tokenizer's chat template writes. Without --data they are the packaged
replies. --epochs instead of --steps trains whole passes, and --test adds the pair accuracy on that file. Needs the extra bench.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from importlib import resources
from typing import Any

import side_by_side as bench

CASES: dict[str, dict[str, Any]] = {
    "loopos": {},
    "loopos-lora": {"trainable": "lora"},
    "trl-defaults": {},
    "trl-bf16": {"bf16": True, "gradient_checkpointing": False, "allocator": True},
    # What a knowledgeable user would set: half-precision weights, no recomputation, the allocator that keeps freed memory.
    "trl-best": {"weights": "bfloat16", "gradient_checkpointing": False, "allocator": True},
    "trl-lora-best": {"lora": True, "weights": "bfloat16", "gradient_checkpointing": False, "allocator": True},
}  # fmt: skip


def config_of(case: str, options: argparse.Namespace, folder: str) -> Any:
    from loopos.config.reward_model import RewardModelConfig

    training = {"learning_rate": options.learning_rate, "batch_size": options.batch, "num_epochs": options.epochs, "schedule": options.schedule,
                "warmup": options.warmup or 0, "validate_every": "never", "save_every": "never", "keep_best": False}  # fmt: skip
    if options.steps:
        training["max_steps"] = options.steps
    if CASES[case].get("trainable") == "lora":
        adapter = {"trainable": "lora", "lora": {"rank": 16, "alpha": 32}}
        training |= {**adapter, "learning_rate": options.lora_learning_rate}
    return RewardModelConfig.model_validate(
        {
            "computation": {"mode": "posttraining", "method": "reward_model"},
            "training": training,
            "data": {"pretrained_weights": options.model, "preference_data": options.data, "validation_share": 0.0, "output_dir": folder},
            # TRL has no soft labels: every chosen response counts as certainly preferred.
            "reward": {"soft_labels": False},
        }
    )  # fmt: skip


def run_loopos(case: str, options: argparse.Namespace) -> dict[str, Any]:
    from loopos.data.batches import Cursor
    from loopos.evaluation.reward_predictor import RewardPredictor
    from loopos.methods.reward_model import RewardModelTrainer
    from loopos.training.progress import RunProgress

    with tempfile.TemporaryDirectory() as folder:
        method = RewardModelTrainer(config_of(case, options, f"{folder}/run"), progress=RunProgress(quiet=True))
        method.train()
        steps = bench.steps_of(f"{folder}/run")
        seconds = [step["timing"]["seconds"] for step in steps]
        batches, cursor, comparisons, tokens = method.build_fit().batches, Cursor(), [], []
        for _ in steps:
            rows = [method.train_rows[row] for group in batches.rows_of(cursor) for row in group]
            comparisons.append(len(rows))
            tokens.append(sum(len(row.prompt) + len(response) for row in rows for response in row.responses))
            cursor = batches.after(cursor)
        answer: dict[str, Any] = {
            "comparisons_per_second": bench.rate_of(comparisons, seconds),
            "tokens_per_second": bench.rate_of(tokens, seconds),
            **bench.ends_of([step["metrics"]["loss"] for step in steps]),
        }
        if options.test:
            scored = RewardPredictor.open(f"{folder}/run").score_file(options.test, {})
            answer["pair_accuracy"] = scored.metrics["pair_accuracy"]
    return answer


def run_trl(case: str, options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    place = bench.folder_of(options.model)
    tokenizer = AutoTokenizer.from_pretrained(place)
    weights = getattr(torch, CASES[case].get("weights", "float32"))
    model = AutoModelForSequenceClassification.from_pretrained(place, num_labels=1, dtype=weights)
    model.config.pad_token_id = tokenizer.pad_token_id

    def dataset(file: str) -> Dataset:
        rows = bench.rows_of(file)
        summary = {
            name: [[{"role": "assistant", "content": row[name]}] for row in rows] for name in ("chosen", "rejected")
        }
        return Dataset.from_dict({"prompt": [[{"role": "user", "content": row["prompt"]}] for row in rows], **summary})

    comparisons: list[int] = []
    tokens: list[int] = []

    class Counting(RewardTrainer):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            mask = inputs["attention_mask"]
            comparisons.append(len(mask) // 2)
            tokens.append(int(mask.sum()))
            return super().training_step(model, inputs, *rest, **named)

    clock = bench.clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = RewardConfig(
            folder,
            per_device_train_batch_size=options.batch,
            num_train_epochs=options.epochs,
            max_steps=options.steps or -1,
            **{"bf16": False, **bench.trainer_settings(CASES[case], options)},
        )
        adapter, data = bench.adapter_of(CASES[case], "SEQ_CLS"), dataset(options.data)
        trainer = Counting(
            model, arguments, train_dataset=data, processing_class=tokenizer, callbacks=[clock], peft_config=adapter
        )
        trainer.train()
        answer: dict[str, Any] = {
            "comparisons_per_second": bench.rate_of(comparisons, clock.seconds),
            "tokens_per_second": bench.rate_of(tokens, clock.seconds),
            **bench.ends_of([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]),
        }
        if options.test:
            answer["pair_accuracy"] = trainer.evaluate(dataset(options.test))["eval_accuracy"]
    return answer


def main() -> None:
    data = str(resources.files("loopos.demo").joinpath("replies_train.jsonl"))
    defaults = {
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
        options.steps, options.epochs = options.steps or 12, 100
    if options.child:
        run = run_loopos if options.child.startswith("loopos") else run_trl
        bench.measured(options.child, partial(run, options.child, options))
        return
    bench.take_turns(__file__, CASES, options, rate="comparisons_per_second")


if __name__ == "__main__":
    main()
