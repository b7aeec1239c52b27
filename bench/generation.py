"""Generation side by side with transformers' `generate`: same weights in bf16, same prompts, same number of new tokens.

    python bench/generation.py [--rounds 2] [--cases 1,16,64,uneven] [--engines loopos,transformers-best] [--sampled]

Each engine and case runs in a process of its own, since allocator and thread settings are fixed when a process
starts; engines take turns (A B A B). One JSON line a run, then one line a case with medians and the ratio to LoopOS.
A rate is new tokens over the whole call, prompts included; end tokens do not stop a row. In "uneven" 64 prompts want
very different numbers of tokens (4 to 256, log-uniform): `generate` runs all rows until the longest is done, and what
a row made beyond its own number does not count. `agreement` is the share of the first 8 greedy tokens that both
engines chose: bf16 rounds differently in other shapes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path
from typing import Any

import side_by_side as bench

from loopos.cli.process import MEMORY_SETTINGS, THREAD_SETTINGS

NEW_TOKENS = 64
# "transformers-best" has the settings that our command line gives its own process; "loopos-logprobs" also returns every token's logprob.
ENGINES = ("loopos", "loopos-logprobs", "transformers", "transformers-best")


def texts(number: int) -> list[str]:
    """Packaged messages, one to four in a row, seeded."""
    rows = bench.rows_of(str(resources.files("loopos.demo").joinpath("intents_train.jsonl")))
    draw = random.Random(0)
    return [" ".join(row["text"] for row in draw.choices(rows, k=draw.randint(1, 4))) for _ in range(number)]


def limits(case: str) -> list[int]:
    """New tokens that each prompt wants."""
    if case != "uneven":
        return [NEW_TOKENS] * int(case)
    draw = random.Random(1)
    return [round(4 * 64 ** draw.random()) for _ in range(64)]


def run(engine: str, case: str, options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = bench.folder_of(options.model)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    expected = limits(case)
    prompts = [tokenizer.encode(text) for text in texts(len(expected))]
    generate = (
        loopos(model, tokenizer, engine, options.sampled)
        if engine.startswith("loopos")
        else peer(model, tokenizer, options.sampled)
    )
    generate(prompts, [4] * len(prompts))
    seconds, made = [], []
    for _ in range(options.repeats):
        start = time.perf_counter()
        made = generate(prompts, expected)
        seconds.append(time.perf_counter() - start)
    assert [len(row) for row in made] == expected
    rate = sum(expected) / statistics.median(seconds)
    return {"case": case, "engine": engine, "tokens_per_second": rate, "seconds": statistics.median(seconds),
            "prompt_tokens": sum(map(len, prompts)), "new_tokens": sum(expected), "first": [row[:8] for row in made]}  # fmt: skip


def loopos(model: Any, tokenizer: Any, engine: str, sampled: bool) -> Any:
    from loopos.generation.engine import Engine
    from loopos.generation.settings import SamplingParams

    ours = Engine(model, tokenizer, max_rows=64)
    assert ours.path == "cached", ours.reason

    def generate(prompts: list[list[int]], expected: list[int]) -> list[list[int]]:
        each = [
            SamplingParams(temperature=float(sampled), max_new_tokens=limit, stop_at_end=False) for limit in expected
        ]
        return [
            completion.token_ids for completion in ours.generate(prompts, each, logprobs=engine.endswith("logprobs"))
        ]

    return generate


def peer(model: Any, tokenizer: Any, sampled: bool) -> Any:
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    def generate(prompts: list[list[int]], expected: list[int]) -> list[list[int]]:
        batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
        chosen = {"do_sample": True, "temperature": 1.0, "top_k": 0} if sampled else {"do_sample": False}
        output = model.generate(**batch, max_new_tokens=max(expected), **chosen)
        rows = output[:, batch["input_ids"].shape[1] :].tolist()
        return [row[:limit] for row, limit in zip(rows, expected, strict=True)]

    return generate


def environment_of(engine: str) -> dict[str, str]:
    settings = {} if engine == "transformers" else {**MEMORY_SETTINGS, **THREAD_SETTINGS}
    return {**os.environ, **settings, "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> float:
    pairs = [pair for one, other in zip(ours, theirs, strict=True) for pair in zip(one, other, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--cases", default="1,16,64,uneven")
    parser.add_argument("--engines", default="loopos,transformers-best")
    parser.add_argument("--sampled", action="store_true")
    parser.add_argument("--child", default="")
    options = parser.parse_args()
    engines = options.engines.split(",")
    assert set(engines) <= set(ENGINES), f"engines: {', '.join(ENGINES)}"
    if options.child:
        print(json.dumps(run(engines[0], options.child, options)), flush=True)
        return
    bench.folder_of(options.model)
    for case in options.cases.split(","):
        found: dict[str, list[dict[str, Any]]] = {engine: [] for engine in engines}
        for _, engine in itertools.product(range(options.rounds), engines):
            arguments = [
                f"--model={options.model}",
                f"--repeats={options.repeats}",
                f"--engines={engine}",
                *(["--sampled"] if options.sampled else []),
            ]
            command = [sys.executable, str(Path(__file__).resolve()), f"--child={case}", *arguments]
            done = subprocess.run(command, env=environment_of(engine), stdout=subprocess.PIPE, check=True)
            answer = json.loads(done.stdout.decode().strip().splitlines()[-1])
            found[engine].append(answer)
            print(json.dumps({name: value for name, value in answer.items() if name != "first"}), flush=True)
        middle = {
            engine: statistics.median(a["tokens_per_second"] for a in answers) for engine, answers in found.items()
        }
        for engine, rate in middle.items():
            told = {"case": case, "sampled": options.sampled, "engine": engine, "median": True, "tokens_per_second": round(rate, 1),
                    "loopos_is_faster_by": round(middle[engines[0]] / rate, 3),
                    "agreement": round(agreement(found[engines[0]][0]["first"], found[engine][0]["first"]), 3)}  # fmt: skip
            print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
