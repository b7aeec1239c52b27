"""Distillation through the trainer: it learns from a teacher off and on policy, its losses are those of a plain padded
computation and of TRL, however a step is split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from distillation_runs import distillation_config, pico_teacher, trained
from preference_runs import events_of

LOSSES = ("forward_kl", "reverse_kl", "jsd")


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory, pico_tokenizer: Path) -> Path:
    return pico_teacher(tmp_path_factory.mktemp("teacher"), pico_tokenizer)


@pytest.mark.parametrize(
    ("loss", "share"), [("forward_kl", 0.0), ("reverse_kl", 0.0), ("jsd", 0.5), ("sampled_reverse_kl", 1.0)]
)
def test_the_student_nears_the_teacher(
    loss: str, share: float, tmp_path: Path, pico_folder: Path, teacher: Path
) -> None:
    sections: dict[str, Any] = {"distillation": {"loss": loss, "on_policy_share": share}}
    if share:
        sections["online"] = {"max_new_tokens": 8, "every": 2}
    training = {"num_epochs": 6, "validate_every": 9, **({"num_epochs": 20, "batch_size": 16, "learning_rate": 3e-3, "validate_every": 30} if "sampled" in loss else {})}
    trained(distillation_config(tmp_path / "run", pico_folder, teacher, training=training, **sections))
    first, *_, last = events_of(tmp_path / "run", "validation")
    name = "reverse_kl" if "reverse" in loss else "forward_kl"
    print(first, last, events_of(tmp_path / "run", "rollout")[:2], events_of(tmp_path / "run", "step")[-1])
    assert last[name] < 0.9 * first[name]
