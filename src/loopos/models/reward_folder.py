"""A trained reward model, opened: one that scores, and the adapter that it was trained as, if it was one; and several
as one.

Enters: the folder of a run, or of its model. Leaves: the model in fp32 with its tokenizer and how its scores are read.
Left out: writing it (`task_folder.py`), normalising (`evaluation.reward_scores`).
Letters: T tokens, N responses, k heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from loopos.config.faults import UserError
from loopos.functional.packing import PackedLayout
from loopos.models.heads import PooledModel
from loopos.models.model_folder import kind_of, model_folder, read_description
from loopos.models.task_folder import open_task_model


@dataclass(frozen=True)
class OpenedReward:
    """`model` gives raw scores `[N, k]`. `description`: what training wrote of it. `adapter`: the PEFT folder of the
    adapter that is merged in the model, over the weights with the fingerprint `description["base"]`; None without one.
    """

    model: PooledModel
    tokenizer: PreTrainedTokenizerBase
    description: Mapping[str, Any]
    adapter: Path | None


def open_reward_model(place: str | Path) -> OpenedReward:
    """place: the output folder of a reward_model run, or its folder model/. Raises `UserError` for another one."""
    folder = model_folder(place)
    description = read_description(folder)
    if kind_of(description) != "reward":
        raise UserError(
            f"{folder}: a model of task {description.get('task', 'text generation')}; wanted a reward model, trained "
            'with "method": "reward_model"'
        )
    model, tokenizer, _ = open_task_model(folder)
    adapter = folder.parent / "adapter"
    return OpenedReward(model, tokenizer, description, adapter if adapter.is_dir() else None)


class RewardEnsemble(nn.Module):
    """Several reward models as one, whose heads are those of all."""

    def __init__(self, members: Sequence[PooledModel]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, ids: Tensor, layout: PackedLayout) -> Tensor:
        """ids `[T]`, layout of N responses → raw scores `[N, Σ k]` in fp32, in the members' order."""
        return torch.cat([member(ids, layout) for member in self.members], dim=1)


def descriptions_together(descriptions: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """How an ensemble's scores are read: each head by its own mean and deviation."""
    names = ("score_mean", "score_std")
    return {name: [value for each in descriptions for value in each[name]] for name in names}


def check_same_tokens(policy: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, told: str) -> None:
    """Raises `UserError` unless both make the same tokens, so that one may read what the other wrote."""
    if policy.get_vocab() != other.get_vocab():
        raise UserError(
            f"{told}: its tokenizer has other tokens than the policy's ({len(other)} and {len(policy)}); wanted a "
            "reward model trained from weights with the policy's tokenizer"
        )
