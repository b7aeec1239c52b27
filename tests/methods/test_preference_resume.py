"""Law 4 for preference optimization: killed at any instant, also while the reference is computed, and resumed, a run ends
with the very bits of the run that was left alone."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from killed_runs import NUM_KILLS, check_kills_leave_no_trace, digest
from pico_runs import slow_but
from preference_runs import preference_config, thumbs

from loopos.config.methods import method_row
from loopos.storage.events import fingerprint, read
from loopos.training.progress import RunProgress

_LORA = {"trainable": "lora", "lora": {"rank": 4, "dropout": 0.1}}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("dpo", {}),
    # Plain LoRA: test_kill_and_resume.py.
    "lora": ("dpo", {"trainable": "lora", "lora": {"rank": 4, "use_dora": True, "init_lora_weights": "pissa"}}),
    "kto": ("kto", {}),
    "moving reference": ("dpo", {"precision": "bf16"}),
    "online": ("dpo", {"trainable": "lora", "lora": {"rank": 4}, "num_epochs": 6}),
    "answers": ("dpo", {**_LORA, "metric": "win_rate"}),
}
SECTIONS: dict[str, dict[str, Any]] = {
    "moving reference": {"preference": {"sync_reference": {"every": 3, "alpha": 0.6}}},
    # Saved within rounds and between them.
    "online": {
        "online": {"every": 3, "max_new_tokens": 6},
        "reward": {"functions": [{"name": "preference_runs:length_of"}]},
        "preference": {"sync_reference": {"every": 4, "alpha": 0.5}},
    },
    "answers": {
        "evaluation": {"prompts": 5, "judge": "preference_runs:length_of"},
        "generation": {"max_new_tokens": 6},
    },
}


def bits_of(run: Path) -> dict[str, str]:
    """SHA-256 of the last checkpoint, the exported model, the cached reference, the answers and the metrics."""
    last = max((run / "checkpoints").glob("step-*"))
    files = [*sorted(last.glob("*.safetensors")), run / "model" / "model.safetensors"]
    files += sorted((run / "reference").glob("*"))
    answers = {f.name: digest(f) for f in run.glob("samples.jsonl")}
    return {
        **{f"{f.parent.name}/{f.name}": digest(f) for f in files},
        **answers,
        "metrics": fingerprint(run / "events.jsonl"),
    }


@pytest.mark.parametrize("variant", slow_but("lora", VARIANTS))
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_killed_at_random_moments(variant: str, pico_folder: Path, tmp_path: Path) -> None:
    method, training = VARIANTS[variant]
    settings = {"num_epochs": 2, "save_every": 2, "validate_every": 3, "keep_last": 2, "schedule": "cosine", **training}
    rows = thumbs(60) if method == "kto" else None

    def build(name: str) -> Any:
        made = preference_config(tmp_path / name, pico_folder, method, rows=rows, training=settings)
        return type(made).model_validate(made.model_dump(mode="json") | SECTIONS.get(variant, {}))

    def train(config: Any, *, resume: bool) -> None:
        method_row(method).trainer_class(config, progress=RunProgress(quiet=True)).train(resume=resume)

    began = time.monotonic()
    train(build("whole"), resume=False)
    seconds = time.monotonic() - began
    expected = bits_of(tmp_path / "whole")
    assert sum(event["event"] == "step" for event in read(tmp_path / "whole" / "events.jsonl")) >= 8
    assert any("reference/" in name for name in expected) == (variant in ("full", "kto"))
    assert any("samples" in name for name in expected) == (variant == "answers")
    config = build("killed")
    check_kills_leave_no_trace(
        lambda: train(config, resume=True), tmp_path / "killed", bits_of, expected,
        kills=NUM_KILLS, seconds=seconds, latest=0.7, seed=f"{variant} preferences",
    )  # fmt: skip
