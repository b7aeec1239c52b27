"""GRPO side by side with TRL's GRPOTrainer: same model, prompts, reward, responses a prompt, sizes, learning rate.

    python bench/online.py [--rounds 2] [--iterations 6] [--cases loopos,trl-best,...] [--prompts FILE --column COLUMN]

An iteration generates --batch responses, --group to each prompt, scores them and makes one optimizer step, without a KL.
Samples differ, so that rewards are to be compared as curves. Prompts are the packaged messages to a shop (about 40
tokens with the template) or a column of a JSONL file; the reward is how near a response comes to 12 words, at most 1.
Rates are responses and tokens of responses a second. Needs the extra bench.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import side_by_side as bench

_TRL = {"gradient_checkpointing": False, "allocator": True}
CASES: dict[str, dict[str, Any]] = {
    "loopos": {},
    "loopos-lora": {"trainable": "lora", "lora": {"rank": 16, "alpha": 32}},
    "trl-best": {"weights": "bfloat16", **_TRL},
    "trl-lora-best": {"lora": True, "weights": "bfloat16", **_TRL},
    # A processor without bf16 products is quicker in fp32.
    "trl-fp32": _TRL,
    "trl-lora-fp32": {"lora": True, **_TRL},
}
WORDS = 12


def near_twelve_words(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The reward: 1 for a response of 12 words, less 1/12 for each word more or fewer, at least 0."""
    return [max(0.0, 1.0 - abs(len(response.split()) - WORDS) / WORDS) for response in responses]


def prompts_of(options: argparse.Namespace) -> list[str]:
    """Different prompts, as many as the iterations need at most."""
    rows = bench.rows_of(options.prompts or str(resources.files("loopos.demo").joinpath("replies_train.jsonl")))
    number = options.iterations * options.batch // options.group
    return list(dict.fromkeys(row[options.column] for row in rows))[:number]


def run_loopos(case: str, options: argparse.Namespace) -> dict[str, Any]:
    from loopos.config.ppo import PpoConfig
    from loopos.methods.ppo import PpoTrainer
    from loopos.storage.events import read
    from loopos.training.progress import RunProgress

    rate = options.lora_learning_rate if "lora" in CASES[case] else options.learning_rate
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prompts.jsonl"
        file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts_of(options)))
        config = PpoConfig.model_validate(
            {
                "computation": {"mode": "posttraining", "method": "grpo"},
                "training": {
                    "learning_rate": rate, "batch_size": options.batch, "max_iterations": options.iterations,
                    "num_epochs": options.iterations, "inner_epochs": 1, "minibatches": 1, "shuffle": False, "schedule": options.schedule,
                    "validate_every": "never", "save_every": "never", "keep_best": False, "log_every": 1, **CASES[case],
                },
                "generation": {"max_new_tokens": options.new_tokens, "responses_per_prompt": options.group},
                "reward": {"functions": [{"name": "online:near_twelve_words"}]},
                "data": {"pretrained_weights": options.model, "prompts": str(file), "validation_share": 0.0, "output_dir": f"{folder}/run"},
            }
        )  # fmt: skip
        began = time.perf_counter()
        PpoTrainer(config, progress=RunProgress(quiet=True)).train()
        whole = time.perf_counter() - began
        rollouts = [event for event in read(Path(folder) / "run" / "events.jsonl") if event["event"] == "rollout"]
        # A step that begins an iteration has its rollouts in its seconds.
        seconds = [step["timing"]["seconds"] for step in bench.steps_of(f"{folder}/run")]
        timing = {
            name: statistics.median(event["timing"][name] for event in rollouts[1:]) for name in ("generation_seconds",)
        }
        return answer_of(
            options,
            seconds,
            [event["metrics"]["response_length"] for event in rollouts],
            [event["metrics"]["reward"] for event in rollouts],
        ) | {"seconds_in_all": whole, **timing}


def run_trl(case: str, options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    place, began = bench.folder_of(options.model), time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(place)
    model = AutoModelForCausalLM.from_pretrained(place, dtype=getattr(torch, CASES[case].get("weights", "float32")))

    def reward(prompts: Any, completions: Any, **_: Any) -> list[float]:
        return near_twelve_words([], [completion[0]["content"] for completion in completions])

    clock = bench.clock()
    settings = bench.trainer_settings(CASES[case], options)
    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            folder,
            per_device_train_batch_size=options.batch,
            num_generations=options.group,
            max_completion_length=options.new_tokens,
            max_steps=options.iterations,
            steps_per_generation=1,
            num_iterations=1,
            beta=0.0,
            loss_type="grpo",
            scale_rewards="group",
            temperature=1.0,
            shuffle_dataset=False,
            **{"bf16": False, **settings},
        )
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=[reward],
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": each}]} for each in prompts_of(options)]),
            processing_class=tokenizer,
            callbacks=[clock],
            peft_config=bench.adapter_of(CASES[case], "CAUSAL_LM"),
        )  # fmt: skip
        trainer.train()
        whole = time.perf_counter() - began
        logged = [entry for entry in trainer.state.log_history if "reward" in entry]
        lengths, rewards = ([entry[name] for entry in logged] for name in ("completions/mean_length", "reward"))
        return answer_of(options, clock.seconds, lengths, rewards) | {"seconds_in_all": whole}


def answer_of(
    options: argparse.Namespace, seconds: Sequence[float], lengths: Sequence[float], rewards: Sequence[float]
) -> dict[str, Any]:
    """What a case measured, of its iterations. lengths: mean tokens of a response."""
    return {
        "responses_per_second": bench.rate_of([options.batch] * len(seconds), seconds),
        "tokens_per_second": bench.rate_of([length * options.batch for length in lengths], seconds),
        "seconds_an_iteration": statistics.median(seconds),
        "response_length": statistics.fmean(lengths),
        "rewards": [round(reward, 3) for reward in rewards],
    }


def main() -> None:
    defaults = {
        "iterations": 6,
        "batch": 32,
        "group": 8,
        "new_tokens": 48,
        "learning_rate": 1e-5,
        "lora_learning_rate": 2e-4,
        "warmup": 0.0,
        "prompts": "",
        "column": "prompt",
    }
    options = bench.parser(__doc__, {**defaults, "cases": "loopos,trl-best"}).parse_args()
    if options.child:
        run = run_loopos if options.child.startswith("loopos") else run_trl
        bench.measured(options.child, partial(run, options.child, options))
    else:
        bench.take_turns(__file__, CASES, options, rate="responses_per_second")


if __name__ == "__main__":
    main()
