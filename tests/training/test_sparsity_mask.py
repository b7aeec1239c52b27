"""The zeros of a pruned model stay exactly zero with every optimizer, in every number format, and across a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pico_runs import class_rows, config_of, last_weights, save_pico, slow_but, train
from safetensors.torch import load_file
from torch import Tensor, nn

from loopos.config.sections import TrainingSection
from loopos.training.distributed import World
from loopos.training.precision import MasterWeights
from loopos.training.trained_weights import zeros_to_keep
from loopos.training.update import build_update

OPTIMIZERS = ("sgd", "adam", "adamw", "adafactor", "muon")


class Pico(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.linear, self.head = nn.Embedding(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        with torch.no_grad():
            self.embedding.weight[2] = 0
            self.linear.bias.zero_()
            self.linear.weight[torch.rand(6, 6) < 0.5] = 0
            self.head.weight.zero_()


class Loss:
    def __init__(self, model: Pico) -> None:
        self.model, self.weights = model, {"loss": 1.0}

    def counts(self, batch: Tensor) -> dict[str, float]:
        return {"loss": float(len(batch))}

    def loss(self, batch: Tensor) -> dict[str, Tensor]:
        hidden = self.model.linear(self.model.embedding(batch).to(self.model.linear.weight.dtype))
        return {"loss": (self.model.head(hidden) - 1).float().square().sum()}


def test_zeros_are_only_those_of_pruned_matrices() -> None:
    model = Pico()
    masks = zeros_to_keep(model)
    assert list(masks) == ["linear.weight"]
    assert torch.equal(masks["linear.weight"], model.linear.weight == 0)


@pytest.mark.parametrize("half", [None, torch.bfloat16])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_zeros_stay_through_every_step(optimizer: str, half: torch.dtype | None) -> None:
    model = Pico()
    settings = TrainingSection(
        learning_rate=0.05, optimizer=optimizer, weight_decay=0.1, momentum=0.9 if optimizer in ("sgd", "muon") else 0.0
    )
    zeros = zeros_to_keep(model)
    before = model.linear.weight.detach().clone()
    master_weights = MasterWeights(
        dict(model.named_parameters()), may_train=dict(model.named_parameters()), half=lambda _: half
    )
    master_weights.keep_zeros(zeros)
    update = build_update(model, master_weights, settings, "fp32", World(), head=())
    mask = zeros["linear.weight"]
    assert 0 < int(mask.sum()) < mask.numel()
    for step in range(5):
        update([torch.tensor([step % 5, 2, 4])], Loss(model), 1.0)
        for weight in (master_weights.parameters["linear.weight"], model.linear.weight):
            assert bool((weight[mask] == 0).all())
    assert bool((model.linear.weight[~mask] != before[~mask].to(model.linear.weight.dtype)).any())
    assert bool((model.head.weight != 0).all()), "a new head begins with zeros, and learns"


def test_without_the_key_zeros_are_filled() -> None:
    """Without `keep_zeros` the zeros are filled, so the other tests are not vacuous."""
    model = Pico()
    mask = model.linear.weight == 0
    master_weights = MasterWeights(
        dict(model.named_parameters()), may_train=dict(model.named_parameters()), half=lambda _: None
    )
    update = build_update(
        model, master_weights, TrainingSection(learning_rate=0.05, optimizer="adamw"), "fp32", World(), head=()
    )
    for _ in range(3):
        update([torch.tensor([1, 2, 4])], Loss(model), 1.0)
    assert bool((model.linear.weight[mask] != 0).any())


@pytest.fixture
def pruned(tmp_path: Path, pico_tokenizer: Path, few_goes: None) -> Path:
    """A pico Llama, half of whose block weights are zero."""
    from loopos.compression.prune import Pruner
    from loopos.config.compression import PruningRecipe

    whole = save_pico("llama", tmp_path / "whole", pico_tokenizer)
    Pruner(PruningRecipe(model=str(whole), method="magnitude", sparsity=0.5)).prune(tmp_path / "pruned")
    return tmp_path / "pruned"


def zeros_in(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """By the end of its name, the zeros of each projection."""
    return {name.split("layers.")[1]: tensor == 0 for name, tensor in tensors.items() if "_proj" in name}


@pytest.mark.parametrize("precision", slow_but("bf16", ["fp32", "bf16"]))
def test_a_run_keeps_zeros_and_resumes_with_them(pruned: Path, tmp_path: Path, precision: str) -> None:
    def config(name: str, **training: Any) -> Any:
        chosen = {"keep_zeros": True, "weight_decay": 0.1, "precision": precision, "save_every": 3, **training}
        return config_of(tmp_path / name, pruned, class_rows(40), training=chosen)

    expected = zeros_in(load_file(pruned / "model.safetensors"))
    assert sum(int(mask.sum()) for mask in expected.values()) * 2 == sum(mask.numel() for mask in expected.values())
    train(config("straight"))
    train(config("resumed", max_steps=3))
    train(config("resumed"), resume=True)
    straight, resumed = last_weights(tmp_path / "straight"), last_weights(tmp_path / "resumed")
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    for tensors in (straight, load_file(tmp_path / "resumed" / "model" / "model.safetensors")):
        found = zeros_in(tensors)
        assert found.keys() == expected.keys()
        assert all(bool(found[name][mask].all()) for name, mask in expected.items())
    whole = load_file(pruned / "model.safetensors")
    trained = load_file(tmp_path / "resumed" / "model" / "model.safetensors")
    assert all(not torch.equal(trained[name].float(), whole[name]) for name in whole if "_proj" in name)


@pytest.mark.parametrize("trainable", ["lora", "head"])
def test_the_key_is_refused_with_adapters_and_has_no_effect_on_a_head(trainable: str, tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", "new", [], training={"keep_zeros": True, "trainable": trainable})
    diagnostics = [diagnostic for diagnostic in config.check() if "training.keep_zeros" in diagnostic.fields]
    summary = [note for note in config.notes() if note.startswith("training.keep_zeros has no effect")]
    assert (len(diagnostics), len(summary)) == ((1, 0) if trainable == "lora" else (0, 1))
