"""fp32 master weights of bf16 weights, gradients summed in fp32, and the loss scale of fp16."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from pico_runs import class_rows, config_of, events_of, last_weights, prepared, train
from torch import Tensor, nn

from loopos.config.diagnostics import UserError
from loopos.data.batches import Cursor
from loopos.training.optimizers import OptimizerSet, OptimizerSettings
from loopos.training.precision import MasterWeights, pick_device, resolve
from loopos.training.update import NonFiniteStep, Update

CPU = torch.device("cpu")


@dataclass
class Batch:
    """An objective whose gradient is the batch itself: loss = Σ weight · batch."""

    weight: nn.Parameter
    weights: Mapping[str, float] = field(default_factory=lambda: {"loss": 1.0})

    def counts(self, batch: Tensor) -> Mapping[str, float]:
        return {"loss": 1.0}

    def loss(self, batch: Tensor) -> Mapping[str, Tensor]:
        return {"loss": (self.weight * batch.to(self.weight.dtype)).float().sum()}


def sgd(master_weights: MasterWeights, rate: float) -> OptimizerSet:
    return OptimizerSet(OptimizerSettings("sgd", rate), master_weights.parameters, head=())


def half_model(value: float, dtype: torch.dtype | None = torch.bfloat16) -> tuple[nn.Parameter, MasterWeights]:
    weight = nn.Parameter(torch.tensor([value]))
    return weight, MasterWeights({"w": weight}, may_train={"w"}, half=lambda name: dtype)


def test_steps_below_the_resolution_of_bf16_are_not_lost() -> None:
    # Between 1 and 2, bf16 has steps of 1/128: a step of 1/10,000 rounds away, a hundred of them do not.
    weight, master_weights = half_model(1.0)
    update = Update(master_weights, sgd(master_weights, 1e-4), max_gradient_norm=None)
    assert weight.dtype == torch.bfloat16
    for _ in range(100):
        update([torch.ones(1)], Batch(weight), 1.0)
    assert float(master_weights.parameters["w"].detach()) == pytest.approx(0.99, abs=1e-5)
    assert float(weight.detach()) == float(torch.tensor(0.99).bfloat16())
    # Without a master weight every step is lost.
    plain = torch.ones(1, dtype=torch.bfloat16)
    for _ in range(100):
        plain -= 1e-4
    assert float(plain) == 1.0


def test_gradients_of_micro_batches_are_summed_in_fp32() -> None:
    # 1 + 200 · 1/512: in bf16 each addition of 1/512 to 1 is lost.
    weight, master_weights = half_model(0.5)
    update = Update(master_weights, sgd(master_weights, 1.0), max_gradient_norm=None)
    parts = [torch.ones(1), *[torch.full((1,), 2.0**-9)] * 200]
    result = update(parts, Batch(weight), 1.0)
    # Each micro-batch counts 1, so the step's gradient is the sum over 201 parts; each share is rounded to bf16 once.
    assert result.gradient_norm == pytest.approx((1 + 200 / 512) / 201, rel=4e-3)
    gradient = master_weights.parameters["w"].grad
    assert gradient is not None
    assert gradient.dtype == torch.float32
    assert weight.grad is None


def test_a_parameter_that_no_micro_batch_reached_has_no_old_gradient() -> None:
    used, unused = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    master_weights = MasterWeights({"a": used, "b": unused}, may_train={"a", "b"}, half=lambda name: torch.bfloat16)
    update = Update(master_weights, sgd(master_weights, 0.1), max_gradient_norm=None)
    update([torch.ones(1)], Batch(unused), 1.0)
    before = master_weights.parameters["b"].detach().clone()
    update([torch.ones(1)], Batch(used), 1.0)
    assert torch.equal(master_weights.parameters["b"].detach(), before)
    assert float(master_weights.parameters["a"].detach()) == pytest.approx(0.9)


def test_frozen_parameters_are_rounded_and_never_move() -> None:
    a, b = nn.Parameter(torch.tensor([1.001])), nn.Parameter(torch.tensor([1.001]))
    master_weights = MasterWeights({"a": a, "b": b}, may_train={"a"}, half=lambda name: torch.bfloat16)
    assert set(master_weights.parameters) == {"a"}
    assert not b.requires_grad
    assert b.dtype == torch.bfloat16
    assert float(master_weights.parameters["a"].detach()) == pytest.approx(1.001)


def test_master_weights_of_other_names_are_refused() -> None:
    _, master_weights = half_model(1.0)
    with pytest.raises(ValueError, match="weights of other parameters"):
        master_weights.load({"v": torch.ones(1)})
    master_weights.load({"w": torch.tensor([3.0])})
    assert float(master_weights.parameters["w"].detach()) == 3.0


# fp16 --------------------------------------------------------------------------------------------------------------


@dataclass
class Linear16:
    """A product under autocast, so that its gradient passes through fp16."""

    weight: nn.Parameter
    weights: Mapping[str, float] = field(default_factory=lambda: {"loss": 1.0})

    def counts(self, batch: Tensor) -> Mapping[str, float]:
        return {"loss": 1.0}

    def loss(self, batch: Tensor) -> Mapping[str, Tensor]:
        return {"loss": nn.functional.linear(batch, self.weight).float().sum()}


def half_update(on_nonfinite: str = "stop") -> tuple[nn.Parameter, Update]:
    weight = nn.Parameter(torch.ones(1, 1))
    master_weights = MasterWeights({"w": weight}, may_train={"w"}, half=lambda name: None)
    update = Update(
        master_weights,
        sgd(master_weights, 0.5),
        max_gradient_norm=None,
        on_nonfinite=on_nonfinite,
        autocast=("cpu", torch.float16),
    )
    return weight, update


def test_an_overflow_lowers_the_loss_scale_and_takes_no_step() -> None:
    weight, update = half_update()
    assert update.loss_scale == 2.0**16
    # The scaled gradient is 65,536 · 3, above fp16's largest number, 65,504; at 2¹⁴ it is below.
    scales = []
    for _ in range(3):
        result = update([torch.full((1, 1), 3.0)], Linear16(weight), 1.0)
        scales.append((update.loss_scale, result.skipped))
    assert scales == [(2.0**15, True), (2.0**14, True), (2.0**14, False)]
    # One step of 0.5 · 3, whatever the scale was.
    assert float(weight.detach()) == pytest.approx(1.0 - 1.5)
    assert result.gradient_norm == pytest.approx(3.0)
    assert update.steps_since_overflow == 1


def test_the_scale_grows_again_after_two_thousand_steps() -> None:
    weight, update = half_update()
    update.loss_scale, update.steps_since_overflow = 2.0**10, 1999
    update([torch.zeros(1, 1)], Linear16(weight), 1.0)
    assert (update.loss_scale, update.steps_since_overflow) == (2.0**11, 2000)


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_gradients_that_overflow_at_a_scale_of_one_are_no_overflow_of_the_scale(policy: str) -> None:
    weight, update = half_update(policy)
    update.loss_scale = 1.0
    weight.register_hook(lambda gradient: torch.full_like(gradient, float("nan")))
    batch, objective = torch.ones(1, 1), Linear16(weight)
    if policy == "stop":
        with pytest.raises(NonFiniteStep, match=r"loss 1\.0, gradient norm nan"):
            update([batch], objective, 1.0)
    else:
        assert update([batch], objective, 1.0).skipped
    assert update.loss_scale == 1.0
    assert float(weight.detach()) == 1.0


def test_fp16_is_refused_where_there_is_no_cuda(tmp_path: Path, pico_folder: Path) -> None:
    with pytest.raises(UserError, match="only CUDA trains in fp16"):
        resolve("fp16", CPU)
    config = config_of(tmp_path / "run", pico_folder, class_rows(16), training={"precision": "fp16"})
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"training\.precision: got fp16, but the device is"):
            train(config)


# Devices and whole models ------------------------------------------------------------------------------------------


def test_a_device_is_chosen_by_name_and_a_missing_one_is_reported() -> None:
    assert resolve("fp32", CPU) == "fp32"
    assert resolve("bf16", CPU) == "bf16"
    assert resolve("auto", CPU) in ("fp32", "bf16")
    assert pick_device("cpu") == CPU
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"training\.device: got cuda"):
            pick_device("cuda")


def test_bf16_has_the_gradient_norm_of_fp32(tmp_path: Path, pico_folder: Path) -> None:
    norms, losses = {}, {}
    for precision in ("fp32", "bf16"):
        config = config_of(
            tmp_path / precision, pico_folder, class_rows(64), training={"precision": precision, "batch_size": 32}
        )
        tuner = prepared(config)
        dtypes = {parameter.dtype for parameter in tuner.model.backbone.parameters()}
        assert dtypes == {torch.bfloat16 if precision == "bf16" else torch.float32}
        assert tuner.model.head.weight.dtype == torch.float32
        fit = tuner.build_fit()
        result = fit.update(fit.batches.step(Cursor()), fit.objective, 1.0)
        norms[precision], losses[precision] = result.gradient_norm, result.losses["loss"]
    assert norms["bf16"] == pytest.approx(norms["fp32"], rel=0.01)
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.01)


def test_checkpoints_hold_fp32_master_weights_and_bf16_runs_learn(tmp_path: Path, pico_folder: Path) -> None:
    run = tmp_path / "run"
    train(config_of(run, pico_folder, class_rows(60), training={"precision": "bf16", "num_epochs": 3}))
    losses = [event["metrics"]["loss"] for event in events_of(run, "step")]
    assert losses[-1] < losses[0] / 4
    weights = last_weights(run)
    assert len(weights) == 21
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    # They have more precision than bf16.
    name = "backbone.model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(weights[name], weights[name].bfloat16().float())
