"""Runs whose config, log and checkpoint have the names of an older version resume to the bits of the whole run.

The files of a run are given the old names that they had, and the checksums that go with them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from preference_runs import events_of, ppo_config, reward_config

from loopos.config.aliases import RENAMED_KEYS
from loopos.config.diagnostics import UserError
from loopos.methods.ppo import PpoTrainer
from loopos.methods.reward_model import RewardModelTrainer
from loopos.storage.events import EVENT_NAMES, METRIC_NAMES, fingerprint
from loopos.training.checkpoint_files import read_manifest, seal_folder
from loopos.training.progress import RunProgress

OLD = {
    **{new.split(".")[1]: old.split(".")[1] for old, new in RENAMED_KEYS.items()},
    **{new: old for old, new in RENAMED_KEYS.items()},
    **{new: old for old, new in (*EVENT_NAMES.items(), *METRIC_NAMES.items())},
    "alerts": "alarms",
}


def older(value: Any) -> Any:
    """A JSON value with old names as keys, and as kinds and names of events."""
    if isinstance(value, dict):
        found = {OLD.get(key, key): older(each) for key, each in value.items()}
        for key in ("event", "name"):
            if key in found:
                found[key] = OLD.get(found[key], found[key])
        return found
    return [older(each) for each in value] if isinstance(value, list) else value


def make_older(run: Path) -> None:
    """Gives the files of a run the names of an older version."""
    (run / "config.json").write_text(json.dumps(older(json.loads((run / "config.json").read_text()))))
    log = run / "events.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    renamed = [json.dumps(older(json.loads(line)), separators=(",", ":")).encode() + b"\n" for line in lines]
    log.write_bytes(b"".join(renamed))
    for folder in (run / "checkpoints").iterdir():
        state = json.loads((folder / "state.json").read_text())
        sizes = [sum(map(len, lines[:count])) for count in range(len(lines) + 1)]
        before = b"".join(renamed[: sizes.index(state["events_offset"])])
        state |= {"events_offset": len(before), "events_sha256": hashlib.sha256(before).hexdigest()}
        manifest = read_manifest(folder)
        for name in ("state.json", "manifest.json"):
            (folder / name).unlink()
        records = {name: record for name, record in manifest["files"].items() if name != "state.json"}
        facts = {name: manifest[name] for name in ("step", "metric", "is_best")}
        seal_folder(folder, records, json.dumps(older(state)).encode(), facts)


def bits_of(run: Path) -> list[str]:
    return [
        fingerprint(run / "events.jsonl"),
        hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest(),
    ]


@pytest.mark.slow
def test_a_policy_and_its_monitor_resume(tmp_path: Path, pico_folder: Path) -> None:
    def trained(name: str, iterations: int, *, resume: bool = False) -> Path:
        config = ppo_config(
            tmp_path / name,
            pico_folder,
            functions=["preference_runs:length_of"],
            training={"max_iterations": iterations, "schedule": "constant", "learning_rate": 0.01, "seed": 8},
            # Fewer responses end in the third iteration, before the checkpoint, and in the fourth, behind it.
            generation={"max_new_tokens": 8, "stop": ["e", "a", "o"]},
            guards={"eos_rate_drop": 0.0, "patience": 2},
        )
        PpoTrainer(config, progress=RunProgress(quiet=True)).train(resume=resume)
        return tmp_path / name

    whole = trained("whole", 6)
    assert [alert["name"] for alert in events_of(whole, "alert")] == ["eos_rate"]
    old = trained("old", 3)
    make_older(old)
    state = json.loads(next((old / "checkpoints").glob("*/state.json")).read_text())["carried"]
    assert "end_share" in state["guards"]["first"]
    assert "alarms" in state
    trained("old", 6, resume=True)
    assert events_of(old, "session")[1]["changed"] == {"training.max_iterations": [3, 6]}
    assert bits_of(old) == bits_of(whole)
    assert events_of(old, "alert") == events_of(whole, "alert")


def test_a_reward_model_resumes_and_is_still_compared(
    tmp_path: Path, pico_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def trained(name: str, steps: int, *, resume: bool = False, center: float = 0.1) -> Path:
        config = reward_config(
            tmp_path / name,
            pico_folder,
            training={"max_steps": steps, "validate_every": 2, "keep_best": False},
            reward={"center_rewards": center, "normalize_over": 3},
        )
        RewardModelTrainer(config).train(resume=resume)
        return tmp_path / name

    whole, old = trained("whole", 6), trained("old", 4)
    make_older(old)
    assert '"reward.centring"' in next((old / "checkpoints").glob("*/state.json")).read_text()
    with pytest.raises(UserError, match=r"reward\.center_rewards: was 0\.1, is 0\.2"):
        trained("old", 6, resume=True, center=0.2)
    capfd.readouterr()
    trained("old", 6, resume=True)
    output = "".join(capfd.readouterr())
    assert "resumed from the checkpoint of step 4" in output
    # Every trait of the checkpoint was found under its name of today.
    assert "older version" not in output
    assert events_of(old, "session")[1]["changed"] == {"training.max_steps": [4, 6]}
    assert bits_of(old) == bits_of(whole)
