"""Language models with one tokenizer as one distribution over the next token.

Letters: T tokens of the row, M scored tokens, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loopos.config.diagnostics import UserError
from loopos.functional.language_loss import CHUNK
from loopos.functional.mixing import MixtureMethod, mixed_logits
from loopos.functional.packing import PackedLayout
from loopos.models.language_model import LanguageModel, trained_tokens
from loopos.models.tokenizers import vocabulary_difference


@dataclass(frozen=True)
class LanguageEnsemble:
    """`members` mixed by `method` with `weights`, which sum to 1. All members are on one device and have the same
    vocabulary size.
    """

    members: tuple[PreTrainedModel, ...]
    weights: tuple[float, ...]
    method: MixtureMethod

    @property
    def device(self) -> torch.device:
        return self.members[0].device

    def mixed(self, logits: Sequence[Tensor]) -> Tensor:
        """The members' logits `[N, V]` → those of the ensemble."""
        return mixed_logits(logits, self.weights, self.method)


def members_of(model: PreTrainedModel | LanguageEnsemble) -> tuple[PreTrainedModel, ...]:
    """The single model, or an ensemble's members."""
    return model.members if isinstance(model, LanguageEnsemble) else (model,)


def positions_of(model: PreTrainedModel | LanguageEnsemble) -> int | None:
    """Maximum tokens of a sequence; None without a limit."""
    found = [getattr(each.config.get_text_config(), "max_position_embeddings", None) for each in members_of(model)]
    return min((positions for positions in found if positions is not None), default=None)


class TokenScores:
    """Log-probabilities of tokens in packed rows, without gradients. A call returns the sum that `LanguageModel`
    returns.
    """

    def __init__(self, model: PreTrainedModel | LanguageEnsemble) -> None:
        """Raises `UserError` as `LanguageModel` does."""
        self._members = [LanguageModel(each).eval() for each in members_of(model)]
        self._ensemble = model if isinstance(model, LanguageEnsemble) else None

    def __call__(self, ids: Tensor, layout: PackedLayout, weights: Tensor | None = None) -> Tensor:
        """Weighted sum of −log p of the tokens of a row, nats; arguments as for `LanguageModel.forward`."""
        targets, counted = trained_tokens(layout, weights)
        found, _ = self.of(ids, layout, targets - 1, ids[targets])
        return -(found if counted is None else found * counted).sum()

    @torch.no_grad()
    def of(self, ids: Tensor, layout: PackedLayout, positions: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """log p of the tokens `chosen` `[M]`, each after its position in `positions` `[M]` of a row `[T]`, in fp32; and
        whether each is the most likely token.
        """
        hidden = [member.backbone(ids, layout)[positions] for member in self._members]
        logprobs = torch.empty(len(chosen), dtype=torch.float32, device=ids.device)
        likeliest = torch.empty(len(chosen), dtype=torch.bool, device=ids.device)
        for first in range(0, len(chosen), CHUNK):
            rows = slice(first, first + CHUNK)
            every = [
                member.shape(states[rows] @ member.output_embedding.t())
                for member, states in zip(self._members, hidden, strict=True)
            ]
            logits = every[0] if self._ensemble is None else self._ensemble.mixed(every)
            logprobs[rows] = logits.gather(1, chosen[rows, None])[:, 0] - logits.logsumexp(-1)
            likeliest[rows] = logits.argmax(-1) == chosen[rows]
        return logprobs, likeliest


def next_token_loss(model: PreTrainedModel | LanguageEnsemble) -> LanguageModel | TokenScores:
    """A callable that sums the losses of packed rows. Raises `UserError` as `LanguageModel` does."""
    return TokenScores(model) if isinstance(model, LanguageEnsemble) else LanguageModel(model).eval()


def check_one_vocabulary(
    sources: Sequence[str], tokenizers: Sequence[PreTrainedTokenizerBase], num_logits: Sequence[int]
) -> None:
    """Raises `UserError` unless all models have the same vocabulary; names the tokens that differ from the first
    model's. num_logits: V of each model.
    """
    own, diagnostics = tokenizers[0].get_vocab(), []
    for source, tokenizer, size in list(zip(sources, tokenizers, num_logits, strict=True))[1:]:
        difference = vocabulary_difference(own, tokenizer.get_vocab(), sources[0])
        if difference:
            diagnostics.append(f"{source}: other tokens than {sources[0]}: {difference}")
        elif size != num_logits[0]:
            diagnostics.append(f"{source}: {size:,} output tokens, {sources[0]} {num_logits[0]:,}")
    if diagnostics:
        diagnostics.append("distributions over tokens are mixed token by token: expected models with one tokenizer; "
                      "--method vote, which compares answers, takes any")  # fmt: skip
        raise UserError("\n".join(diagnostics))
