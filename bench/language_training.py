"""Training of a language model side by side with TRL's SFTTrainer: same model, tokens, trained tokens, batch, steps, learning rate and schedule.

    python bench/language_training.py [--data FILE] [--rounds 2] [--steps 12] [--cases loopos,trl-defaults,...]

Each case runs in a process of its own, since allocator and thread settings are fixed when a process starts; cases take turns (A B A B). One JSON line a case and
round, then one line a case with medians and the ratio to LoopOS. Tokens are real (non-pad) tokens; a rate leaves out the first fifth of the steps. Rows are made
by LoopOS's own encoder and given to TRL as token ids with a completion mask, in one order. Without --data they are plain text of log-normal length (median 120,
at most 512 tokens) joined from the packaged demo messages, every token trained. --save FOLDER keeps the trained models (FOLDER/CASE). Needs the extra bench.
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

CASES: dict[str, dict[str, Any]] = {
    "loopos": {},
    "loopos-fp32": {"precision": "fp32"},
    "loopos-lora": {"trainable": "lora"},
    "trl-defaults": {},
    "trl-bf16": {"bf16": True, "gradient_checkpointing": False},
    "trl-bf16-weights": {"weights": "bfloat16", "gradient_checkpointing": False, "allocator": True},
    # What a knowledgeable user would set: half-precision weights, packed rows, no recomputation, the allocator that keeps freed memory.
    "trl-best": {"weights": "bfloat16", "gradient_checkpointing": False, "packing": True, "allocator": True},
    "trl-lora-defaults": {"lora": True},
    "trl-lora-bf16-weights": {"lora": True, "weights": "bfloat16", "gradient_checkpointing": False, "allocator": True},
    "trl-lora-best": {"lora": True, "weights": "bfloat16", "gradient_checkpointing": False, "packing": True, "allocator": True},
}  # fmt: skip
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
    "OMP_PROC_BIND": "close",
}
LONGEST = 512


def config_of(case: str, options: argparse.Namespace, folder: str) -> Any:
    from loopos.config.chain_of_thought import ChainOfThoughtConfig

    training = {"learning_rate": options.learning_rate, "batch_size": options.batch, "num_epochs": 100, "max_steps": options.steps, "schedule": "linear",
                "warmup": options.warmup, "validate_every": "never", "save_every": "never", "keep_best": False, "max_length": LONGEST, "log_every": 1}  # fmt: skip
    data = {
        "pretrained_weights": options.model,
        "reasoning_examples": options.data,
        "validation_share": 0.0,
        "output_dir": folder,
    }
    if CASES[case].get("trainable") == "lora":
        training["lora"] = {"rank": 16, "alpha": 32}
    method = {"mode": "posttraining", "method": "chain_of_thought"}
    return ChainOfThoughtConfig.model_validate(
        {"computation": method, "training": {**training, **CASES[case]}, "data": data}
    )


def log_normal_rows(number: int) -> list[dict[str, str]]:
    """Packaged messages joined until they have about so many tokens, seeded."""
    text = resources.files("loopos.demo").joinpath("intents_train.jsonl").read_text(encoding="utf-8")
    messages = [json.loads(line)["text"] for line in text.splitlines()]
    draw, rows = random.Random(0), []
    for _ in range(number):
        words = 0.75 * min(draw.lognormvariate(4.787, 0.6), LONGEST)
        told: list[str] = []
        while sum(len(message.split()) for message in told) < words:
            told.append(draw.choice(messages))
        rows.append({"text": " ".join(" ".join(told).split()[: max(4, int(words))])})
    return rows


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def rate_of(steps: list[tuple[int, float]]) -> float:
    timed = steps[max(1, len(steps) // 5) :] or steps
    return sum(tokens for tokens, _ in timed) / sum(seconds for _, seconds in timed)


def run_loopos(case: str, options: argparse.Namespace) -> dict[str, Any]:
    from loopos.methods.chain_of_thought import ChainOfThought
    from loopos.training.events import read
    from loopos.training.progress import RunProgress

    with tempfile.TemporaryDirectory() as folder:
        place = f"{options.save}/{case}" if options.save else f"{folder}/run"
        ChainOfThought(config_of(case, options, place), progress=RunProgress(quiet=True)).train()
        events = [event for event in read(Path(place) / "events.jsonl") if event["event"] == "step"]
        tokens = [0, *(event["metrics"]["tokens"] for event in events)]
        seconds = [event["timing"]["seconds"] for event in events]
        steps = [(after - before, spent) for before, after, spent in zip(tokens, tokens[1:], seconds, strict=False)]
        return {
            "tokens_per_second": rate_of(steps),
            "peak_gib": peak_gib(),
            "losses": [event["metrics"]["loss"] for event in events],
            "gradient_norms": [event["metrics"]["gradient_norm"] for event in events],
        }


def run_trl(case: str, options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from loopos.data.batches import PackedRows, StepBatches
    from loopos.methods.chain_of_thought import ChainOfThought
    from loopos.training.progress import RunProgress

    settings = dict(CASES[case])
    settings.pop("allocator", None)
    weights, lora = settings.pop("weights", "float32"), settings.pop("lora", False)
    with tempfile.TemporaryDirectory() as folder:
        encoder = ChainOfThought(config_of("loopos", options, folder), progress=RunProgress(quiet=True))
        encoder.load_data()
        order = StepBatches.of(encoder.config.training, PackedRows(encoder.train_rows), rank=0, world=1).order(0)
        drawn = [encoder.train_rows[place] for place in order]
        rows = [(row.ids, [int(weight > 0) for weight in row.weights or ()]) for row in drawn]
    for _, mask in rows:
        mask[0] = int(all(mask[1:]))
    dataset = Dataset.from_dict({"input_ids": [ids for ids, _ in rows], "completion_mask": [mask for _, mask in rows]})
    place = folder_of(options.model)
    model = AutoModelForCausalLM.from_pretrained(place, dtype=getattr(torch, weights))
    counted: list[int] = []

    class Clock(TrainerCallback):
        seconds: list[float] = []  # noqa: RUF012 (one trainer a process)
        began = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.began)

    class InOrder(SFTTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            mask = inputs.get("attention_mask")
            counted.append(int(mask.sum() if mask is not None else inputs["input_ids"].numel()))
            return super().training_step(model, inputs, *rest, **named)

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            folder,
            per_device_train_batch_size=options.batch,
            max_steps=options.steps,
            learning_rate=options.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=options.warmup,
            max_length=LONGEST,
            completion_only_loss=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            **({"bf16": False} if "bf16" not in settings else {}),
            **settings,
        )
        adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
        tokenizer = AutoTokenizer.from_pretrained(place)
        trainer = InOrder(
            model, arguments, train_dataset=dataset, processing_class=tokenizer, callbacks=[clock], peft_config=adapter
        )
        trainer.train()
        if options.save:
            trainer.model.save_pretrained(f"{options.save}/{case}")
            tokenizer.save_pretrained(f"{options.save}/{case}")
    told = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "tokens_per_second": rate_of(list(zip(counted, clock.seconds, strict=False))),
        "peak_gib": peak_gib(),
        "losses": [entry["loss"] for entry in told],
        "gradient_norms": [entry["grad_norm"] for entry in told],
    }


def folder_of(model: str) -> str:
    from loopos.models.gguf import converted_folder
    from loopos.models.sources import weights_source

    source = weights_source(model)
    return str(converted_folder(source.path) if source.kind == "gguf" and source.path else source.path or model)


def child(case: str, options: argparse.Namespace) -> None:
    answer = (run_loopos if case.startswith("loopos") else run_trl)(case, options)
    print(json.dumps({"case": case, **answer}), flush=True)


def environment_of(case: str) -> dict[str, str]:
    wants = case.startswith("loopos") or CASES[case].get("allocator")
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **(ALLOCATOR if wants else {}), **quiet}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", default="")
    parser.add_argument("--save", default="")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--cases", default="loopos,trl-defaults,trl-best")
    parser.add_argument("--child", default="")
    options = parser.parse_args()
    if options.child:
        child(options.child, options)
        return
    with tempfile.TemporaryDirectory() as folder:
        if not options.data:
            options.data = f"{folder}/rows.jsonl"
            lines = [json.dumps(row) + "\n" for row in log_normal_rows(options.steps * options.batch)]
            Path(options.data).write_text("".join(lines), encoding="utf-8")
        folder_of(options.model)
        found: dict[str, list[dict[str, Any]]] = {}
        for _, case in itertools.product(range(options.rounds), options.cases.split(",")):
            assert case in CASES, f"no case {case}; cases: {', '.join(CASES)}"
            names = ("model", "data", "save", "steps", "batch", "warmup", "learning_rate")
            arguments = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in names]
            done = subprocess.run([sys.executable, __file__, "--child", case, *arguments], env=environment_of(case), stdout=subprocess.PIPE, check=True)  # fmt: skip
            answer = json.loads(done.stdout.decode().strip().splitlines()[-1])
            print(json.dumps(answer), flush=True)
            found.setdefault(case, []).append(answer)
    ours = statistics.median(answer["tokens_per_second"] for answer in found[options.cases.split(",")[0]])
    for case, answers in found.items():
        rate = statistics.median(answer["tokens_per_second"] for answer in answers)
        peak = max(answer["peak_gib"] for answer in answers)
        print(json.dumps({"case": case, "median": True, "tokens_per_second": rate, "peak_gib": peak, "first_is_faster_by": ours / rate}))  # fmt: skip


if __name__ == "__main__":
    main()
