"""Fine-tuning side by side with transformers' Trainer: same model, rows, batch, steps and learning rate.

    python bench/fine_tuning.py [--data FILE] [--test FILE] [--rounds 2] [--steps 30] [--cases loopos,trainer-best,...]

Tokens are real (non-pad) tokens. Without --data the rows are the packaged demo messages, joined in twos and threes to a median of about 25 tokens. With --epochs
instead of --steps whole runs are made, and --test adds the accuracy (or mean absolute error) on that file.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import side_by_side as bench

BATCH = 16
CASES: dict[str, dict[str, Any]] = {
    "loopos": {},
    "loopos-lora": {"trainable": "lora"},
    "trainer-defaults": {},
    "trainer-bf16": {"bf16": True},
    "trainer-bf16-weights": {"weights": "bfloat16"},
    # What a knowledgeable user would set besides: rows of like length together, and the allocator that keeps freed memory.
    "trainer-best": {"bf16": True, "train_sampling_strategy": "group_by_length", "allocator": True},
    # The same adapters as loopos-lora's, through peft; the head trains beside them.
    "trainer-lora": {"bf16": True, "train_sampling_strategy": "group_by_length", "allocator": True, "lora": True},
    "trainer-best-weights": {"weights": "bfloat16", "train_sampling_strategy": "group_by_length", "allocator": True},
}


def demo_rows(number: int) -> list[dict[str, Any]]:
    """Packaged messages joined at random, seeded; the label is the first message's."""
    messages = bench.rows_of(str(resources.files("loopos.demo").joinpath("intents_train.jsonl")))
    draw = random.Random(0)
    rows = []
    for _ in range(number):
        first, *others = draw.choices(messages, k=draw.choice((1, 1, 2, 2, 3)))
        rows.append({"text": " ".join(m["text"] for m in [first, *others]), "label": first["label"]})
    return rows


def run_loopos(case: str, options: argparse.Namespace) -> dict[str, Any]:
    from loopos.config.fine_tuning import FineTuningConfig
    from loopos.evaluation.predictor import Predictor
    from loopos.methods.fine_tuning import FineTuner
    from loopos.training.progress import RunProgress

    training = {"learning_rate": options.learning_rate, "optimizer": "adamw", "batch_size": BATCH, "num_epochs": options.epochs,
                "validate_every": "never", "save_every": "never", "schedule": options.schedule, "warmup": options.warmup or 0,
                "head_learning_rate": options.head_learning_rate or None, **CASES[case]}  # fmt: skip
    if options.steps:
        training["max_steps"] = options.steps
    if CASES[case].get("trainable") == "lora":
        training |= {"learning_rate": options.lora_learning_rate, "lora": {"rank": 16, "alpha": 32}}
    with tempfile.TemporaryDirectory() as folder:
        data = {"pretrained_weights": options.model, "training_data": options.data, "validation_share": 0.0}
        config = FineTuningConfig.model_validate(
            {
                "computation": {"mode": "posttraining", "method": "fine_tuning"},
                "training": training,
                "data": {**data, "output_dir": f"{folder}/run"},
            }
        )
        FineTuner(config, progress=RunProgress(quiet=True)).train()
        steps = bench.steps_of(f"{folder}/run")
        answer = {
            "tokens_per_second": bench.rate_of(bench.tokens_of(steps), [step["timing"]["seconds"] for step in steps]),
            **bench.ends_of([step["metrics"]["loss"] for step in steps]),
        }
        if options.test:
            metrics = Predictor.open(f"{folder}/run").evaluate_file(options.test)
            told = ("accuracy", "macro_f1", "mae", "pearson")
            answer.update({name: metrics[name] for name in told if name in metrics})
    return answer


def run_trainer(case: str, options: argparse.Namespace) -> dict[str, Any]:
    import numpy as np
    import torch
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    rows = bench.rows_of(options.data)
    regression = isinstance(rows[0]["label"], float)
    names = sorted({row["label"] for row in rows}) if not regression else []
    place = bench.folder_of(options.model)
    tokenizer = AutoTokenizer.from_pretrained(place)
    weights = getattr(torch, CASES[case].get("weights", "float32"))
    model = AutoModelForSequenceClassification.from_pretrained(
        place, num_labels=1 if regression else len(names), dtype=weights
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    adapter = bench.adapter_of(CASES[case], "SEQ_CLS")
    if adapter is not None:
        model = get_peft_model(model, adapter)

    def dataset(file: str) -> Dataset:
        read = bench.rows_of(file)
        ids = tokenizer([row["text"] for row in read])["input_ids"]
        labels = [row["label"] if regression else names.index(row["label"]) for row in read]
        return Dataset.from_dict({"input_ids": ids, "labels": labels, "attention_mask": [[1] * len(i) for i in ids]})

    tokens: list[int] = []

    class Counting(DataCollatorWithPadding):
        def __call__(self, features: Any) -> Any:
            batch = super().__call__(features)
            tokens.append(int(batch["attention_mask"].sum()))
            return batch

    clock = bench.clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=BATCH,
            num_train_epochs=options.epochs,
            max_steps=options.steps or -1,
            **bench.trainer_settings(CASES[case], options),
        )
        data = dataset(options.data)
        trainer = Trainer(model, arguments, train_dataset=data, data_collator=Counting(tokenizer), callbacks=[clock])
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        answer = {"tokens_per_second": bench.rate_of(tokens, clock.seconds), **bench.ends_of(losses)}
        if options.test:
            predicted = trainer.predict(dataset(options.test))
            if regression:
                found, truth = predicted.predictions[:, 0], predicted.label_ids
                answer["mae"] = float(np.abs(found - truth).mean())
                answer["pearson"] = float(np.corrcoef(found, truth)[0, 1])
            else:
                answer["accuracy"] = float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())
    return answer


def main() -> None:
    defaults = {
        "data": "",
        "test": "",
        "steps": 0,
        "epochs": 0,
        "learning_rate": 5e-5,
        "lora_learning_rate": 4e-4,
        "warmup": 0.0,
    }
    parser = bench.parser(__doc__, {**defaults, "cases": "loopos,trainer-defaults,trainer-bf16,trainer-best"})  # fmt: skip
    parser.add_argument("--head-learning-rate", type=float, default=0.0, help="LoopOS's own; the Trainer has none")
    parser.set_defaults(schedule="constant")
    options = parser.parse_args()
    if not options.epochs:
        options.steps, options.epochs = options.steps or 30, 100
    if options.child:
        run = run_loopos if options.child.startswith("loopos") else run_trainer
        bench.measured(options.child, partial(run, options.child, options))
        return
    with tempfile.TemporaryDirectory() as folder:
        if not options.data:
            options.data = f"{folder}/rows.jsonl"
            Path(options.data).write_text("".join(json.dumps(row) + "\n" for row in demo_rows(960)), encoding="utf-8")
        bench.take_turns(__file__, CASES, options, rate="tokens_per_second")


if __name__ == "__main__":
    main()
