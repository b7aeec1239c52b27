"""Peak memory and time of training with and without checkpoints, replicated and shared out, one JSON line a case.

Enters: the number of processes. Leaves: for each case the largest resident memory of a process by the end of training
(MiB) and the seconds that a checkpoint held it up. Left out: speed of training. The model is new (33 M parameters,
134 MB in fp32, four times that with gradients and AdamW), its steps are short: saving is all that differs.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

SIZES = {"d_model": 512, "num_heads": 8, "num_layers": 8, "d_ff": 2048, "vocab_size": 300}
TEXT = "the parcel came late and the box was open\n\n" * 64


def child(folder: Path, mode: str, saves: bool, size: int) -> None:
    """One process of a run; the first one prints its figures."""
    from loopos.config.pretraining import PretrainingConfig
    from loopos.methods.pretraining import Pretrainer
    from loopos.storage.events import read
    from loopos.training.fit import Fit, FitResult
    from loopos.training.progress import RunProgress
    from loopos.training.run_state import RunState

    config = PretrainingConfig.model_validate(
        {
            "model": SIZES,
            "computation": {"mode": "pretraining", "method": "autoregressive"},
            "training": {
                "learning_rate": 1e-4,
                "optimizer": "adamw",
                "precision": "fp32",
                "device": "cpu",
                "max_length": 16,
                "batch_size": 4 // size,
                "max_steps": 6,
                "save_every": 2,
                "validate_every": "never",
            },
            "distributed": {"mode": mode, "silence": 300},
            "data": {
                "input_file": str(folder / "text.txt"),
                "output_dir": str(folder / "run"),
                "output_weights": str(folder / "weights.bin"),
                "validation_share": 0.0,
            },
        }
    )
    run = Fit.run

    def measured(self: Fit[object]) -> FitResult:
        result = run(self)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        peaks = self.world.gather(peak)
        if self.world.is_first:
            held = [e["timing"]["seconds"] for e in read(self.run_dir / "events.jsonl") if e["event"] == "checkpoint"]
            print(json.dumps({"mode": mode, "processes": size, "saves": saves, "peak_mib": peaks, "held_up_s": held}))
        return result

    with patch.object(Fit, "run", measured), patch.object(Pretrainer, "export"):
        if saves:
            Pretrainer(config, progress=RunProgress(quiet=True)).train()
        else:
            with patch.object(RunState, "begin_save"):
                Pretrainer(config, progress=RunProgress(quiet=True)).train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--child", nargs=2)
    options = parser.parse_args()
    if options.child is not None:
        child(Path(os.environ["BENCH_FOLDER"]), options.child[0], options.child[1] == "saves", options.nproc)
        return
    for mode in ("replicate", "shard"):
        for saves in ("never", "saves"):
            with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
                (Path(folder) / "text.txt").write_text(TEXT, encoding="utf-8")
                probe.bind(("127.0.0.1", 0))
                port = str(probe.getsockname()[1])
                probe.close()
                shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(options.nproc)}
                children = [
                    subprocess.Popen(
                        [sys.executable, __file__, "--nproc", str(options.nproc), "--child", mode, saves],
                        env={
                            **os.environ,
                            **shared,
                            "RANK": str(rank),
                            "LOCAL_RANK": str(rank),
                            "BENCH_FOLDER": folder,
                            "OMP_NUM_THREADS": "1",
                        },
                    )
                    for rank in range(options.nproc)
                ]
                codes = [process.wait() for process in children]
                if any(codes):
                    raise SystemExit(f"{mode}, {saves}: failed")


if __name__ == "__main__":
    main()
