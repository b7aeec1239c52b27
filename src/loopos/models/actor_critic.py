"""A policy and what values its states: one module, so that one optimizer and one checkpoint hold both.

Enters: packed prompts with responses, the positions before their tokens. Leaves: log-probabilities, entropies, values.
Left out: where the models come from (`roles.py`), losses.
Letters: T tokens of a packed row, M tokens of responses, d hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loopos.functional.packing import PackedLayout
from loopos.models.adapters import AdapterView
from loopos.models.backbone import Backbone
from loopos.models.heads import PooledModel
from loopos.models.language_model import LanguageModel


class ActorCritic(nn.Module):
    """`policy` acts. `critic`: the value head and, unless it is a view of the policy's, its trunk; `shares_states`: it
    reads the hidden states that the policy's logits are made of.
    """

    def __init__(self, policy: LanguageModel, critic: PooledModel, *, shares_states: bool, temperature: float) -> None:
        """temperature: divides the logits, of new, old and reference log-probabilities alike."""
        super().__init__()
        self.policy, self.critic = policy, critic
        self.shares_states, self.temperature = shares_states, temperature

    def forward(
        self, ids: Tensor, layout: PackedLayout, places: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of `targets` `[M]`, entropies of their distributions, and V of the states at `places`
        `[M]`: before each token. ids `[T]` → three of `[M]` in fp32.
        """
        hidden = self.policy.backbone(ids, layout)[places]
        logprobs, entropies = self.policy.logprobs(hidden, targets, temperature=self.temperature)
        states = hidden if self.shares_states else self.critic.backbone(ids, layout)[places]
        return logprobs, entropies, self.critic.outputs(states)[:, 0]


class Reference:
    """The policy as it was before training: a frozen copy, or the policy's trunk without its adapter."""

    def __init__(self, model: LanguageModel, trunk: Backbone | AdapterView, *, temperature: float) -> None:
        self.model, self.trunk, self.temperature = model, trunk, temperature

    @torch.no_grad()
    def __call__(self, ids: Tensor, layout: PackedLayout, places: Tensor, targets: Tensor) -> Tensor:
        """Log-probabilities of `targets` `[M]`."""
        return self.model.logprobs(self.trunk(ids, layout)[places], targets, temperature=self.temperature)[0]


def without_dropout(model: nn.Module) -> None:
    """Takes dropout out of a model, in place: it would make every ratio of probabilities noise (Huang et al. 2024)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
