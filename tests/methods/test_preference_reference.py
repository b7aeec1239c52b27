"""A reference with its own copy of the trained weights: fixed, or moving towards the policy (TR-DPO)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_runs import slow_but
from preference_runs import events_of, thumbs
from preference_runs import preference_config as config
from worlds import run_world

import loopos
from loopos.config.diagnostics import ConfigError
from loopos.config.methods import method_row
from loopos.config.preference import PreferenceConfig
from loopos.planning.dry_run import plan_of
from loopos.training.progress import RunProgress

LORA = {"trainable": "lora", "lora": {"rank": 4}}
TRAINABLE = {"all": {}, "lora": LORA}


def trained(settings: PreferenceConfig) -> Any:
    method = method_row(settings.computation.method).trainer_class(settings, progress=RunProgress(quiet=True))
    method.train()
    return method


def steps(run: Path) -> list[dict[str, Any]]:
    return events_of(run, "step")


def figures(run: Path) -> list[tuple[float, ...]]:
    names = ("loss", "reward_margin", "rewards_chosen", "gradient_norm")
    return [tuple(step[name] for name in names) for step in steps(run)]


@pytest.mark.parametrize("trainable", slow_but("all", TRAINABLE))
def test_a_copy_is_the_same_reference(trainable: str, tmp_path: Path, pico_folder: Path) -> None:
    """As the cached log-probabilities, or as the weights without the adapters."""
    training = {"max_steps": 5, "learning_rate": 1e-3, **TRAINABLE[trainable]}
    for reference in ("auto", "copy"):
        run = tmp_path / reference
        trained(config(run, pico_folder, preference={"reference": reference}, training=training))
    assert len(figures(tmp_path / "copy")) == 5
    for one, other in zip(figures(tmp_path / "auto"), figures(tmp_path / "copy"), strict=True):
        assert one == pytest.approx(other, abs=1e-5, rel=1e-4)


@pytest.mark.parametrize("trainable", slow_but("lora", TRAINABLE))
@pytest.mark.parametrize("method", slow_but("dpo", ["dpo", "kto"]))
def test_rewards_are_0_again_when_the_policy_replaces_the_reference(
    method: str, trainable: str, tmp_path: Path, pico_folder: Path
) -> None:
    training = {"max_steps": 7, "learning_rate": 1e-3, "validate_every": 3, **TRAINABLE[trainable]}
    section = {"sync_reference": {"every": 3, "alpha": 1.0}}
    rows = thumbs(40) if method == "kto" else None
    trained(config(tmp_path / "run", pico_folder, method, rows=rows, preference=section, training=training))
    names = ("rewards_chosen", "rewards_rejected") if method == "dpo" else ("rewards_desirable", "rewards_undesirable")
    zero = [all(step[name] == 0 for name in names) for step in steps(tmp_path / "run")]
    assert zero == [True, False, False, True, False, False, True]
    # The reference moves before the validation of the same step.
    validated = [all(event[name] == 0 for name in names) for event in events_of(tmp_path / "run", "validation")]
    assert validated == [True, True, True, False]


@pytest.mark.parametrize("trainable", slow_but("lora", TRAINABLE))
def test_the_mix_is_weight_by_weight(trainable: str, tmp_path: Path, pico_folder: Path) -> None:
    """ρ ← 0.25·π + 0.75·ρ after steps 2 and 4, from the weights of runs that end there."""
    training = {"optimizer": "sgd", "learning_rate": 1e-2, "schedule": "constant", "warmup": 0, **TRAINABLE[trainable]}
    section = {"sync_reference": {"every": 2, "alpha": 0.25}}
    policies = []
    for number in (0, 2, 4):
        run = tmp_path / f"of{number}"
        # One step with a learning rate of next to nothing stands for the start.
        own = {**training, "max_steps": max(1, number), **({} if number else {"learning_rate": 1e-30})}
        method = trained(config(run, pico_folder, preference=section, training={**own, "validate_every": "never"}))
        policies.append(copy.deepcopy({**method.trained.master_weights.parameters}))
    reference = method.objective.reference.tensors()
    moved = 0.0
    for name, start in policies[0].items():
        expected = 0.25 * policies[1][name] + 0.75 * start
        expected = (0.25 * policies[2][name] + 0.75 * expected).detach()
        torch.testing.assert_close(reference[name], expected, atol=1e-7, rtol=1e-6)
        moved = max(moved, float((expected - start.detach()).abs().max()))
    assert moved > 1e-5


@pytest.mark.slow
def test_two_processes_are_the_same_run(tmp_path: Path, pico_folder: Path) -> None:
    section = {"sync_reference": {"every": 2, "alpha": 0.5}}
    for name, size in {"one": 8, "two": 4}.items():
        training = {"batch_size": size, "max_steps": 5, "optimizer": "sgd", "learning_rate": 0.05}
        settings = config(tmp_path / name, pico_folder, preference=section, training=training)
        if name == "one":
            trained(settings)
        else:
            run_world(2, [(settings, False)])
    for one, other in zip(figures(tmp_path / "one"), figures(tmp_path / "two"), strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_half_precision_takes_the_policy_s_own_format(tmp_path: Path, pico_folder: Path) -> None:
    """The sums are fp32, and a replaced reference is rounded as the policy is: its rewards are exactly 0."""
    training = {"max_steps": 4, "learning_rate": 1e-3, "precision": "bf16"}
    section = {"sync_reference": {"every": 2, "alpha": 1.0}}
    method = trained(config(tmp_path / "run", pico_folder, preference=section, training=training))
    zero = [step["rewards_chosen"] == step["rewards_rejected"] == 0 for step in steps(tmp_path / "run")]
    assert zero == [True, False, True, False]
    assert {tensor.dtype for tensor in method.objective.reference.tensors().values()} == {torch.float32}


@pytest.mark.parametrize(
    ("preference", "distributed", "message"),
    [
        ({"sync_reference": {"every": 2}, "reference": "cached"}, {}, 'preference.sync_reference: got with reference "cached"'),
        ({"sync_reference": {}}, {"mode": "shard"}, "preference.sync_reference: got a copy of a sharded model"),
        ({"reference": "copy"}, {"tensor_parallel": 2}, "preference.reference: got a copy of a sharded model"),
        ({"sync_reference": {"alpha": 0}}, {}, "preference.sync_reference.alpha: got 0"),
    ],
)  # fmt: skip
def test_mistakes_name_their_key(
    preference: dict[str, Any], distributed: dict[str, Any], message: str, tmp_path: Path, pico_folder: Path
) -> None:
    written = config(tmp_path / "run", pico_folder).model_dump(mode="json")
    written |= {"preference": preference, "distributed": distributed}
    with pytest.raises(ConfigError) as problem:
        loopos.read_config(written)
    assert message in str(problem.value)


def test_the_plan_counts_the_copy(tmp_path: Path, pico_folder: Path) -> None:
    plans = {}
    for name, section in {"cached": {}, "copy": {"reference": "copy"}, "sync": {"sync_reference": {}}}.items():
        settings = config(tmp_path / "run", pico_folder, preference=section)
        plans[name] = plan_of(settings, trust_remote_code=False)
    trained_bytes = 4 * plans["copy"]["model"]["trained"]
    assert "reference" not in plans["cached"]["memory"]
    assert plans["copy"]["memory"]["reference"] == plans["sync"]["memory"]["reference"] == trained_bytes
    assert plans["copy"]["disk"]["checkpoint"] == plans["cached"]["disk"]["checkpoint"]
    assert plans["sync"]["disk"]["checkpoint"] == plans["cached"]["disk"]["checkpoint"] + trained_bytes


def test_a_key_without_effect_is_named(tmp_path: Path, pico_folder: Path) -> None:
    settings = config(tmp_path / "run", pico_folder, "simpo", preference={"sync_reference": {"every": 2}})
    assert "preference.sync_reference has no effect: simpo has no reference" in "\n".join(settings.notes())
