"""Training of a reward model side by side with TRL's RewardTrainer: same model, comparisons, batch, steps, learning rate and schedule.

    python bench/preferences.py [--data FILE] [--test FILE] [--rounds 2] [--steps 12] [--cases loopos,trl-best,...]

Each case runs in a process of its own, since allocator and thread settings are fixed when a process starts; cases take turns (A B A B). One JSON line a case and
round, then one line a case with medians and the ratio to LoopOS. Rates are comparisons a second and tokens a second of both whole conversations, prompt and response,
without pads, whether or not a prompt was computed once for both; a rate leaves out the first fifth of the steps. Rows are texts of prompt, chosen and rejected; TRL gets
them as messages, which its tokenizer's chat template writes. Without --data they are the packaged replies. --epochs instead of --steps trains whole passes, and --test
adds the pair accuracy on that file. Needs the extra bench.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import resources
from pathlib import Path
from typing import Any

from loopos.cli.process import MEMORY_SETTINGS, THREAD_SETTINGS

CASES: dict[str, dict[str, Any]] = {
    "loopos": {},
    "loopos-lora": {"trainable": "lora"},
    "trl-defaults": {},
    "trl-bf16": {"bf16": True, "gradient_checkpointing": False, "allocator": True},
    # What a knowledgeable user would set: half-precision weights, no recomputation, the allocator that keeps freed memory.
    "trl-best": {"weights": "bfloat16", "gradient_checkpointing": False, "allocator": True},
    "trl-lora-best": {"lora": True, "weights": "bfloat16", "gradient_checkpointing": False, "allocator": True},
}  # fmt: skip
NAMES = (
    "model",
    "data",
    "test",
    "steps",
    "epochs",
    "batch",
    "learning_rate",
    "lora_learning_rate",
    "schedule",
    "warmup",
)


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def rate_of(steps: list[tuple[float, float]]) -> float:
    timed = steps[max(1, len(steps) // 5) :] or steps
    return sum(amount for amount, _ in timed) / sum(seconds for _, seconds in timed)


def config_of(case: str, options: argparse.Namespace, folder: str) -> Any:
    from loopos.config.reward_model import RewardModelConfig

    training = {"learning_rate": options.learning_rate, "batch_size": options.batch, "num_epochs": options.epochs, "schedule": options.schedule,
                "warmup": options.warmup or 0, "validate_every": "never", "save_every": "never", "keep_best": False}  # fmt: skip
    if options.steps:
        training["max_steps"] = options.steps
    if CASES[case].get("trainable") == "lora":
        training |= {
            "trainable": "lora",
            "lora": {"rank": 16, "alpha": 32},
            "learning_rate": options.lora_learning_rate,
        }
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
    from loopos.training.events import read
    from loopos.training.progress import RunProgress

    with tempfile.TemporaryDirectory() as folder:
        method = RewardModelTrainer(config_of(case, options, f"{folder}/run"), progress=RunProgress(quiet=True))
        method.train()
        events = [event for event in read(Path(folder) / "run" / "events.jsonl") if event["event"] == "step"]
        seconds = [event["timing"]["seconds"] for event in events]
        batches, cursor, whole = method.build_fit().batches, Cursor(), []
        for _ in events:
            rows = [method.train_rows[row] for group in batches.rows_of(cursor) for row in group]
            whole.append((len(rows), sum(len(r.prompt) + len(response) for r in rows for response in r.responses)))
            cursor = batches.after(cursor)
        answer: dict[str, Any] = {
            "comparisons_per_second": rate_of([(rows, spent) for (rows, _), spent in zip(whole, seconds, strict=True)]),
            "tokens_per_second": rate_of([(tokens, spent) for (_, tokens), spent in zip(whole, seconds, strict=True)]),
            "peak_gib": peak_gib(),
            "losses": [event["metrics"]["loss"] for event in events],
        }
        if options.test:
            answer["pair_accuracy"] = (
                RewardPredictor.open(f"{folder}/run").score_file(options.test, {}).metrics["pair_accuracy"]
            )
        return answer


def run_trl(case: str, options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl import RewardConfig, RewardTrainer

    settings = dict(CASES[case])
    settings.pop("allocator", None)
    weights, lora = settings.pop("weights", "float32"), settings.pop("lora", False)
    place = folder_of(options.model)
    tokenizer = AutoTokenizer.from_pretrained(place)
    model = AutoModelForSequenceClassification.from_pretrained(place, num_labels=1, dtype=getattr(torch, weights))
    model.config.pad_token_id = tokenizer.pad_token_id

    def dataset(file: str) -> Dataset:
        rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").split("\n") if line]
        said = {
            name: [[{"role": "assistant", "content": row[name]}] for row in rows] for name in ("chosen", "rejected")
        }
        return Dataset.from_dict({"prompt": [[{"role": "user", "content": row["prompt"]}] for row in rows], **said})

    counted: list[tuple[int, int]] = []

    class Clock(TrainerCallback):
        seconds: list[float] = []  # noqa: RUF012 (one trainer a process)
        began = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.began)

    class Counting(RewardTrainer):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            mask = inputs["attention_mask"]
            counted.append((len(mask) // 2, int(mask.sum())))
            return super().training_step(model, inputs, *rest, **named)

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = RewardConfig(
            folder,
            per_device_train_batch_size=options.batch,
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
            **({"bf16": False} if "bf16" not in settings else {}),
            **settings,
        )
        adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS") if lora else None
        trainer = Counting(
            model, arguments, train_dataset=dataset(options.data), processing_class=tokenizer, callbacks=[clock], peft_config=adapter
        )  # fmt: skip
        trainer.train()
        answer: dict[str, Any] = {
            "comparisons_per_second": rate_of(
                [(rows, spent) for (rows, _), spent in zip(counted, clock.seconds, strict=False)]
            ),
            "tokens_per_second": rate_of(
                [(tokens, spent) for (_, tokens), spent in zip(counted, clock.seconds, strict=False)]
            ),
            "peak_gib": peak_gib(),
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        }
        if options.test:
            answer["pair_accuracy"] = trainer.evaluate(dataset(options.test))["eval_accuracy"]
    return answer


def folder_of(model: str) -> str:
    from loopos.models.gguf import converted_folder
    from loopos.models.sources import weights_source

    source = weights_source(model)
    return str(converted_folder(source.path) if source.kind == "gguf" and source.path else source.path or model)


def child(case: str, options: argparse.Namespace) -> None:
    answer = (run_loopos if case.startswith("loopos") else run_trl)(case, options)
    losses = answer.pop("losses")
    answer.update(first_losses=statistics.mean(losses[:5]), last_losses=statistics.mean(losses[-5:]))
    print(json.dumps({"case": case, **answer}), flush=True)


def environment_of(case: str) -> dict[str, str]:
    wants = case.startswith("loopos") or CASES[case].get("allocator")
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **({**MEMORY_SETTINGS, **THREAD_SETTINGS} if wants else {}), **quiet}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", default="")
    parser.add_argument("--test", default="")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--epochs", type=int, default=None)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--lora-learning-rate", type=float, default=4e-4)
    parser.add_argument("--schedule", default="linear")
    parser.add_argument("--warmup", type=float, default=0, help="share of all steps")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cases", default="loopos,trl-best")
    parser.add_argument("--child", default="")
    options = parser.parse_args()
    if options.steps is None:
        options.steps = 0 if options.epochs else 12
    options.epochs = options.epochs or 100
    options.data = options.data or str(resources.files("loopos.demo").joinpath("replies_train.jsonl"))
    if options.child:
        child(options.child, options)
        return
    folder_of(options.model)
    found: dict[str, list[dict[str, Any]]] = {}
    for _, case in itertools.product(range(options.rounds), options.cases.split(",")):
        assert case in CASES, f"no case {case}; cases: {', '.join(CASES)}"
        arguments = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in NAMES]
        done = subprocess.run([sys.executable, __file__, "--child", case, *arguments], env=environment_of(case), stdout=subprocess.PIPE, check=True)  # fmt: skip
        line = done.stdout.decode().strip().splitlines()[-1]
        print(line, flush=True)
        found.setdefault(case, []).append(json.loads(line))
    ours = statistics.median(answer["comparisons_per_second"] for answer in found[options.cases.split(",")[0]])
    for case, answers in found.items():
        middle = {name: statistics.median(a[name] for a in answers) for name in answers[0] if name != "case"}
        told = {"case": case, "median": True, **middle, "first_is_faster_by": ours / middle["comparisons_per_second"]}
        print(
            json.dumps({name: round(value, 4) if isinstance(value, float) else value for name, value in told.items()}),
            flush=True,
        )


if __name__ == "__main__":
    main()
