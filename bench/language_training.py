"""Training of a language model side by side with TRL's SFTTrainer: same model, tokens, trained tokens, batch, steps, learning rate and schedule.

    python bench/language_training.py [--data FILE] [--rounds 2] [--steps 12] [--cases loopos,trl-defaults,...]

Tokens are real (non-pad) tokens. Rows are made by LoopOS's own encoder and given to TRL as token ids with a completion mask, in one order. Without --data they are
plain text of log-normal length (median 120, at most 512 tokens) joined from the packaged demo messages, every token trained. --save FOLDER keeps the trained
models (FOLDER/CASE). Needs the extra bench.
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
LONGEST = 512


def config_of(case: str, options: argparse.Namespace, folder: str) -> Any:
    from loopos.config.chain_of_thought import ChainOfThoughtConfig

    training = {"learning_rate": options.learning_rate, "batch_size": options.batch, "num_epochs": 100, "max_steps": options.steps, "schedule": options.schedule,
                "warmup": options.warmup, "validate_every": "never", "save_every": "never", "keep_best": False, "max_length": LONGEST, "log_every": 1}  # fmt: skip
    data = {
        "pretrained_weights": options.model,
        "reasoning_examples": options.data,
        "validation_share": 0.0,
        "output_dir": folder,
    }
    if CASES[case].get("trainable") == "lora":
        training |= {"learning_rate": options.lora_learning_rate, "lora": {"rank": 16, "alpha": 32}}
    method = {"mode": "posttraining", "method": "chain_of_thought"}
    return ChainOfThoughtConfig.model_validate(
        {"computation": method, "training": {**training, **CASES[case]}, "data": data}
    )


def log_normal_rows(number: int) -> list[dict[str, str]]:
    """Packaged messages joined until they have about so many tokens, seeded."""
    messages = [
        row["text"] for row in bench.rows_of(str(resources.files("loopos.demo").joinpath("intents_train.jsonl")))
    ]
    draw, rows = random.Random(0), []
    for _ in range(number):
        words = 0.75 * min(draw.lognormvariate(4.787, 0.6), LONGEST)
        told: list[str] = []
        while sum(len(message.split()) for message in told) < words:
            told.append(draw.choice(messages))
        rows.append({"text": " ".join(" ".join(told).split()[: max(4, int(words))])})
    return rows


def run_loopos(case: str, options: argparse.Namespace) -> dict[str, Any]:
    from loopos.methods.chain_of_thought import ChainOfThought
    from loopos.training.progress import RunProgress

    with tempfile.TemporaryDirectory() as folder:
        place = f"{options.save}/{case}" if options.save else f"{folder}/run"
        ChainOfThought(config_of(case, options, place), progress=RunProgress(quiet=True)).train()
        steps = bench.steps_of(place)
    return {
        "tokens_per_second": bench.rate_of(bench.tokens_of(steps), [step["timing"]["seconds"] for step in steps]),
        "losses": [step["metrics"]["loss"] for step in steps],
        "gradient_norms": [step["metrics"]["gradient_norm"] for step in steps],
    }


def rows_in_order(options: argparse.Namespace) -> list[tuple[list[int], list[int]]]:
    """Token ids and trained-token masks of LoopOS's rows, in the order in which it trains on them."""
    from loopos.data.batches import PackedRows, StepBatches
    from loopos.methods.chain_of_thought import ChainOfThought
    from loopos.training.progress import RunProgress

    with tempfile.TemporaryDirectory() as folder:
        encoder = ChainOfThought(config_of("loopos", options, folder), progress=RunProgress(quiet=True))
        encoder.load_data()
        order = StepBatches.of(encoder.config.training, PackedRows(encoder.train_rows), rank=0, world=1).order(0)
        drawn = [encoder.train_rows[place] for place in order]
    rows = [(list(row.ids), [int(weight > 0) for weight in row.weights or ()]) for row in drawn]
    for _, mask in rows:
        mask[0] = int(all(mask[1:]))
    return rows


def run_trl(case: str, options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    rows = rows_in_order(options)
    dataset = Dataset.from_dict({"input_ids": [ids for ids, _ in rows], "completion_mask": [mask for _, mask in rows]})
    place = bench.folder_of(options.model)
    weights = getattr(torch, CASES[case].get("weights", "float32"))
    model = AutoModelForCausalLM.from_pretrained(place, dtype=weights)
    counted: list[int] = []

    class InOrder(SFTTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            mask = inputs.get("attention_mask")
            counted.append(int(mask.sum() if mask is not None else inputs["input_ids"].numel()))
            return super().training_step(model, inputs, *rest, **named)

    clock, tokenizer = bench.clock(), AutoTokenizer.from_pretrained(place)
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            folder,
            per_device_train_batch_size=options.batch,
            max_steps=options.steps,
            max_length=LONGEST,
            completion_only_loss=True,
            **{"bf16": False, **bench.trainer_settings(CASES[case], options)},
        )
        adapter = bench.adapter_of(CASES[case], "CAUSAL_LM")
        trainer = InOrder(
            model, arguments, train_dataset=dataset, processing_class=tokenizer, callbacks=[clock], peft_config=adapter
        )
        trainer.train()
        if options.save:
            trainer.model.save_pretrained(f"{options.save}/{case}")
            tokenizer.save_pretrained(f"{options.save}/{case}")
    told = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "tokens_per_second": bench.rate_of(counted, clock.seconds),
        "losses": [entry["loss"] for entry in told],
        "gradient_norms": [entry["grad_norm"] for entry in told],
    }


def main() -> None:
    defaults = {
        "data": "",
        "save": "",
        "steps": 12,
        "batch": 8,
        "warmup": 0,
        "learning_rate": 5e-5,
        "lora_learning_rate": 5e-5,
    }
    options = bench.parser(__doc__, {**defaults, "cases": "loopos,trl-defaults,trl-best"}).parse_args()  # fmt: skip
    if options.child:
        run = run_loopos if options.child.startswith("loopos") else run_trl
        bench.measured(options.child, partial(run, options.child, options))
        return
    with tempfile.TemporaryDirectory() as folder:
        if not options.data:
            options.data = f"{folder}/rows.jsonl"
            lines = [json.dumps(row) + "\n" for row in log_normal_rows(options.steps * options.batch)]
            Path(options.data).write_text("".join(lines), encoding="utf-8")
        bench.take_turns(__file__, CASES, options, rate="tokens_per_second")


if __name__ == "__main__":
    main()
