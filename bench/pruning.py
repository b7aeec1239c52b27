"""Pruning of the real model: Wanda beside magnitude at one share, and layers dropped, each with what it cost.

    python bench/pruning.py [--sparsity 0.5] [--layers 6] [--rows 64] [--tokens 256] [--evaluated 40000] [--cases magnitude,wanda]

One JSON line a case: perplexity and bits a byte before and after, tokens a second before and after with their ratio
(measured in turn), seconds, the peak of memory.
"""

from __future__ import annotations

import argparse
from typing import Any

import changed_models as bench

CASES = {
    "magnitude": {"method": "magnitude"},
    "magnitude-global": {"method": "magnitude", "scope": "global"},
    "wanda": {"method": "wanda"},
    "wanda-2:4": {"method": "wanda", "pattern": "2:4"},
    "sparsegpt": {"method": "sparsegpt"},
    "layers": {"method": "layers"},
    "heads": {"method": "heads"},
    "channels": {"method": "channels"},
}


def run(case: str, options: argparse.Namespace) -> dict[str, Any]:
    from loopos.compression.prune import Pruner
    from loopos.config.compression import PruningRecipe
    from loopos.models.load import load_config

    num_layers = load_config(options.model).num_hidden_layers
    share = None if "pattern" in CASES[case] else options.layers / num_layers if case == "layers" else options.sparsity
    return bench.answer(
        case,
        options,
        lambda text: PruningRecipe(model=options.model, sparsity=share, calibration=str(text), **CASES[case]),
        lambda recipe, out, say: Pruner(recipe, say=say).prune(out),
    )


DEFAULTS = {
    "cases": "magnitude,wanda,layers", "sparsity": 0.5, "layers": 6, "rows": 64, "tokens": 256, "evaluated": 40_000,
}  # fmt: skip

if __name__ == "__main__":
    bench.main(__doc__, __file__, run, DEFAULTS)
