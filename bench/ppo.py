"""One iteration of PPO side by side with TRL's experimental PPOTrainer, the last that it had (1.12): same policy, prompts, batch, response length and epochs.

    pip install --no-deps --target build/trl-1.12 trl==1.12.0
    python bench/ppo.py [--trl build/trl-1.12] [--rounds 2] [--iterations 4] [--cases loopos,trl-best,loopos-lora,trl-lora-best]

An iteration is 16 prompts, 64 new tokens each, scores, reference log-probabilities, values, and 4 epochs of one minibatch; its time is that from one to the next, the
first left out. Prompts are packaged customer messages, as they stand. The policy's copy has an end token that it never writes, so that all responses are equally long.
Rewards come from a model of the policy's size, trained for one step: its scores do not matter here. "loopos" and "trl-best" train policy and values in full, four
models; "loopos-lora" trains two adapters on one trunk that serves all four, "loopos-lora-shared" one adapter and a value head on the policy's hidden states; TRL's
LoRA trains an adapter of the policy and the value model in full.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from functools import partial
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import side_by_side as bench

PROMPTS, NEW_TOKENS, EPOCHS = 16, 64, 4
CASES: dict[str, dict[str, Any]] = {
    "loopos": {},
    "loopos-shared": {"value_model": "shared"},
    "loopos-lora": {"trainable": "lora", "lora": {"rank": 16, "alpha": 32}},
    "loopos-lora-shared": {"trainable": "lora", "lora": {"rank": 16, "alpha": 32}, "value_model": "shared"},
    "trl-defaults": {},
    # What a knowledgeable user would set: half-precision weights, no recomputation, the allocator that keeps freed memory.
    "trl-best": {"weights": "bfloat16", "gradient_checkpointing": False, "allocator": True},
    "trl-bf16": {"bf16": True, "gradient_checkpointing": False, "allocator": True},
    "trl-lora-best": {"lora": True, "weights": "bfloat16", "gradient_checkpointing": False, "allocator": True},
}  # fmt: skip
# A token of SmolLM2's vocabulary that it does not write.
NEVER_WRITTEN = "<jupyter_script>"


def prepared(options: argparse.Namespace, folder: Path) -> None:
    """Writes the policy with another end token, the prompts, and reward models trained for one step."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from loopos.config.reward_model import RewardModelConfig
    from loopos.methods.reward_model import RewardModelTrainer
    from loopos.training.progress import RunProgress

    place = bench.folder_of(options.model)
    tokenizer = AutoTokenizer.from_pretrained(place)
    tokenizer.eos_token, tokenizer.chat_template = NEVER_WRITTEN, None
    policy = AutoModelForCausalLM.from_pretrained(place)
    policy.config.eos_token_id = policy.generation_config.eos_token_id = tokenizer.eos_token_id
    policy.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    messages = bench.rows_of(str(resources.files("loopos.demo").joinpath("intents_train.jsonl")))
    lines = [json.dumps({"prompt": message["text"]}) + "\n" for message in messages]
    (folder / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")
    pairs = str(resources.files("loopos.demo").joinpath("replies_train.jsonl"))
    for name, training in (("full", {}), ("lora", CASES["loopos-lora"])):
        config = {
            "computation": {"mode": "posttraining", "method": "reward_model"},
            "training": {"learning_rate": 1e-6, "batch_size": 4, "num_epochs": 1, "max_steps": 1, "save_every": "never", "keep_best": False, **training},
            "data": {"pretrained_weights": str(folder / "policy"), "preference_data": pairs, "validation_share": 0.0, "chat_template": "none",
                     "max_rows": 16, "output_dir": str(folder / f"reward-{name}")},
        }  # fmt: skip
        RewardModelTrainer(RewardModelConfig.model_validate(config), progress=RunProgress(quiet=True)).train()


def told(seconds: list[float]) -> dict[str, float]:
    return {
        "seconds_an_iteration": statistics.median(seconds),
        "iterations_per_hour": 3600 / statistics.median(seconds),
    }


def run_loopos(case: str, options: argparse.Namespace) -> dict[str, Any]:
    from loopos.config.ppo import PpoConfig
    from loopos.methods.ppo import PpoTrainer
    from loopos.training.progress import RunProgress

    began: list[float] = []

    class Timed(PpoTrainer):
        def collect(self, iteration: int) -> Any:
            began.append(time.perf_counter())
            return super().collect(iteration)

    place, settings = Path(options.prepared), CASES[case]
    with tempfile.TemporaryDirectory() as folder:
        config = {
            "computation": {"mode": "posttraining", "method": "ppo"},
            "training": {"learning_rate": 1e-6, "batch_size": PROMPTS, "inner_epochs": EPOCHS, "num_epochs": 100, "max_iterations": options.iterations + 1,
                         "validate_every": "never", "save_every": "never", "keep_best": False, "seed": 1, **settings},
            "generation": {"max_new_tokens": NEW_TOKENS},
            "data": {"pretrained_weights": str(place / "policy"), "prompts": str(place / "prompts.jsonl"), "validation_share": 0.0, "chat_template": "none",
                     "reward_model": str(place / ("reward-lora" if "lora" in settings else "reward-full")), "output_dir": f"{folder}/run"},
        }  # fmt: skip
        Timed(PpoConfig.model_validate(config), progress=RunProgress(quiet=True)).train()
        ended = time.perf_counter()
        events = [json.loads(line) for line in (Path(folder) / "run" / "events.jsonl").read_text().splitlines()]
    rollouts = [event for event in events if event["event"] == "rollout"][1:]
    lengths = [rollout["metrics"]["response_length"] for rollout in rollouts]
    # The last iteration ends with the export, which is none of it.
    spent = [after - before for before, after in pairwise(began)] or [ended - began[0]]
    return {
        **told(spent),
        "rollout_seconds": statistics.median(r["timing"]["seconds"] for r in rollouts),
        "response_length": statistics.mean(lengths),
    }


def run_trl(case: str, options: argparse.Namespace) -> dict[str, Any]:
    sys.path.insert(0, str(Path(options.trl).resolve()))
    import torch
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    place = f"{options.prepared}/policy"
    weights = getattr(torch, CASES[case].get("weights", "float32"))
    tokenizer = AutoTokenizer.from_pretrained(place, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or "<empty_output>"
    policy = AutoModelForCausalLM.from_pretrained(place, dtype=weights)
    adapter = bench.adapter_of(CASES[case], "CAUSAL_LM")
    reference = None if adapter is not None else AutoModelForCausalLM.from_pretrained(place, dtype=weights)
    reward, values = (
        AutoModelForSequenceClassification.from_pretrained(place, num_labels=1, dtype=weights) for _ in range(2)
    )
    for model in (policy, reference, reward, values):
        if model is not None:
            model.config.pad_token_id = tokenizer.pad_token_id
    prompts = [row["prompt"] for row in bench.rows_of(f"{options.prepared}/prompts.jsonl")]
    dataset = Dataset.from_dict({"input_ids": [tokenizer.encode(prompt) for prompt in prompts]})
    ends: list[float] = []

    class Ends(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    own = {name: value for name, value in CASES[case].items() if name not in ("allocator", "weights", "lora")}
    with tempfile.TemporaryDirectory() as folder:
        arguments = PPOConfig(
            folder,
            learning_rate=1e-6,
            per_device_train_batch_size=PROMPTS,
            num_ppo_epochs=EPOCHS,
            total_episodes=PROMPTS * (options.iterations + 1),
            response_length=NEW_TOKENS,
            temperature=1.0,
            num_sample_generations=0,
            local_rollout_forward_batch_size=PROMPTS,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            **{"bf16": False, **own},
        )
        trainer = PPOTrainer(
            arguments, tokenizer, policy, reference, reward, dataset, values, callbacks=[Ends()], peft_config=adapter
        )
        trainer.train()
    return told([after - before for before, after in pairwise(ends)])


def main() -> None:
    parser = bench.parser(
        __doc__, {"trl": "build/trl-1.12", "iterations": 4, "prepared": "", "cases": "loopos,trl-best"}
    )
    options = parser.parse_args()
    if options.child:
        run = run_loopos if options.child.startswith("loopos") else run_trl
        bench.measured(options.child, partial(run, options.child, options))
        return
    with tempfile.TemporaryDirectory() as folder:
        options.prepared = folder
        prepared(options, Path(folder))
        bench.take_turns(__file__, CASES, options, rate="iterations_per_hour")


if __name__ == "__main__":
    main()
