"""What the benches of pruning and quantization share: their texts, their cases one by one, and how a case is told.

The text is the reference that Python carries for `help()` (package pydoc_data): topics in an order drawn by a seed, the
first ones for calibration, the last ones, `--evaluated` characters, for perplexity. Each case runs in a process of its own.
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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


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


def answer(
    case: str,
    options: argparse.Namespace,
    recipe_of: Callable[[Path], Any],
    change: Callable[[Any, Path, Callable[[str], None]], Any],
) -> dict[str, Any]:
    """One case. recipe_of: the recipe, given the calibration text; change: by recipe, into a folder, saying so."""
    with tempfile.TemporaryDirectory() as place:
        calibration, held_out = texts(Path(place), options.evaluated)
        recipe = recipe_of(calibration).model_copy(
            update={
                "calibration_rows": options.rows,
                "calibration_tokens": options.tokens,
                "evaluate": str(held_out),
            }
        )
        began = time.monotonic()
        result = change(recipe, Path(place) / "out", lambda sentence: print(sentence, file=sys.stderr))
        seconds = time.monotonic() - began
    [after] = result.after
    both = (result.before, after.measured)
    return {
        "case": case,
        "size": round(after.size_ratio, 4),
        "parameters": [each.parameters for each in both],
        "perplexity": [round(each.metrics["perplexity"], 4) for each in both],
        "bits_per_byte": [round(each.metrics["bits_per_byte"], 4) for each in both],
        "rates": {
            rate.name: [round(each, 2) for each in (rate.before, rate.after, rate.ratio)] for rate in after.rates
        },
        "verdict": after.verdict,
        "tokens": int(result.before.metrics["tokens"]),
        "seconds": round(seconds, 1),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


def main(
    told: str | None,
    script: str,
    run: Callable[[str, argparse.Namespace], Mapping[str, Any]],
    defaults: Mapping[str, Any],
) -> None:
    """The command line of such a bench. defaults: its options besides --model."""
    parser = argparse.ArgumentParser(description=told, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(run(options.child, options)), flush=True)
        return
    for case in options.cases.split(","):
        subprocess.run([sys.executable, script, *sys.argv[1:], "--child", case], check=True)
