"""Exactly the chosen parameters change: head, all, adapters, the layers above N, from a step on."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_runs import class_rows, config_of, events_of, prepared, train
from torch import Tensor

from loopos.config.diagnostics import UserError
from loopos.data.batches import Cursor


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fine_tuning")


def losses_of(run: Path) -> list[float]:
    return [event["metrics"]["loss"] for event in events_of(run, "step")]


def changed_by_one_step(config: Any) -> tuple[dict[str, Tensor], set[str], Any]:
    """The parameters before a step, the names that it changed, and the tuner."""
    tuner = prepared(config)
    fit = tuner.build_fit()
    before = {name: parameter.detach().clone() for name, parameter in tuner.model.named_parameters()}
    fit.update(fit.batches.step(Cursor()), fit.objective, 1.0)
    after = dict(tuner.model.named_parameters())
    assert set(after) == set(before)
    return before, {name for name in before if not torch.equal(before[name], after[name])}, tuner


def test_exactly_the_chosen_parameters_change(home: Path, pico_folder: Path) -> None:
    def changed(**training: Any) -> tuple[set[str], set[str]]:
        config = config_of(home / "trains", pico_folder, class_rows(24), training=training)
        before, names, _ = changed_by_one_step(config)
        return set(before), names

    everything, names = changed()
    assert names == everything
    assert len(everything) == 21  # 9 a layer, embeddings, last norm, head
    assert changed(trainable="head")[1] == {"head.weight"}
    _, names = changed(freeze_layers=1)
    kept = {name for name in everything if "layers.0." in name or "embed_tokens" in name}
    assert len(kept) == 10
    assert names == everything - kept
    _, names = changed(freeze_layers=1, unfreeze_step=3)
    assert names == everything - kept
    adapted, names = changed(trainable="lora", lora={"rank": 2})
    # B starts at 0, so A's first gradient is 0: after one step B and the head alone have moved.
    assert names == {name for name in adapted if "lora_B" in name} | {"head.weight"}
    assert len(names) == 2 * 7 + 1


def test_frozen_layers_train_from_their_step_on(home: Path, pico_folder: Path) -> None:
    settings = {
        "freeze_layers": 1,
        "unfreeze_step": 2,
        "max_steps": 4,
        "save_every": 1,
        "keep_last": 9,
        "validate_every": "never",
    }
    run = home / "unfreeze"
    train(config_of(run, pico_folder, class_rows(48), training=settings))
    from safetensors.torch import load_file

    saved = [load_file(folder / "weights.safetensors") for folder in sorted((run / "checkpoints").glob("step-*"))]
    assert len(saved) == 4
    low, high = "backbone.model.layers.0.mlp.up_proj.weight", "backbone.model.layers.1.mlp.up_proj.weight"
    moved = [not torch.equal(one[low], other[low]) for one, other in pairwise(saved)]
    # Checkpoints after steps 1, 2, 3, 4: the third step (number 2, from 0) is the first that trains the lower layer.
    assert moved == [False, True, True]
    assert all(not torch.equal(one[high], other[high]) for one, other in pairwise(saved))


def test_an_unfreeze_step_past_the_end_is_reported(
    home: Path, pico_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"freeze_layers": 1, "unfreeze_step": 500, "num_epochs": 1, "validate_every": "never"}
    train(config_of(home / "never_unfrozen", pico_folder, class_rows(16), training=settings))
    assert "training.unfreeze_step is 500, but the run has 2 steps" in capsys.readouterr().err


def test_freezing_more_layers_than_there_are_is_refused(home: Path, pico_folder: Path) -> None:
    with pytest.raises(UserError, match="got 3, expected at most 2"):
        train(config_of(home / "too_many", pico_folder, class_rows(16), training={"freeze_layers": 3}))


def test_the_heads_learning_rate_moves_the_head(home: Path, pico_folder: Path) -> None:
    moved = {}
    for rate in (0.1, 0.5):
        settings = {"optimizer": "sgd", "learning_rate": 0.1, "head_learning_rate": rate, "max_grad_norm": None}
        before, _, tuner = changed_by_one_step(
            config_of(home / "head_rate", pico_folder, class_rows(24), training=settings)
        )
        after = dict(tuner.model.named_parameters())
        moved[rate] = {name: after[name].detach() - before[name] for name in before}
    torch.testing.assert_close(moved[0.5]["head.weight"], 5 * moved[0.1]["head.weight"], atol=1e-6, rtol=1e-4)
    backbone = "backbone.model.layers.1.mlp.up_proj.weight"
    assert torch.equal(moved[0.5][backbone], moved[0.1][backbone])


def test_gradient_checkpointing_gives_the_same_run(home: Path, pico_folder: Path) -> None:
    # Adapters: the gradient must reach them though the embeddings below them rest.
    runs = []
    for checkpointing in (False, True):
        run = home / f"checkpointing_{checkpointing}"
        settings = {"gradient_checkpointing": checkpointing, "trainable": "lora", "max_steps": 3}
        train(config_of(run, pico_folder, class_rows(24), training=settings))
        runs.append(losses_of(run))
    assert len(runs[0]) == 3
    assert runs[1] == pytest.approx(runs[0], abs=1e-6)
