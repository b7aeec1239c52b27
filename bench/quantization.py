"""Quantization of a language model: size, perplexity and speed of each method against bf16.

    python bench/quantization.py [--cases int8,int4] [--rows 32] [--tokens 256] [--evaluated 20000]

One JSON line a case: share of the size in bf16, perplexity before and after, tokens a second before and after with their
ratio (measured in turn), the verdict, seconds, the peak of memory. The embedded SmolLM2 was made from weights of four bits
in groups of 32: `int4` with that group meets its own grid there, so that `--model` with other weights, or `int4-64`, tells
more.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import changed_models as bench

CASES: dict[str, dict[str, Any]] = {
    "int8": {"method": "int8"},
    "int8-gptq": {"method": "int8", "calibration": "gptq"},
    "int8-dynamic": {"method": "int8-dynamic"},
    "int8-dynamic-awq": {"method": "int8-dynamic", "calibration": "awq"},
    "int4": {"method": "int4"},
    "int4-64": {"method": "int4", "group_size": 64},
    "int4-64-gptq": {"method": "int4", "group_size": 64, "calibration": "gptq"},
    "int4-64-awq": {"method": "int4", "group_size": 64, "calibration": "awq"},
}


def run(case: str, options: argparse.Namespace) -> dict[str, Any]:
    from loopos.compression.quantize import Quantizer
    from loopos.config.compression import QuantizationRecipe

    keys = CASES[case]

    def recipe_of(text: Path) -> QuantizationRecipe:
        return QuantizationRecipe(
            model=options.model, calibration_text=str(text) if "calibration" in keys else None, **keys
        )

    return bench.answer(case, options, recipe_of, lambda recipe, out, say: Quantizer(recipe, say=say).quantize(out))


DEFAULTS = {"cases": "int8,int8-dynamic,int4-64", "rows": 32, "tokens": 256, "evaluated": 20_000}

if __name__ == "__main__":
    bench.main(__doc__, __file__, run, DEFAULTS)
