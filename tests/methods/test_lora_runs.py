"""Runs with variants of LoRA: every method exports what it trained, and the reference is where training starts."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft import PeftModel
from pico_runs import class_rows, config_of
from preference_runs import comparisons, events_of, ppo_config, preference_config, reward_config, thumbs, write_rows
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from loopos.config.methods import method_row
from loopos.config.sft import SftConfig
from loopos.methods.preference import PreferenceTrainer
from loopos.models.load import load_pretrained
from loopos.training.progress import RunProgress

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.arange(3, 23)[None]
PISSA = {"init_lora_weights": "pissa", "lora_plus_ratio": 4.0}
DORA = {"use_dora": True, "use_rslora": True, "target_modules": r".*(q|v|up)_proj"}


def sft_config(run: Path, weights: Path, training: dict[str, Any], **data: Any) -> SftConfig:
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in comparisons(24)]
    file = write_rows(run.parent / f"{run.name}.jsonl", rows)
    small = {"learning_rate": 1e-2, "batch_size": 8, "num_epochs": 2, "precision": "fp32", "seed": 5}
    return SftConfig.model_validate(
        {
            "computation": {"mode": "posttraining", "method": "sft"},
            "training": {**small, **training},
            "data": {
                "pretrained_weights": str(weights),
                "training_data": str(file),
                "output_dir": str(run),
                "validation_share": 0.2,
                **data,
            },
            "generation": {"max_new_tokens": 6},
        }
    )


def made(method: str, run: Path, weights: Path, training: dict[str, Any], **data: Any) -> Any:
    """A short run of any method."""
    if method == "fine_tuning":
        return config_of(run, weights, class_rows(24), training={"num_epochs": 1, **training}, data=data)
    if method == "reward_model":
        return reward_config(run, weights, training={"max_steps": 4, **training}, data=data)
    if method == "sft":
        return sft_config(run, weights, training, **data)
    if method == "ppo":
        functions = ["preference_runs:early_letters"]
        return ppo_config(run, weights, functions=functions, training={"value_model": "policy", **training}, data=data)
    rows = thumbs(40) if method == "kto" else None
    return preference_config(run, weights, method, rows=rows, training={"max_steps": 4, **training}, data=data)


def trained(config: Any) -> Any:
    trainer = method_row(config.computation.method).trainer_class(config, progress=RunProgress(quiet=True))
    with patch("loopos.methods.base.write_report"):
        trainer.train()
    return trainer


@torch.no_grad()
def hidden(model: Any) -> Tensor:
    found: Tensor = model.eval()(input_ids=IDS, output_hidden_states=True).hidden_states[-1]
    return found


def opened(base: Path, adapter: Path) -> Any:
    """A base with an adapter, as peft opens them."""
    causal = "CAUSAL_LM" in (adapter / "adapter_config.json").read_text(encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = AutoModelForCausalLM if causal else AutoModel
        return PeftModel.from_pretrained(kind.from_pretrained(base, dtype=torch.float32), adapter)


@pytest.mark.parametrize(
    ("method", "lora"),
    [(method, PISSA) for method in ("fine_tuning", "reward_model", "sft", "dpo", "kto", "ppo")]
    + [(method, DORA) for method in ("fine_tuning", "sft", "ppo")],
    ids=lambda value: value if isinstance(value, str) else ("pissa" if value is PISSA else "dora"),
)
def test_the_exported_model_is_the_base_with_the_exported_adapter(
    method: str, lora: dict[str, Any], tmp_path: Path, pico_folder: Path
) -> None:
    run = tmp_path / "run"
    trained(made(method, run, pico_folder, {"trainable": "lora", "lora": {"rank": 4, **lora}}))
    model = hidden(load_pretrained(str(run / "model")).model)
    torch.testing.assert_close(hidden(opened(pico_folder, run / "adapter")), model, atol=2e-4, rtol=0)
    assert (model - hidden(AutoModel.from_pretrained(pico_folder))).abs().max() > 1e-2


def started(config: Any) -> PreferenceTrainer:
    """A trainer before its first step, as `train` builds it."""
    trainer: PreferenceTrainer = method_row(config.computation.method).trainer_class(
        config, progress=RunProgress(quiet=True)
    )
    trainer.device = torch.device("cpu")
    trainer.load_data()
    trainer.build_model()
    return trainer


@pytest.mark.parametrize("lora", [{}, PISSA, DORA, {"init_lora_weights": "olora", "use_dora": True}])
def test_the_reference_of_dpo_is_the_start(lora: dict[str, Any], tmp_path: Path, pico_folder: Path) -> None:
    """Without the rule of the first step: the adapters' own reference gives rewards of 0 and a loss of log 2."""
    settings = {"trainable": "lora", "lora": {"rank": 4, **lora}}
    trainer = started(preference_config(tmp_path / "run", pico_folder, training=settings))
    batch = trainer.rows(trainer.train_rows)(list(range(8)))
    with torch.no_grad():
        sums, counts = trainer.objective.loss(batch), trainer.objective.counts(batch)
    assert not batch.is_first
    exact = 0 if not lora.get("use_dora") else 1e-5
    assert float(sums["loss"]) / counts["loss"] == pytest.approx(math.log(2), abs=1e-7 + exact)
    for name in ("rewards_chosen", "rewards_rejected", "reward_margin"):
        assert float(sums[name]) == pytest.approx(0, abs=exact)


@pytest.mark.parametrize("value_model", ["policy", "reward"])
def test_the_models_of_ppo_share_a_base_whose_start_was_taken_out(
    value_model: str, tmp_path: Path, pico_folder: Path
) -> None:
    """Policy with PiSSA; the reference is the base, the reward and value models are adapters over it."""
    reward = tmp_path / "reward"
    trained(reward_config(reward, pico_folder, training={"trainable": "lora", "num_epochs": 1}))
    runs = {}
    for name, lora in {"plain": {"rank": 4}, "pissa": {"rank": 4, **PISSA}}.items():
        training = {"trainable": "lora", "lora": lora, "value_model": value_model, "learning_rate": 1e-9}
        training["max_iterations"] = 2
        config = ppo_config(tmp_path / name, pico_folder, reward_model=reward, training=training)
        trainer = trained(config)
        assert trainer.roles.summary.startswith("models: one copy of the weights serves as policy, reference")
        runs[name] = events_of(tmp_path / name, "rollout")
    for plain, pissa in zip(runs["plain"], runs["pissa"], strict=True):
        for key in ("reward", "kl", "response_length"):
            assert pissa[key] == pytest.approx(plain[key], abs=1e-4)


def test_a_reward_model_of_dora_has_weights_of_its_own(tmp_path: Path, pico_folder: Path) -> None:
    reward = tmp_path / "reward"
    trained(
        reward_config(reward, pico_folder, training={"trainable": "lora", "num_epochs": 1, "lora": {"use_dora": True}})
    )
    training = {"trainable": "lora", "value_model": "shared", "max_iterations": 1}
    trainer = trained(ppo_config(tmp_path / "run", pico_folder, reward_model=reward, training=training))
    assert trainer.roles.summary.startswith("models: 2 copies of the weights serve as")
