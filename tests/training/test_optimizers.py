"""Every optimizer trains, resumes exactly, and leaves norms and biases out of weight decay."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_runs import class_rows, config_of, events_of, last_weights, train
from safetensors.torch import load_file
from torch import Tensor, nn

from loopos.storage.events import fingerprint
from loopos.training.optimizers import OptimizerSet, OptimizerSettings

NAMES = ("sgd", "adam", "adamw", "adafactor", "muon")
RATES = {"sgd": 0.5, "adam": 0.01, "adamw": 0.01, "adafactor": 0.02, "muon": 0.02}


def some_parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "embed.weight": (7, 4),
        "layer.weight": (4, 4),
        "norm.weight": (4,),
        "layer.bias": (4,),
        "head.weight": (3, 4),
    }
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def optimizer_of(settings: OptimizerSettings, parameters: dict[str, nn.Parameter]) -> OptimizerSet:
    return OptimizerSet(settings, parameters, head={"head.weight"}, embeddings={"embed.weight"})


def set_gradients(parameters: dict[str, nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_b_of_adapters_has_its_own_rate_as_in_peft(name: str, pico_folder: Path) -> None:
    """LoRA+: two steps equal those of peft's optimizer with the same ratio, at a factor of the schedule."""
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer
    from transformers import AutoModelForCausalLM

    kinds: dict[str, type[torch.optim.Optimizer]] = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    moved = []
    for ours in (True, False):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(pico_folder)
        model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
        parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
        step: Any
        if ours:
            settings = OptimizerSettings(name, 0.02, weight_decay=0.1 if name == "adamw" else 0.0, lora_plus_ratio=8.0)
            optimizer = OptimizerSet(settings, parameters, head=())
            optimizer.set_factor(0.5)
            step = optimizer.step
        else:
            decay = {"loraplus_weight_decay": 0.1, "weight_decay": 0.1} if name == "adamw" else {}
            step = create_loraplus_optimizer(model, kinds[name], lr=0.01, loraplus_lr_ratio=8.0, **decay).step
        for seed in (1, 2):
            set_gradients(parameters, seed)
            step()
        moved.append({name: each.detach().clone() for name, each in parameters.items()})
    assert sum(".lora_B." in each for each in moved[0]) == 14
    for each, value in moved[0].items():
        torch.testing.assert_close(value, moved[1][each], atol=1e-7, rtol=1e-5)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, pico_folder: Path) -> dict[str, Path]:
    """An uninterrupted run of every optimizer, with its checkpoints of steps 4 and 8 and of the end."""
    home = tmp_path_factory.mktemp("optimizers")
    for name in NAMES:
        train(run_config(home / name, name, pico_folder))
    return {name: home / name for name in NAMES}


def run_config(run: Path, name: str, weights: Path) -> object:
    settings = {
        "optimizer": name,
        "learning_rate": RATES[name],
        "head_learning_rate": RATES[name] / 2,
        "momentum": 0.8 if name in ("sgd", "muon") else 0.0,
        "weight_decay": 0.01,
        "schedule": "cosine",
        "warmup": 2,
        "save_every": 4,
        "keep_last": 9,
        "keep_best": False,
        "validate_every": "never",
    }
    return config_of(run, weights, class_rows(44), training=settings, data={"validation_share": 0.0})


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_learns(name: str, runs: dict[str, Path]) -> None:
    losses = [event["metrics"]["loss"] for event in events_of(runs[name], "step")]
    assert len(losses) == 12
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_resumes_exactly(name: str, runs: dict[str, Path], tmp_path: Path, pico_folder: Path) -> None:
    """Reset to the checkpoint of step 4, as after a kill, and resumed."""
    run = tmp_path / "cut"
    shutil.copytree(runs[name], run)
    checkpoints = sorted((run / "checkpoints").iterdir())
    assert [folder.name for folder in checkpoints] == ["step-00000004", "step-00000008", "step-00000012"]
    for folder in checkpoints[1:]:
        shutil.rmtree(folder)
    result = train(run_config(run, name, pico_folder), resume=True)  # type: ignore[arg-type]
    assert (result.step, result.stopped_by) == (12, "epochs")
    assert events_of(run, "session")[-1]["metrics"]["resumed"] is True
    expected, found = last_weights(runs[name]), last_weights(run)
    assert set(found) == set(expected)
    assert all(torch.equal(found[weight], expected[weight]) for weight in expected)
    assert fingerprint(run / "events.jsonl") == fingerprint(runs[name] / "events.jsonl")
    states = [load_file(max((r / "checkpoints").iterdir()) / "optimizer.safetensors") for r in (runs[name], run)]
    assert set(states[0]) == set(states[1])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert len(states[0]) >= 21


@pytest.mark.parametrize("name", ["sgd", "adamw", "adafactor", "muon"])
def test_weight_decay_shrinks_matrices_and_leaves_the_rest(name: str) -> None:
    """One step with zero gradients: matrices lose learning rate × decay of themselves, vectors nothing."""
    parameters = some_parameters()
    before = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    settings = OptimizerSettings(name, 0.1, head_learning_rate=0.3, weight_decay=0.2)
    optimizer = optimizer_of(settings, parameters)
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.set_factor(0.5)
    optimizer.step()
    for key, parameter in parameters.items():
        factor = 0.5 * (0.3 if key == "head.weight" else 0.1) * 0.2 if parameter.ndim == 2 else 0.0
        torch.testing.assert_close(parameter.detach(), before[key] * (1 - factor), atol=1e-7, rtol=1e-6)


def test_adams_decay_is_part_of_the_gradient() -> None:
    # Adam divides by the gradient's own size, so a decay of any size moves a first step by the learning rate.
    parameters = some_parameters()
    before = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    optimizer = optimizer_of(OptimizerSettings("adam", 0.1, weight_decay=0.2), parameters)
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(
        parameters["layer.weight"].detach(),
        before["layer.weight"] - 0.1 * before["layer.weight"].sign(),
        atol=1e-5,
        rtol=0,
    )
    assert torch.equal(parameters["norm.weight"].detach(), before["norm.weight"])


def test_adamw_equals_torchs_over_five_steps() -> None:
    actual_weights, expected_weights = some_parameters(), some_parameters()
    optimizer = optimizer_of(
        OptimizerSettings("adamw", 0.02, betas=(0.8, 0.95), epsilon=1e-6, weight_decay=0.1), actual_weights
    )
    matrices = [parameter for parameter in expected_weights.values() if parameter.ndim == 2]
    vectors = [parameter for parameter in expected_weights.values() if parameter.ndim == 1]
    assert (len(matrices), len(vectors)) == (3, 2)
    reference = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=0.02, betas=(0.8, 0.95), eps=1e-6, fused=False, foreach=False,
    )  # fmt: skip
    for step in range(5):
        set_gradients(actual_weights, step)
        set_gradients(expected_weights, step)
        optimizer.step()
        reference.step()
    for key in actual_weights:
        torch.testing.assert_close(actual_weights[key].detach(), expected_weights[key].detach(), atol=1e-6, rtol=1e-5)


def test_momentum_by_hand() -> None:
    weight = {"w": nn.Parameter(torch.zeros(1))}
    optimizer = OptimizerSet(OptimizerSettings("sgd", 0.1, momentum=0.5), weight, head=())
    seen = []
    for gradient in (1.0, 1.0, 0.0):
        weight["w"].grad = torch.tensor([gradient])
        optimizer.step()
        seen.append(float(weight["w"].detach()))
    # Velocities 1, 1.5, 0.75.
    assert seen == pytest.approx([-0.1, -0.25, -0.325])


def test_muon_orthogonalizes_only_the_layers() -> None:
    """The update of a layer's matrix has nearly equal singular values; embeddings and head take AdamW's first step."""
    parameters = some_parameters()
    before = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    optimizer = optimizer_of(OptimizerSettings("muon", 0.1), parameters)
    set_gradients(parameters, 1)
    gradients = {key: parameter.grad.clone() for key, parameter in parameters.items() if parameter.grad is not None}
    optimizer.step()
    moved = {key: parameter.detach() - before[key] for key, parameter in parameters.items()}
    spread = torch.linalg.svdvals(moved["layer.weight"])
    assert float(spread.max() / spread.min()) < 2.0
    assert float(torch.linalg.cond(gradients["layer.weight"])) > 3.0
    for key in ("embed.weight", "head.weight", "norm.weight", "layer.bias"):
        torch.testing.assert_close(moved[key], -0.1 * gradients[key].sign(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_state_goes_out_and_comes_back(name: str) -> None:
    settings = OptimizerSettings(name, 0.05, momentum=0.9 if name in ("sgd", "muon") else 0.0)
    stored, other = some_parameters(), some_parameters()
    one, two = optimizer_of(settings, stored), optimizer_of(settings, other)
    for step in range(2):
        set_gradients(stored, step)
        one.step()
    state: dict[str, Tensor] = {key: tensor.clone() for key, tensor in one.tensors().items()}
    assert {key.rpartition("|")[0] for key in state} == set(stored)
    with torch.no_grad():
        for key in stored:
            other[key].copy_(stored[key])
    two.load(state)
    # The loaded state is a copy: stepping does not write into the checkpoint's tensors.
    copies = {key: tensor.clone() for key, tensor in state.items()}
    for parameters, optimizer in ((stored, one), (other, two)):
        set_gradients(parameters, 9)
        optimizer.step()
    assert all(torch.equal(stored[key], other[key]) for key in stored)
    assert all(torch.equal(state[key], copies[key]) for key in state)
