"""Merges of three models of SmolLM2-135M's size: seconds and memory of each method; on request beside mergekit.

    python bench/merging.py [--methods linear,slerp,task_arithmetic,ties] [--rounds 2] [--mergekit PATH/TO/mergekit-yaml]
                            [--model FOLDER] [--noise 0.01] [--precision bfloat16]

The models are copies of the embedded one (bf16) whose tensors were moved by seeded noise of a hundredth of their spread.
With half-precision weights many changes are equal to a bit, and which of them TIES trims is anybody's choice: to compare
with mergekit take `--precision float32 --noise 5` and a small model.
Each merge is a process of its own; its peak of memory is that of the whole process, Python and torch included, and
`above_largest_gib` what it has over the largest tensor in fp32. One JSON line a merge.

`--mergekit` names the program of an installation in another environment: it runs as an outside program on a recipe of its
own form, and `difference` is the largest between its tensors and ours (fp32 results), relative to the largest element.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import side_by_side as bench

# Ours → mergekit's names, and what its recipe says for each.
PEERS: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear"},
    "slerp": {"merge_method": "slerp", "parameters": {"t": 0.3}},
    "task_arithmetic": {"merge_method": "task_arithmetic", "parameters": {"normalize": False}},
    "ties": {"merge_method": "ties", "parameters": {"normalize": True}},
}
ALL = (*PEERS, "dare_ties", "della", "breadcrumbs", "model_stock")
KEYS = {"slerp": ["t=0.3"]}


def make_models(folder: Path, weights: str, noise: float, precision: str) -> list[Path]:
    """The base and its three variants."""
    import torch
    from safetensors.torch import load_file, save_file

    source = Path(bench.folder_of(weights))
    tensors = load_file(source / "model.safetensors")
    made = []
    for number in range(4):
        path = folder / ("base" if number == 0 else f"model{number}")
        shutil.copytree(source, path)
        generator = torch.Generator().manual_seed(number)
        moved = {}
        for name, tensor in tensors.items():
            drawn = torch.randn(tensor.shape, generator=generator) if number else torch.zeros(())
            moved[name] = (tensor + noise * tensor.float().std() * drawn).to(getattr(torch, precision))
        save_file(moved, path / "model.safetensors", metadata={"format": "pt"})
        made.append(path)
    return made


def command_of(method: str, models: list[Path], out: Path) -> list[str]:
    base, *others = map(str, models)
    chosen = others[:2] if method == "slerp" else others
    words = [sys.executable, "-m", "loopos", "merge", *chosen, "--method", method, "-o", str(out), "dtype=fp32"]
    words += [] if method in ("linear", "slerp") else ["--base", base]
    return [*words, *KEYS.get(method, [])]


def peer_recipe(method: str, models: list[Path]) -> dict[str, Any]:
    base, *others = map(str, models)
    recipe: dict[str, Any] = {**PEERS[method], "dtype": "float32"}
    if method == "slerp":
        return {**recipe, "base_model": others[0], "models": [{"model": each} for each in others[:2]]}
    told = {"weight": 1.0, **({"density": 0.5} if method == "ties" else {})}
    recipe["models"] = [{"model": each, "parameters": told} for each in others]
    return recipe if method == "linear" else {**recipe, "base_model": base}


def run(command: list[str]) -> dict[str, float]:
    """Seconds and peak of a child's memory, GiB. The peak is read while it runs: what the system reports at its end counts
    the memory of the process that started it too.
    """
    began = time.perf_counter()
    with tempfile.TemporaryFile() as summary:
        child = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=summary, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )
        peak = 0.0
        while child.poll() is None:
            peak = max(peak, _peak_of(child.pid))
            time.sleep(0.02)
        summary.seek(0)
        assert child.returncode == 0, summary.read().decode()
    return {"seconds": time.perf_counter() - began, "peak_gib": peak}


def _peak_of(process: int) -> float:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 2**20 for line in status.splitlines() if line.startswith("VmHWM")), 0.0)


def difference(one: Path, other: Path) -> float:
    """The largest difference of two models' tensors, relative to the largest element."""
    from safetensors.torch import load_file

    sets = [
        {name: tensor for file in sorted(each.glob("*.safetensors")) for name, tensor in load_file(file).items()}
        for each in (one, other)
    ]
    shared = set(sets[0]) & set(sets[1])
    assert shared == set(sets[0]), "the two have other tensors"
    return max(float((sets[0][name] - sets[1][name]).abs().max() / sets[0][name].abs().max()) for name in shared)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--methods", default=",".join(ALL))
    options.add_argument("--rounds", type=int, default=1)
    options.add_argument(
        "--mergekit", default="", help="program of a mergekit installation, such as env/bin/mergekit-yaml"
    )
    options.add_argument("--noise", type=float, default=0.01, help="in standard deviations of each tensor")
    options.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16", help="of the models")
    actual = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="merging-") as name:
        folder = Path(name)
        models = make_models(folder, actual.model, actual.noise, actual.precision)
        largest = largest_bytes(models[0]) / 2**30
        for method in actual.methods.split(",") * actual.rounds:
            out, theirs = folder / "out", folder / "theirs"
            found: dict[str, Any] = {"method": method, **run(command_of(method, models, out))}
            found["above_largest_gib"] = found["peak_gib"] - largest
            if actual.mergekit and method in PEERS:
                recipe = folder / "peer.yaml"
                recipe.write_text(json.dumps(peer_recipe(method, models)))
                peer = run([actual.mergekit, str(recipe), str(theirs)])
                found |= {f"mergekit_{key}": value for key, value in peer.items()}
                found["difference"] = difference(out, theirs)
                shutil.rmtree(theirs)
            shutil.rmtree(out)
            print(
                json.dumps(
                    {key: round(value, 9) if isinstance(value, float) else value for key, value in found.items()}
                ),
                flush=True,
            )


def largest_bytes(model: Path) -> int:
    """Bytes of the largest tensor in fp32."""
    from loopos.storage.tensor_files import stored_tensors

    return 4 * max(each.spec.num_elements for each in stored_tensors([model / "model.safetensors"]).values())


if __name__ == "__main__":
    main()
