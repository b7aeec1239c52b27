"""Process reward models through their real entry point, on the pico model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from preference_runs import reward_config
from transformers import AutoConfig, AutoModelForTokenClassification

from loopos.config.reward_model import RewardModelConfig
from loopos.data.stepwise_tokens import StepwiseRows
from loopos.methods.reward_model import RewardModelTrainer
from loopos.training.objectives import StepObjective
from loopos.training.progress import RunProgress

RIGHT = ("we change it for you", "it comes today", "thank you")
WRONG = ("nobody replies here", "just wait", "never again")


def answers(number: int) -> list[dict[str, Any]]:
    """Three steps each; after the first wrong one, every second row says no more."""
    rows: list[dict[str, Any]] = []
    for i in range(number):
        error = i % 4
        steps = [(RIGHT if step < error else WRONG)[(i + step) % 3] for step in range(3)]
        labels: list[bool | None] = [step < error for step in range(3)]
        if i % 2:
            labels = [label if step <= error else None for step, label in enumerate(labels)]
        rows.append({"prompt": f"where is my parcel {i}", "completions": steps, "labels": labels})
    return rows


def process_config(run: Path, weights: Path, **sections: Any) -> RewardModelConfig:
    rows = sections.pop("rows", None)
    return reward_config(run, weights, rows=answers(40) if rows is None else rows, **sections)


def trained(config: RewardModelConfig) -> RewardModelTrainer:
    method = RewardModelTrainer(config, progress=RunProgress(quiet=True))
    method.train()
    return method


def two_classes(method: RewardModelTrainer, weights: Path) -> Any:
    """transformers' token classifier of two classes with the model's weights and the head (−w/2, w/2)."""
    # The model's own config names an attention that only LoopOS has.
    config = AutoConfig.from_pretrained(weights, num_labels=2)
    plain = AutoModelForTokenClassification.from_config(config).eval()
    getattr(plain, plain.base_model_prefix).load_state_dict(method.model.backbone.model.state_dict())
    with torch.no_grad():
        plain.score.weight.copy_(torch.cat([-method.model.head.weight / 2, method.model.head.weight / 2]))
        plain.score.bias.zero_()
    return plain


def test_loss_and_gradients_are_those_of_transformers_token_classifier(tmp_path: Path, pico_folder: Path) -> None:
    """The two-class cross-entropy at the separators, which TRL's PRMTrainer minimized."""
    method = trained(process_config(tmp_path / "run", pico_folder, training={"max_steps": 2}))
    rows = method.train_rows[:6]
    batch = StepwiseRows(rows)(range(6))
    objective = StepObjective(method.model)
    for parameter in method.model.parameters():
        parameter.requires_grad_(True)
    method.model.zero_grad()
    loss = objective.loss(batch)["loss"] / objective.counts(batch)["loss"]
    loss.backward()
    plain, longest = two_classes(method, pico_folder), max(len(row.ids) for row in rows)
    labels = torch.full((6, longest), -100)
    for number, row in enumerate(rows):
        for end, label in zip(row.ends, row.labels, strict=True):
            labels[number, end] = -100 if label is None else int(label)
    ids = torch.tensor([[*row.ids, *[0] * (longest - len(row.ids))] for row in rows])
    mask = torch.tensor([[1] * len(row.ids) + [0] * (longest - len(row.ids)) for row in rows])
    expected = plain(input_ids=ids, attention_mask=mask, labels=labels).loss
    expected.backward()
    assert sum(label is None for row in rows for label in row.labels) > 0
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    theirs = dict(getattr(plain, plain.base_model_prefix).named_parameters())
    ours = dict(method.model.backbone.model.named_parameters())
    assert len(ours) == len(theirs) > 10
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-6, rtol=1e-4)
    # The head is half the difference of the rows.
    assert method.model.head.weight.grad is not None
    difference = (plain.score.weight.grad[1:] - plain.score.weight.grad[:1]) / 2
    torch.testing.assert_close(method.model.head.weight.grad, difference, atol=1e-6, rtol=1e-4)
