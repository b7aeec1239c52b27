"""A model folder is complete or absent, and a broken one is reported."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pico_runs import class_rows, config_of, train
from safetensors import SafetensorError
from transformers import PreTrainedModel

from loopos.config.diagnostics import UserError
from loopos.models.folders import open_task_model, save_task_model
from loopos.models.resolve import resolve
from loopos.storage.durable import DiskFull


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, pico_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("task_folder") / "run"
    train(config_of(folder, pico_folder, class_rows(24), training={"num_epochs": 1, "precision": "bf16"}))
    return folder


def copy_of(run: Path, to: Path) -> Path:
    import shutil

    shutil.copytree(run / "model", to / "model")
    return to / "model"


def test_a_model_saved_again_is_the_same(run: Path, tmp_path: Path) -> None:
    model, tokenizer, description = open_task_model(run)
    description.pop("format")
    save_task_model(tmp_path / "again", model, tokenizer, description)
    for name in ("model.safetensors", "head.safetensors", "loopos.json"):
        assert (tmp_path / "again" / name).read_bytes() == (run / "model" / name).read_bytes()


def test_the_format_of_training_is_that_of_the_file(run: Path) -> None:
    from safetensors.torch import load_file

    tensors = load_file(run / "model" / "model.safetensors")
    # The head decides, and is small: it keeps fp32 for transformers too.
    assert tensors.pop("score.weight").dtype == torch.float32
    assert len(tensors) == 20
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert load_file(run / "model" / "head.safetensors")["weight"].dtype == torch.float32
    assert json.loads((run / "model" / "config.json").read_text())["dtype"] == "bfloat16"


def test_it_is_found_from_the_run_and_from_itself(run: Path) -> None:
    assert resolve(run).folder == run / "model"
    assert resolve(run / "model").folder == run / "model"


def test_a_folder_without_a_model_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no trained model here"):
        open_task_model(tmp_path)
    (tmp_path / "events.jsonl").touch()
    with pytest.raises(UserError, match="no finished model yet"):
        open_task_model(tmp_path)


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


DAMAGES: dict[str, Callable[[Path], None]] = {
    "description cut": lambda folder: cut_short(folder / "loopos.json"),
    "description is a list": lambda folder: (folder / "loopos.json").write_text("[]") and None,
    "head cut": lambda folder: cut_short(folder / "head.safetensors"),
    "head missing": lambda folder: (folder / "head.safetensors").unlink(),
    "weights cut": lambda folder: cut_short(folder / "model.safetensors"),
    "weights missing": lambda folder: (folder / "model.safetensors").unlink(),
    "config cut": lambda folder: cut_short(folder / "config.json"),
    "tokenizer cut": lambda folder: cut_short(folder / "tokenizer.json"),
    "newer format": lambda folder: (folder / "loopos.json").write_text('{"format": 2}') and None,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_named_without_a_traceback(damage: str, run: Path, tmp_path: Path) -> None:
    folder = copy_of(run, tmp_path)
    DAMAGES[damage](folder)
    with pytest.raises(UserError) as caught:
        open_task_model(tmp_path)
    assert str(folder) in str(caught.value)


def test_what_a_killed_export_left_is_cleared(run: Path, tmp_path: Path) -> None:
    model, tokenizer, description = open_task_model(run)
    for name in (".model.partial-4000000", ".model.replaced-4000000"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    save_task_model(tmp_path / "model", model, tokenizer, description)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("library", ["os", "safetensors"])
def test_a_disk_that_fills_during_the_export(
    library: str, tmp_path: Path, pico_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = {
        "os": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        # As safetensors words it.
        "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    }[library]

    def refuse(self: PreTrainedModel, *arguments: object, **named: object) -> None:
        raise full

    config = config_of(tmp_path / "run", pico_folder, class_rows(24), training={"num_epochs": 1})
    with monkeypatch.context() as patched:
        patched.setattr(PreTrainedModel, "save_pretrained", refuse)
        with pytest.raises(DiskFull, match="the trained model") as caught:
            train(config)
    assert caught.value.exit_code == 74
    assert not list((tmp_path / "run").glob("*model*"))
    # With room again, the run ends where it was.
    assert train(config, resume=True).stopped_by == "epochs"
    open_task_model(tmp_path / "run")
