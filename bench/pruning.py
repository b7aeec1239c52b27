"""Pruning of the real model: Wanda beside magnitude at one share, and layers dropped, each with what it cost.

    python bench/pruning.py [--sparsity 0.5] [--layers 6] [--rows 64] [--tokens 256] [--evaluated 40000] [--cases magnitude,wanda]

The text is the reference that Python carries for `help()` (package pydoc_data): topics in an order drawn by a seed, the
first ones for calibration, the last ones, `--evaluated` characters, for perplexity. One JSON line a case: perplexity and
bits a byte before and after, tokens a second of reading and writing before and after, seconds, the peak of memory. Each
case runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

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


def texts(folder: Path, evaluated: int) -> tuple[Path, Path]:
    """Calibration text and the text that perplexity is of, as files; no topic is in both."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    random.Random(0).shuffle(names)
    held_out: list[str] = []
    while sum(map(len, held_out)) < evaluated:
        held_out.append(topics[names.pop()])
    files = folder / "calibration.md", folder / "held_out.md"
    for file, parts in zip(files, ([topics[name] for name in names], held_out), strict=True):
        file.write_text("\n\n".join(parts), encoding="utf-8")
    return files


def run(case: str, options: argparse.Namespace) -> dict[str, Any]:
    from loopos.config.pruning import PruningRecipe
    from loopos.deploy.prune import Pruner
    from loopos.models.load import load_config

    num_layers = load_config(options.model).num_hidden_layers
    share = None if "pattern" in CASES[case] else options.layers / num_layers if case == "layers" else options.sparsity
    with tempfile.TemporaryDirectory() as place:
        calibration, held_out = texts(Path(place), options.evaluated)
        recipe = PruningRecipe(
            model=options.model,
            sparsity=share,
            calibration=str(calibration),
            calibration_rows=options.rows,
            calibration_tokens=options.tokens,
            evaluate=str(held_out),
            **CASES[case],
        )
        began = time.monotonic()
        result = Pruner(recipe, say=lambda sentence: print(sentence, file=sys.stderr)).prune(Path(place) / "out")
        seconds = time.monotonic() - began
    [after] = result.after
    answer: dict[str, Any] = {"case": case, "sparsity": after.sparsity}
    for name, found in (("before", result.before), ("after", after.measured)):
        answer[name] = {
            "perplexity": round(found.metrics["perplexity"], 3),
            "bits_per_byte": round(found.metrics["bits_per_byte"], 4),
            "reading": round(found.reading, 1),
            "writing": round(found.writing or 0.0, 1),
            "parameters": found.parameters,
        }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        **answer,
        "tokens": int(result.before.metrics["tokens"]),
        "seconds": round(seconds, 1),
        "peak_gib": round(peak, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--cases", default="magnitude,wanda,layers")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--evaluated", type=int, default=40_000)
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(run(options.child, options)), flush=True)
        return
    for case in options.cases.split(","):
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--child", case], check=True)


if __name__ == "__main__":
    main()
