"""Quantization of a language model: size, perplexity and speed of each method against bf16.

    python bench/quantization.py [--cases int8,int4] [--rows 32] [--tokens 256] [--evaluated 20000]

Calibration text and the text that perplexity is of are those of `bench/pruning.py`. One JSON line a case: share of the
size in bf16, perplexity before and after, tokens a second before and after with their ratio (measured in turn), the
verdict, seconds, the peak of memory. Each case runs in a process of its own. The embedded SmolLM2 was made from weights
of four bits in groups of 32: `int4` with that group meets its own grid there, so that `--model` with other weights, or
`int4-64`, tells more.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pruning import texts

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
    from loopos.config.quantization import QuantizationRecipe
    from loopos.deploy.quantize import Quantizer

    with tempfile.TemporaryDirectory() as place:
        calibration, held_out = texts(Path(place), options.evaluated)
        keys = CASES[case]
        recipe = QuantizationRecipe(
            model=options.model,
            calibration_text=str(calibration) if "calibration" in keys else None,
            calibration_rows=options.rows,
            calibration_tokens=options.tokens,
            evaluate=str(held_out),
            **keys,
        )
        began = time.monotonic()
        result = Quantizer(recipe, say=lambda sentence: print(sentence, file=sys.stderr)).quantize(Path(place) / "out")
        seconds = time.monotonic() - began
    return {
        "case": case,
        "size": round(result.bytes_after / result.bytes_before, 4),
        "perplexity": [round(metrics["perplexity"], 4) for metrics in (result.before, result.after)],
        "rates": {
            rate.name: [round(each, 2) for each in (rate.before, rate.after, rate.ratio)] for rate in result.rates
        },
        "verdict": result.verdict,
        "seconds": round(seconds, 1),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--cases", default="int8,int8-dynamic,int4-64")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--evaluated", type=int, default=20_000)
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(run(options.child, options)), flush=True)
        return
    for case in options.cases.split(","):
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--child", case], check=True)


if __name__ == "__main__":
    main()
