"""Law 4 for distillation: killed at any instant, also while the student writes, and resumed, a run ends with the very
bits of the run that was left alone."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from distillation_runs import distillation_config, pico_teacher, trained
from killed_runs import NUM_KILLS, check_kills_leave_no_trace
from test_preference_resume import bits_of

from loopos.config.distillation import DistillationConfig
from loopos.storage.events import read

# Saved within rounds and between them.
VARIANTS: dict[str, dict[str, Any]] = {
    "off-policy": {"distillation": {"loss": "forward_kl", "temperature": 2.0}},
    "on-policy": {
        "distillation": {"loss": "sampled_reverse_kl", "on_policy_fraction": 1.0},
        "online": {"every": 3, "max_new_tokens": 8},
    },
    "mixed": {
        "distillation": {"loss": "jsd", "on_policy_fraction": 0.3},
        "online": {"every": 3, "max_new_tokens": 8, "top_p": 0.9},
        "training": {"trainable": "lora", "lora": {"rank": 4, "dropout": 0.1}},
        "evaluation": {"samples": 2},
        "generation": {"max_new_tokens": 6},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["off-policy", "on-policy", "mixed"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_killed_at_random_moments(variant: str, pico_folder: Path, pico_tokenizer: Path, tmp_path: Path) -> None:
    teacher = pico_teacher(tmp_path / "teacher", pico_tokenizer)
    sections = dict(VARIANTS[variant])
    training = {
        "num_epochs": 4, "save_every": 2, "validate_every": 5, "keep_last": 2, "schedule": "cosine",
        **sections.pop("training", {}),
    }  # fmt: skip

    def build(name: str) -> DistillationConfig:
        return distillation_config(tmp_path / name, pico_folder, teacher, training=training, **sections)

    began = time.monotonic()
    trained(build("whole"))
    seconds = time.monotonic() - began
    expected = bits_of(tmp_path / "whole")
    assert sum(event["event"] == "step" for event in read(tmp_path / "whole" / "events.jsonl")) >= 18
    assert any("carried" in name for name in expected) == (variant != "off-policy")
    config = build("killed")
    check_kills_leave_no_trace(
        lambda: trained(config, resume=True), tmp_path / "killed", bits_of, expected,
        kills=min(2, NUM_KILLS) if NUM_KILLS <= 5 else NUM_KILLS, seconds=seconds, latest=0.7,
        seed=f"{variant} distillation",
    )  # fmt: skip
