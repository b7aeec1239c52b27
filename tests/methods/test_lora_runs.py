"""Runs with variants of LoRA: every method exports what it trained, and the reference is where training starts."""

from __future__ import annotations

import math
import shutil
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft import PeftModel
from pico_runs import class_rows, config_of, save_pico, slow_but
from preference_runs import comparisons, events_of, ppo_config, preference_config, reward_config, thumbs, write_rows
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

import loopos
from loopos.config.diagnostics import ConfigError, UserError
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
    slow_but(
        [("fine_tuning", PISSA), ("dpo", PISSA), ("sft", DORA)],
        [(method, PISSA) for method in ("fine_tuning", "reward_model", "sft", "dpo", "kto", "ppo")]
        + [(method, DORA) for method in ("fine_tuning", "sft", "ppo")],
    ),
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


@pytest.mark.slow
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


@pytest.fixture(scope="module")
def sft_run(tmp_path_factory: pytest.TempPathFactory, pico_folder: Path) -> Path:
    """A run that trained adapters on good answers."""
    run = tmp_path_factory.mktemp("sft") / "run"
    lora = {"rank": 4, "alpha": 12.0, "rank_pattern": {"up_proj": 2}, "exclude_modules": ["k_proj"]}
    trained(sft_config(run, pico_folder, {"trainable": "lora", "lora": lora, "num_epochs": 4}))
    return run


STARTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all weights": ({"trainable": "all"}, {}),
    "adapters on top": ({"trainable": "lora", "lora": {"rank": 3, "alpha": 5.0}}, {}),
    "PiSSA on top": ({"trainable": "lora", "lora": {"rank": 3, **PISSA}}, {}),
    "DoRA on top": ({"trainable": "lora", "lora": {"rank": 3, **DORA}}, {}),
    "the adapter itself": ({"trainable": "lora"}, {"adapter": "run"}),
}


@torch.no_grad()
def logprobs(model: Any, row: Any, response: list[int]) -> float:
    ids = torch.tensor([[*row.prompt, *response]])
    logits = model(input_ids=ids).logits[0, len(row.prompt) - 1 : -1].float()
    return float(torch.log_softmax(logits, -1).gather(1, torch.tensor(response)[:, None]).sum())


@pytest.mark.parametrize("name", slow_but("adapters on top", STARTS))
def test_from_an_sft_adapter_the_reference_is_the_base_with_it(
    name: str, sft_run: Path, tmp_path: Path, pico_folder: Path
) -> None:
    """Whatever trains: rewards are 0 before the first step, log ρ is that of base + adapter as peft opens them, and the
    exported model is what peft makes of the exported adapter over the base.
    """
    training, data = STARTS[name]
    data = {"adapter": str(sft_run)} if data else {}
    weights = pico_folder if data else sft_run / "adapter"
    settings = preference_config(tmp_path / "run", weights, training={"max_steps": 4, **training}, data=data)
    trainer = started(settings)
    batch = trainer.rows(trainer.train_rows)(list(range(6)))
    assert not batch.is_first
    with torch.no_grad():
        sums = trainer.objective.loss(batch)
        reference = batch.reference
        if reference is None:
            assert trainer.objective.reference is not None
            reference = trainer.objective.reference(batch)
    for key in ("rewards_chosen", "rewards_rejected", "reward_margin"):
        assert float(sums[key]) == pytest.approx(0, abs=1e-5)
    per_response = batch.per_response(reference)
    both = [
        logprobs(opened(pico_folder, sft_run / "adapter").eval(), row, response)
        for row in trainer.train_rows[:6]
        for response in row.responses
    ]
    torch.testing.assert_close(sorted(per_response.tolist()), sorted(both), atol=2e-3, rtol=1e-4)
    trained(
        settings.model_copy(update={"data": settings.data.model_copy(update={"output_dir": str(tmp_path / "own")})})
    )
    if name == "all weights":
        return
    model = hidden(load_pretrained(str(tmp_path / "own" / "model")).model)
    found = load_pretrained(str(tmp_path / "own" / "adapter"))
    torch.testing.assert_close(hidden(found.model), model, atol=2e-4, rtol=0)
    if name != "DoRA on top":
        torch.testing.assert_close(hidden(opened(pico_folder, tmp_path / "own" / "adapter")), model, atol=2e-4, rtol=0)
    assert (model - hidden(load_pretrained(str(sft_run / "model")).model)).abs().max() > 1e-2


@pytest.mark.parametrize(
    "method", slow_but(["reward_model", "sft"], ["fine_tuning", "reward_model", "sft", "kto", "ppo"])
)
def test_every_method_continues_an_adapter(method: str, sft_run: Path, tmp_path: Path, pico_folder: Path) -> None:
    run = tmp_path / "run"
    trained(made(method, run, pico_folder, {"trainable": "lora"}, adapter=str(sft_run / "adapter")))
    model = hidden(load_pretrained(str(run / "model")).model)
    torch.testing.assert_close(hidden(opened(pico_folder, run / "adapter")), model, atol=2e-4, rtol=0)
    before, after = (load_file(each / "adapter" / "adapter_model.safetensors") for each in (sft_run, run))
    assert [list(each.shape) for each in before.values()] == [list(each.shape) for each in after.values()]
    start = hidden(load_pretrained(str(sft_run / "model")).model)
    base = hidden(load_pretrained(str(pico_folder)).model)
    assert 0 < (model - start).norm() < (model - base).norm()


def test_a_continued_run_resumes_and_knows_its_adapter(sft_run: Path, tmp_path: Path, pico_folder: Path) -> None:
    constant = {"trainable": "lora", "schedule": "constant", "warmup": 0}

    def config(name: str, steps: int, adapter: Path) -> Any:
        return sft_config(tmp_path / name, pico_folder, {**constant, "max_steps": steps}, adapter=str(adapter))

    trained(config("whole", 4, sft_run))
    trained(config("cut", 2, sft_run))
    shutil.copytree(sft_run / "adapter", tmp_path / "moved")
    with patch("loopos.methods.base.write_report"):
        kind = method_row("sft").trainer_class
        with pytest.raises(UserError, match=r"data\.adapter"):
            kind(config("cut", 4, tmp_path / "whole"), progress=RunProgress(quiet=True)).train(resume=True)
        kind(config("cut", 4, tmp_path / "moved"), progress=RunProgress(quiet=True)).train(resume=True)
    for file in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.slow
def test_an_adapter_of_dora_is_continued_with_its_lengths(tmp_path: Path, pico_folder: Path) -> None:
    training = {"trainable": "lora", "lora": {"rank": 4, **DORA}}
    trained(sft_config(tmp_path / "first", pico_folder, training))
    settings = preference_config(
        tmp_path / "run", pico_folder, training={"trainable": "lora"}, data={"adapter": str(tmp_path / "first")}
    )
    trainer = started(settings)
    batch = trainer.rows(trainer.train_rows)([0, 1, 2])
    with torch.no_grad():
        sums = trainer.objective.loss(batch)
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "first" / "model", dtype=torch.float32)
    chosen = sum(logprobs(first, row, row.responses[0]) for row in trainer.train_rows[:3])
    assert float(sums["logprob_chosen"]) == pytest.approx(chosen, abs=1e-2)
    assert (float(sums["rewards_chosen"]), float(sums["rewards_rejected"])) == (0.0, 0.0)


def test_what_cannot_be_continued_is_refused(sft_run: Path, tmp_path: Path, pico_folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    other = tmp_path / "other"
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"], task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(AutoModelForCausalLM.from_pretrained(pico_folder), lora).save_pretrained(other)
    with pytest.raises(
        UserError, match=r"data\.adapter: .*modules_to_save.* cannot be continued; expected LoRA or DoRA"
    ):
        started(
            preference_config(tmp_path / "a", pico_folder, training={"trainable": "lora"}, data={"adapter": str(other)})
        )
    small = save_pico("gpt2", tmp_path / "gpt2", pico_folder)
    with pytest.raises(UserError, match=r"data\.adapter: .* changes model\.layers\.0.*c_attn"):
        started(
            preference_config(tmp_path / "b", small, training={"trainable": "lora"}, data={"adapter": str(sft_run)})
        )
    written = {
        "computation": {"mode": "posttraining", "method": "dpo"},
        "training": {"learning_rate": 1e-4, "trainable": "lora", "lora": {"rank": 8}},
        "data": {
            "pretrained_weights": str(pico_folder), "adapter": str(sft_run),
            "preference_data": str(tmp_path / "a.jsonl"), "output_dir": str(tmp_path / "out"),
        },
    }  # fmt: skip
    for change, message in (
        ({}, "training.lora.rank: got 8 with data.adapter; expected no such key: the adapter has its own"),
        ({"training": {"learning_rate": 1e-4}}, "data.adapter: got an adapter with trainable all"),
        (
            {"data": {**written["data"], "adapter": str(tmp_path)}},
            "which has no adapter_config.json; expected a PEFT folder",
        ),
    ):
        with pytest.raises(ConfigError) as problem:
            loopos.read_config({**written, **change})
        assert message in str(problem.value)
