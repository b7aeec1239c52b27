"""Rollouts side by side: the local engine, a Ray worker with vLLM, and transformers' generate, on the same prompts.

    python bench/rollouts.py --python VLLM_ENVIRONMENT/bin/python [--rounds 2] [--cases loopos,vllm,transformers]

A call writes --group sampled responses of --new-tokens tokens to each of --prompts prompts in fp32; end tokens do not stop a row. Rates are response tokens a second
over the whole call, prompts included, the median of --repeats calls after one that warms up. `weights_seconds`: taking new weights, for vLLM with their way to the worker.
Each case has --threads threads. --python names the interpreter of an environment with vLLM (rollout.python).
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib import resources
from typing import Any

import side_by_side as bench

CASES: dict[str, dict[str, Any]] = {"loopos": {}, "vllm": {}, "transformers": {"allocator": True}}


def texts(number: int) -> list[str]:
    """Different packaged prompts."""
    rows = bench.rows_of(str(resources.files("loopos.demo").joinpath("replies_train.jsonl")))
    return list(dict.fromkeys(row["prompt"] for row in rows))[:number]


def timed(options: argparse.Namespace, generate: Callable[[int], int]) -> dict[str, Any]:
    """generate(seed): writes all responses, returns the number of their tokens."""
    generate(0)
    expected = options.prompts * options.group * options.new_tokens
    seconds = []
    for seed in range(1, options.repeats + 1):
        began = time.perf_counter()
        assert generate(seed) == expected, "a row ended early"
        seconds.append(time.perf_counter() - began)
    return {"tokens_per_second": expected / statistics.median(seconds), "seconds": statistics.median(seconds)}


def request_of(options: argparse.Namespace, tokenizer: Any, seed: int) -> Any:
    from loopos.generation.settings import SamplingParams
    from loopos.rl.workers.protocol import Request

    prompts = [tokenizer.encode(text) for text in texts(options.prompts)]
    settings = [
        SamplingParams(max_new_tokens=options.new_tokens, stop_at_end=False, seed=1000 * seed + index)
        for index in range(len(prompts))
    ]
    return Request(prompts, settings, options.group)


def run_loopos(options: argparse.Namespace) -> dict[str, Any]:
    from loopos.generation.engine import Engine
    from loopos.models.load import load_pretrained

    pretrained = load_pretrained(options.model, causal=True)
    engine = Engine(pretrained.model, pretrained.tokenizer)

    def generate(seed: int) -> int:
        request = request_of(options, pretrained.tokenizer, seed)
        written = engine.generate(request.prompts, request.settings, n=request.n)
        return sum(len(each.token_ids) for each in written)

    return timed(options, generate)


def run_vllm(options: argparse.Namespace) -> dict[str, Any]:
    from loopos.config.ppo import PpoConfig
    from loopos.models.load import load_pretrained
    from loopos.rl.workers.dispatch import Dispatcher
    from loopos.rl.workers.opening import RunView, TrainedPolicy, check_installed, recipe_of
    from loopos.rl.workers.ray_transport import RayTransport

    config = PpoConfig.model_validate(
        {
            "computation": {"mode": "posttraining", "method": "grpo"},
            "training": {"learning_rate": 1e-5, "max_length": 512},
            "rollout": {"engine": "vllm", "workers": 1, "cpus_per_worker": options.threads, "python": options.python},
            "data": {"pretrained_weights": options.model, "prompts": "none.jsonl", "output_dir": "none"},
        }
    )
    check_installed(config.rollout)
    pretrained = load_pretrained(options.model, causal=True)
    recipe = recipe_of(config, pretrained, trust_remote_code=False)
    dispatcher = Dispatcher(
        RayTransport(recipe, config.rollout), workers=1, restarts=0, timeout=600, say=lambda message: None
    )
    policy = TrainedPolicy(
        causal=pretrained.model, recipe=recipe, run=RunView(lambda: 0, lambda: 0, lambda number: None)
    )

    def generate(seed: int, options: argparse.Namespace = options) -> int:
        written = dispatcher.finished(dispatcher.begin(request_of(options, pretrained.tokenizer, seed)), seconds=3600)
        assert written is not None
        return sum(len(each.token_ids) for each in written)

    dispatcher.publish(0, policy.weights)
    found = timed(options, generate)
    short = argparse.Namespace(**{**vars(options), "prompts": 1, "group": 1, "new_tokens": 1})
    seconds = []
    for version in range(2):
        began = time.perf_counter()
        if version:
            dispatcher.publish(version, policy.weights)
        generate(0, short)
        seconds.append(time.perf_counter() - began)
    dispatcher.close()
    return {**found, "weights_seconds": seconds[1] - seconds[0]}


def run_transformers(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = bench.folder_of(options.model)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = tokenizer.pad_token_id or 0

    def generate(seed: int) -> int:
        torch.manual_seed(seed)
        batch = tokenizer.pad({"input_ids": request_of(options, tokenizer, seed).prompts}, return_tensors="pt")
        rows = model.generate(
            **batch, max_new_tokens=options.new_tokens, do_sample=True, top_k=0, num_return_sequences=options.group
        )
        return int(rows[:, batch["input_ids"].shape[1] :].numel())

    return timed(options, generate)


def main() -> None:
    defaults = {
        "prompts": 4,
        "group": 8,
        "new_tokens": 48,
        "repeats": 3,
        "threads": 2,
        "python": "",
        "cases": "loopos,vllm,transformers",
    }
    options = bench.parser(__doc__, defaults).parse_args()
    if not options.child:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
        bench.take_turns(__file__, CASES, options, rate="tokens_per_second")
        return
    run = {"loopos": run_loopos, "vllm": run_vllm, "transformers": run_transformers}[options.child]
    bench.measured(options.child, partial(run, options))


if __name__ == "__main__":
    main()
