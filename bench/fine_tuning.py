"""Fine-tuning side by side with transformers' Trainer: same model, rows, batch, steps and learning rate.

    python bench/fine_tuning.py [--data FILE] [--test FILE] [--rounds 2] [--steps 30] [--cases loopos,trainer,...]

Each case runs in a process of its own, since allocator and thread settings are fixed when a process starts; cases take turns (A B A B). One JSON line a case and
round, then one line a case with medians and the ratio to LoopOS. Tokens are real (non-pad) tokens; a rate leaves out the first fifth of the steps.
Without --data the rows are the packaged demo messages, joined in twos and threes to a median of about 25 tokens. With --epochs instead of --steps whole runs
are made, and --test adds the accuracy (or mean absolute error) on that file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import resources
from pathlib import Path
from typing import Any

BATCH = 16
CASES = {
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
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
    "OMP_PROC_BIND": "close",
}


def demo_rows(number: int) -> list[dict[str, Any]]:
    """Packaged messages joined at random, seeded; the label is the first message's."""
    text = resources.files("loopos.demo").joinpath("intents_train.jsonl").read_text(encoding="utf-8")
    messages = [json.loads(line) for line in text.splitlines()]
    draw = random.Random(0)
    rows = []
    for _ in range(number):
        first, *others = draw.choices(messages, k=draw.choice((1, 1, 2, 2, 3)))
        rows.append({"text": " ".join(m["text"] for m in [first, *others]), "label": first["label"]})
    return rows


def _lines(file: str) -> list[str]:
    """Lines ended by line feeds alone: str.splitlines would also cut at separators inside a text."""
    return [line for line in Path(file).read_text(encoding="utf-8").split("\n") if line]


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def rate_of(steps: list[tuple[int, float]]) -> float:
    timed = steps[max(1, len(steps) // 5) :]
    return sum(tokens for tokens, _ in timed) / sum(seconds for _, seconds in timed)


def run_loopos(case: str, options: argparse.Namespace) -> dict[str, Any]:
    from loopos.config.fine_tuning import FineTuningConfig
    from loopos.evaluation.predictor import Predictor
    from loopos.methods.fine_tuning import FineTuner
    from loopos.training.events import read
    from loopos.training.progress import RunProgress

    with tempfile.TemporaryDirectory() as folder:
        training = {"learning_rate": options.learning_rate, "optimizer": "adamw", "batch_size": BATCH, "num_epochs": options.epochs,
                    "validate_every": "never", "save_every": "never", "schedule": options.schedule, "warmup": options.warmup or 0,
                    "head_learning_rate": options.head_learning_rate, **CASES[case]}  # fmt: skip
        if options.steps:
            training["max_steps"] = options.steps
        if CASES[case].get("trainable") == "lora":
            training["learning_rate"] = options.lora_learning_rate
            training["lora"] = {"rank": 16, "alpha": 32}
        config = FineTuningConfig.model_validate(
            {
                "model": {},
                "computation": {"mode": "posttraining", "method": "fine_tuning"},
                "training": training,
                "data": {"pretrained_weights": options.model, "training_data": options.data, "validation_share": 0.0,
                         "output_dir": f"{folder}/run"},
            }
        )  # fmt: skip
        FineTuner(config, progress=RunProgress(quiet=True)).train()
        events = [event for event in read(Path(folder) / "run" / "events.jsonl") if event["event"] == "step"]
        steps, before = [], 0
        for event in events:
            steps.append((event["metrics"]["tokens"] - before, event["timing"]["seconds"]))
            before = event["metrics"]["tokens"]
        answer = {
            "tokens_per_second": rate_of(steps),
            "peak_gib": peak_gib(),
            "losses": [e["metrics"]["loss"] for e in events],
        }
        if options.test:
            measured = Predictor.open(f"{folder}/run").evaluate_file(options.test)
            answer.update(
                {name: measured[name] for name in ("accuracy", "macro_f1", "mae", "pearson") if name in measured}
            )
        return answer


def run_trainer(case: str, options: argparse.Namespace) -> dict[str, Any]:
    import numpy as np
    import torch
    from datasets import Dataset
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    settings = dict(CASES[case])
    settings.pop("allocator", None)
    weights, lora = settings.pop("weights", "float32"), settings.pop("lora", False)
    rows = [json.loads(line) for line in _lines(options.data)]
    regression = isinstance(rows[0]["label"], float)
    names = sorted({row["label"] for row in rows}) if not regression else []
    place = _folder_of(options.model)
    tokenizer = AutoTokenizer.from_pretrained(place)
    model = AutoModelForSequenceClassification.from_pretrained(
        place, num_labels=1 if regression else len(names), dtype=getattr(torch, weights)
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS"))

    def dataset(file: str) -> Dataset:
        read = [json.loads(line) for line in _lines(file)]
        ids = tokenizer([row["text"] for row in read])["input_ids"]
        labels = [row["label"] if regression else names.index(row["label"]) for row in read]
        return Dataset.from_dict({"input_ids": ids, "labels": labels, "attention_mask": [[1] * len(i) for i in ids]})

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.began = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.began)

    class Counting(DataCollatorWithPadding):
        tokens: list[int] = []  # noqa: RUF012 (one trainer a process)

        def __call__(self, features: Any) -> Any:
            batch = super().__call__(features)
            self.tokens.append(int(batch["attention_mask"].sum()))
            return batch

    clock, collator = Clock(), Counting(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=BATCH,
            num_train_epochs=options.epochs,
            max_steps=options.steps or -1,
            learning_rate=options.lora_learning_rate if lora else options.learning_rate,
            lr_scheduler_type=options.schedule,
            warmup_steps=options.warmup,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            **settings,
        )
        trainer = Trainer(
            model, arguments, train_dataset=dataset(options.data), data_collator=collator, callbacks=[clock]
        )
        trainer.train()
        steps = list(zip(collator.tokens, clock.seconds, strict=False))
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        answer: dict[str, Any] = {"tokens_per_second": rate_of(steps), "peak_gib": peak_gib(), "losses": losses}
        if options.test:
            predicted = trainer.predict(dataset(options.test))
            if regression:
                found, truth = predicted.predictions[:, 0], predicted.label_ids
                answer["mae"] = float(np.abs(found - truth).mean())
                answer["pearson"] = float(np.corrcoef(found, truth)[0, 1])
            else:
                answer["accuracy"] = float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())
        return answer


def _folder_of(model: str) -> str:
    from loopos.models.gguf import converted_folder
    from loopos.models.sources import weights_source

    source = weights_source(model)
    return str(converted_folder(source.path) if source.kind == "gguf" and source.path else source.path or model)


def child(case: str, options: argparse.Namespace) -> None:
    answer = (run_loopos if case.startswith("loopos") else run_trainer)(case, options)
    losses = answer.pop("losses")
    answer.update(first_losses=statistics.mean(losses[:5]), last_losses=statistics.mean(losses[-5:]))
    print(json.dumps({"case": case, **answer}), flush=True)


def environment_of(case: str) -> dict[str, str]:
    wants = case.startswith("loopos") or CASES[case].get("allocator")
    return {
        **os.environ,
        **(ALLOCATOR if wants else {}),
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", default="")
    parser.add_argument("--test", default="")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--epochs", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--lora-learning-rate", type=float, default=4e-4)
    parser.add_argument(
        "--head-learning-rate", type=float, default=None, help="LoopOS alone; the Trainer has no such setting"
    )
    parser.add_argument("--schedule", default="constant")
    parser.add_argument("--warmup", type=float, default=0, help="share of all steps")
    parser.add_argument("--cases", default="loopos,trainer-defaults,trainer-bf16,trainer-best")
    parser.add_argument("--child", default="")
    options = parser.parse_args()
    if options.steps is None:
        options.steps = 0 if options.epochs else 30
    options.epochs = options.epochs or 100
    if options.child:
        child(options.child, options)
        return
    with tempfile.TemporaryDirectory() as folder:
        if not options.data:
            options.data = f"{folder}/rows.jsonl"
            Path(options.data).write_text("".join(json.dumps(row) + "\n" for row in demo_rows(960)), encoding="utf-8")
        _folder_of(options.model)
        found: dict[str, list[dict[str, Any]]] = {}
        for _, case in itertools.product(range(options.rounds), options.cases.split(",")):
            assert case in CASES, f"no case {case}; cases: {', '.join(CASES)}"
            names = (
                "model",
                "data",
                "test",
                "steps",
                "epochs",
                "learning_rate",
                "lora_learning_rate",
                "schedule",
                "warmup",
            )
            arguments = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in names]
            if options.head_learning_rate is not None:
                arguments.append(f"--head-learning-rate={options.head_learning_rate}")
            done = subprocess.run([sys.executable, __file__, "--child", case, *arguments], env=environment_of(case), stdout=subprocess.PIPE, check=True)  # fmt: skip
            line = done.stdout.decode().strip().splitlines()[-1]
            print(line, flush=True)
            found.setdefault(case, []).append(json.loads(line))
    ours = statistics.median(answer["tokens_per_second"] for answer in found[options.cases.split(",")[0]])
    for case, answers in found.items():
        middle = {name: statistics.median(a[name] for a in answers) for name in answers[0] if name != "case"}
        told = {"case": case, "median": True, **middle, "loopos_is_faster_by": ours / middle["tokens_per_second"]}
        print(
            json.dumps({name: round(value, 4) if isinstance(value, float) else value for name, value in told.items()}),
            flush=True,
        )


if __name__ == "__main__":
    main()
