"""What a step of full fine-tuning cannot be faster than here: its matrix products alone, and its optimizer alone.

    python bench/limits.py [--tokens 445] [--rounds 5]

Products: for every linear layer of the model (without its output layer, which a head replaces) the three of a step, forward, gradient of the input and of the
weight, in bf16 over packed rows of so many tokens. Optimizer: torch's fused AdamW over fp32 master weights of all parameters, and their rounding to bf16. Both take turns;
medians. One JSON line. The default is the median number of tokens of a step in bench/fine_tuning.py.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable

import side_by_side as bench

from loopos.cli.process import MEMORY_SETTINGS, RESTARTED, THREAD_SETTINGS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=445)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if RESTARTED not in os.environ:
        # The settings of the command line's own process, which are fixed when a process starts.
        settings = {**MEMORY_SETTINGS, **THREAD_SETTINGS}
        os.execve(
            sys.executable, [sys.executable, *sys.argv], {**os.environ, **settings, RESTARTED: ",".join(settings)}
        )
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(bench.folder_of(options.model))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    output = model.get_output_embeddings()
    shapes = [m.weight.shape for m in model.modules() if isinstance(m, nn.Linear) and m is not output]
    weights = [torch.randn(shape, dtype=torch.bfloat16) for shape in shapes]
    actual = {
        size: torch.randn(options.tokens, size, dtype=torch.bfloat16) for size in {n for shape in shapes for n in shape}
    }
    master_weights = [nn.Parameter(torch.randn(parameter.shape)) for parameter in model.parameters()]
    rounded = [master.detach().to(torch.bfloat16) for master in master_weights]
    for master in master_weights:
        master.grad = torch.randn_like(master) * 1e-3
    optimizer = torch.optim.AdamW(master_weights, lr=1e-5, fused=True)

    def products() -> None:
        for weight in weights:
            features, inputs = weight.shape
            x, gradient = actual[inputs], actual[features]
            x @ weight.t()
            gradient @ weight
            gradient.t() @ x

    def update() -> None:
        optimizer.step()
        for master, half in zip(master_weights, rounded, strict=True):
            half.copy_(master.detach())

    def seconds_of(run: Callable[[], None]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    products(), update()
    measured = [(seconds_of(products), seconds_of(update)) for _ in range(options.rounds)]
    multiplying, updating = (statistics.median(times) for times in zip(*measured, strict=True))
    operations = 6 * options.tokens * sum(weight.numel() for weight in weights)
    told = {
        "tokens": options.tokens,
        "products_s": multiplying,
        "optimizer_s": updating,
        "products_gflops": operations / multiplying / 1e9,
        "most_tokens_per_second": options.tokens / (multiplying + updating),
    }
    print(json.dumps({name: round(value, 4) for name, value in told.items()}))


if __name__ == "__main__":
    main()
