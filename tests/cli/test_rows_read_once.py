"""The rows of a run are checked before torch is imported, and read once: training takes what the check has read."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pico_runs import slow_but

from loopos.config.load import load
from loopos.config.methods import config_classes
from loopos.data.labeled import load_labeled
from loopos.data.read_ahead import reuse_in_training
from loopos.data.row_check import check_rows
from loopos.data.rows import RowReader
from tests.cli.conftest import Invoke, rows, write_jsonl

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
ROWS: dict[str, list[dict[str, Any]]] = {
    "fine_tuning": rows(12),
    "sft": [{"messages": CHAT} for _ in range(6)],
    "chain_of_thought": [{"messages": CHAT} for _ in range(6)],
    "reward_model": [{"prompt": f"p {number}", "chosen": "a", "rejected": "b"} for number in range(6)],
    "rlhf": [{"prompt": f"p {number}", "chosen": "a", "rejected": "b"} for number in range(6)],
}
PASSES = {"fine_tuning": 1, "sft": 1, "chain_of_thought": 1, "reward_model": 1, "rlhf": 2}
"""Both phases of rlhf read the file, each something else of its rows."""


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each source was read to its end."""
    found: Counter[str] = Counter()
    finish = RowReader.finish

    def counted(reader: RowReader) -> None:
        found[Path(reader.report.source).name] += 1
        finish(reader)

    monkeypatch.setattr(RowReader, "finish", counted)
    return found


def written(folder: Path, method: str, pico: Path) -> Path:
    data = write_jsonl(folder / "data.jsonl", ROWS[method])
    key = "preference_data" if method in ("reward_model", "rlhf") else "training_data"
    config = {
        "computation": {"mode": "posttraining", "method": method},
        "training": {"learning_rate": 1e-3, "num_epochs": 1, "device": "cpu", "precision": "fp32"},
        "data": {"pretrained_weights": str(pico), key: str(data), "output_dir": str(folder / "out")},
    }
    file = folder / "run.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    return file


@pytest.mark.parametrize("method", slow_but(["fine_tuning", "rlhf"], sorted(ROWS)))
def test_a_dry_run_reads_its_rows_once(
    tmp_path: Path, pico_folder: Path, invoke: Invoke, passes: Counter[str], method: str
) -> None:
    done = invoke("train", written(tmp_path, method, pico_folder), "--dry-run")
    assert done.exit_code == 0, done.stderr
    assert passes == {"data.jsonl": PASSES[method]}


def test_a_training_and_its_resumption_read_their_rows_once(
    tmp_path: Path, pico_folder: Path, invoke: Invoke, passes: Counter[str]
) -> None:
    file = written(tmp_path, "fine_tuning", pico_folder)
    validation = f"data.validation_data={write_jsonl(tmp_path / 'held_out.jsonl', rows(6))}"
    assert invoke("train", file, validation, "--quiet").exit_code == 0
    assert passes == {"data.jsonl": 1, "held_out.jsonl": 1}
    assert invoke("train", file, validation, "training.num_epochs=2", "--resume", "--quiet").exit_code == 0
    assert passes == {"data.jsonl": 2, "held_out.jsonl": 2}


def test_what_was_read_is_handed_over_once_and_only_within(tmp_path: Path, pico_folder: Path) -> None:
    config: Any = load(written(tmp_path, "fine_tuning", pico_folder), (), config_classes()).config
    asked = (config.data, config.model)
    with reuse_in_training():
        check_rows(config)
        write_jsonl(tmp_path / "data.jsonl", rows(6))
        assert load_labeled(*asked, seed=config.training.seed + 1).reports[0].read == 6
        assert load_labeled(*asked, seed=config.training.seed).reports[0].read == 12
        assert load_labeled(*asked, seed=config.training.seed).reports[0].read == 6
        check_rows(config)
    write_jsonl(tmp_path / "data.jsonl", rows(9))
    assert load_labeled(*asked, seed=config.training.seed).reports[0].read == 9
