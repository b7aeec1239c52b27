"""Losses and gradients of the group algorithms beside TRL's GRPOTrainer and RLOOTrainer, on the same rollouts and
weights, in fp32. Slow, and only where TRL is installed.

The rollouts are those of a run here; TRL's trainer gets them as the batch that its own generation would make, and
computes its loss with its own code. Its advantages are computed by its formula from the same scores.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from online_runs import online_config, trained
from preference_runs import ASKED
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from loopos.methods.ppo import PpoTrainer

pytest.importorskip("trl")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

# Ours → TRL's arguments.
CASES: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo", "scale_rewards": "group"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "dapo": {"loss_type": "dapo", "scale_rewards": "group", "epsilon_high": 0.28},
    "cispo": {"loss_type": "cispo", "scale_rewards": "group", "epsilon_high": 5.0},
    "gspo": {
        "loss_type": "grpo", "importance_sampling_level": "sequence", "scale_rewards": "group",
    },
    "rloo": {},
}  # fmt: skip
PLAIN_KL = {"beta": 0.1, "use_bias_correction_kl": False}
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{name: (name, {}, arguments) for name, arguments in CASES.items() if name != "gspo"},
    # Later all tokens are clipped, and no gradient is left.
    "gspo": ("gspo", {"max_steps": 4}, {**CASES["gspo"], "epsilon": 3e-4, "epsilon_high": 4e-4}),
    "grpo with KL": ("grpo", {"kl_coefficient": 0.1}, {**CASES["grpo"], **PLAIN_KL}),
    "grpo with weighted KL": (
        "grpo",
        {"kl_coefficient": 0.1, "kl_importance": True},
        {**CASES["grpo"], **PLAIN_KL, "use_bias_correction_kl": True},
    ),
    "grpo, delta": ("grpo", {"dual_clip": 1.3}, {**CASES["grpo"], "delta": 1.3}),
    "grpo, batch": ("grpo", {"advantage_scale": "batch"}, {**CASES["grpo"], "scale_rewards": "batch"}),
    "grpo, entropy": ("grpo", {"entropy_coefficient": 0.02}, {**CASES["grpo"], "entropy_coef": 0.02}),
    "rloo with KL": ("rloo", {"kl_coefficient": 0.1}, {"beta": 0.1}),
}
SIZE = 4
# The ratio of a whole response leaves the clip sooner.
RATES = {"rloo": 5e-5}


def started(run: Path, weights: Path, name: str, training: dict[str, Any]) -> PpoTrainer:
    """A run that ends within its second iteration, after steps that moved the policy from its old one."""
    config = online_config(
        run, weights, name, reward="preference_runs:length_of",
        training={
            "max_steps": 9, "inner_epochs": 5, "learning_rate": RATES.get(name, 5e-3), "batch_size": 12, "dynamic_sampling": 0,
            "save_every": "never", "kl_coefficient": 0.0, **training,
        },
        generation={"max_new_tokens": 12, "overlong_buffer": None},
    )  # fmt: skip
    return trained(config)


def trl_batch(method: PpoTrainer) -> tuple[dict[str, Any], torch.Tensor]:
    """TRL's padded batch of the rollouts, and their scores."""
    experience = method.batches.experience
    assert experience is not None
    lengths = [len(response) for response in experience.responses]
    prompts = [torch.tensor(prompt).flip(0) for prompt in experience.prompts]
    prompt_ids = pad_sequence(prompts, batch_first=True).flip(1)
    prompt_mask = pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True).flip(1)
    responses = [torch.tensor(response) for response in experience.responses]
    old = pad_sequence(list(torch.split(experience.old_logprobs, lengths)), batch_first=True)
    mask = pad_sequence([torch.ones_like(r) for r in responses], batch_first=True)
    batch = {
        "prompt_ids": prompt_ids, "prompt_mask": prompt_mask, "completion_ids": pad_sequence(responses, batch_first=True),
        "completion_mask": mask, "num_items_in_batch": mask.sum(), "old_per_token_logps": old, "old_logps": old.sum(1),
    }  # fmt: skip
    texts = [method.tokenizer.decode(response, skip_special_tokens=True) for response in experience.responses]
    scores = torch.tensor([len(text) / 10 for text in texts])
    if experience.reference_logprobs is not None:
        batch["ref_per_token_logps"] = pad_sequence(
            list(torch.split(experience.reference_logprobs, lengths)), batch_first=True
        )
    return batch, scores


def their_advantages(batch: dict[str, Any], scores: torch.Tensor, arguments: dict[str, Any], *, is_rloo: bool) -> Any:
    if is_rloo:
        if "beta" in arguments:
            kl = (batch["old_per_token_logps"] - batch["ref_per_token_logps"]) * batch["completion_mask"]
            scores = scores - arguments["beta"] * kl.sum(1)
        grouped = scores.view(-1, SIZE)
        return scores - ((grouped.sum(1, keepdim=True) - grouped) / (SIZE - 1)).flatten()
    grouped = scores.view(-1, SIZE)
    advantages = scores - grouped.mean(1).repeat_interleave(SIZE)
    if arguments["scale_rewards"] == "group":
        advantages = advantages / (grouped.std(1).repeat_interleave(SIZE) + 1e-4)
    elif arguments["scale_rewards"] == "batch":
        advantages = advantages / (scores.std() + 1e-4)
    return advantages


def their_trainer(run: Path, weights: Path, arguments: dict[str, Any], *, is_rloo: bool) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    policy = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    shared = {
        "output_dir": str(run / "trl"), "per_device_train_batch_size": 12, "num_generations": SIZE, "report_to": [],
        "use_cpu": True, "bf16": False, "disable_tqdm": True, "max_completion_length": 12,
        "gradient_checkpointing": False,
    }  # fmt: skip
    make, configure = (RLOOTrainer, RLOOConfig) if is_rloo else (GRPOTrainer, GRPOConfig)
    settings = configure(**{"beta": 0.0, **shared, **arguments})
    trainer = make(
        model=policy, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=settings,
        train_dataset=Dataset.from_list([{"prompt": text} for text in ASKED]),
        processing_class=AutoTokenizer.from_pretrained(weights, padding_side="left"),
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    return trainer


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_gradients(variant: str, tmp_path: Path, pico_folder: Path) -> None:
    name, training, arguments = VARIANTS[variant]
    is_rloo = name == "rloo"
    method = started(tmp_path / "run", pico_folder, name, training)
    experience = method.batches.experience
    assert experience is not None
    trainer = their_trainer(tmp_path / "run", pico_folder, arguments, is_rloo=is_rloo)
    batch, scores = trl_batch(method)
    batch["advantages"] = their_advantages(batch, scores, arguments, is_rloo=is_rloo)

    rows = experience.rows(torch.device("cpu"), share_prompts=True)
    own = [rows([0, 1, 2, 5]), rows([3, 4, *range(6, 12)])]
    objective = method.objective
    counts = {key: sum(objective.counts(each)[key] for each in own) for key in objective.weights}
    sums = [objective.loss(each) for each in own]
    loss = sum(objective.weights[key] * each[key] / counts[key] for each in sums for key in objective.weights)
    embedding = next(
        value for key, value in method.roles.actor_critic.named_parameters() if "embed_tokens" in key
    )  # fmt: skip
    gradient = torch.autograd.grad(loss, embedding)[0]
    trainer.model.train()
    their_loss = trainer._compute_loss(trainer.model, batch)
    their_loss.backward()
    their_gradient = trainer.model.get_input_embeddings().weight.grad
    scale = float(their_gradient.abs().max())
    largest = float((gradient - their_gradient).abs().max()) / scale
    clipped = sum(float(each["clip_share"]) for each in sums) / len(experience.old_logprobs)
    print(
        f"\n| {variant} | {float(loss.detach()):.7f} | {their_loss.item():.7f} | "
        f"{abs(float(loss.detach()) - their_loss.item()):.1e} | {largest:.1e} | {clipped:.0%} clipped |"
    )
    assert scale > 1e-4
    assert 0 < clipped < 0.95
    assert float(loss.detach()) == pytest.approx(their_loss.item(), rel=1e-5, abs=1e-6)
    assert largest < 1e-4
