"""What an ensemble of language models is made of, read from its folder without torch.

Enters: a place. Leaves: an `EnsembleRecipe`, or None where no such ensemble is. Left out: opening the members
(`speaking.py`), making the folder (`deploy`).

Language models with one tokenizer as one distribution over the next token.

Enters: causal language models and weights. Leaves: a `LanguageEnsemble`, and the log-probabilities of the tokens of
packed rows, by one model or by all of them together. Left out: generation (`generation.runners`), the folder
(`ensemble_folder.py`).
Letters: T tokens of the row, M tokens asked for, V tokens of the vocabulary.
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
    """`members` mixed by `method` with `weights`, which sum to 1; all on one device, with as many tokens each."""

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
    """The models that speak: one, or those of an ensemble."""
    return model.members if isinstance(model, LanguageEnsemble) else (model,)


def positions_of(model: PreTrainedModel | LanguageEnsemble) -> int | None:
    """Tokens that a sequence may have; None where there is no limit."""
    found = [getattr(each.config.get_text_config(), "max_position_embeddings", None) for each in members_of(model)]
    return min((positions for positions in found if positions is not None), default=None)


class TokenScores:
    """How likely the tokens of packed rows are, without gradients. A call gives the sum that `LanguageModel` gives."""

    def __init__(self, model: PreTrainedModel | LanguageEnsemble) -> None:
        """Raises `UserError` as `LanguageModel` does."""
        self._members = [LanguageModel(each).eval() for each in members_of(model)]
        self._ensemble = model if isinstance(model, LanguageEnsemble) else None

    def __call__(self, ids: Tensor, layout: PackedLayout, weights: Tensor | None = None) -> Tensor:
        """Weighted sum of −log p of the tokens of a row, nats; arguments as `LanguageModel.forward`."""
        targets, counted = trained_tokens(layout, weights)
        found, _ = self.of(ids, layout, targets - 1, ids[targets])
        return -(found if counted is None else found * counted).sum()

    @torch.no_grad()
    def of(self, ids: Tensor, layout: PackedLayout, places: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """log p of the tokens `chosen` `[M]`, each after the position `places` `[M]` of a row of tokens `[T]`, in fp32;
        and whether each is the likeliest.
        """
        hidden = [member.backbone(ids, layout)[places] for member in self._members]
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
    """What sums the losses of packed rows. Raises `UserError` as `LanguageModel` does."""
    return TokenScores(model) if isinstance(model, LanguageEnsemble) else LanguageModel(model).eval()


def check_one_vocabulary(
    places: Sequence[str], tokenizers: Sequence[PreTrainedTokenizerBase], num_logits: Sequence[int]
) -> None:
    """Raises `UserError` unless all models mean the same by a token: tells the tokens that differ from the first's.
    num_logits: V of each model.
    """
    own, diagnostics = tokenizers[0].get_vocab(), []
    for place, tokenizer, size in list(zip(places, tokenizers, num_logits, strict=True))[1:]:
        told = vocabulary_difference(own, tokenizer.get_vocab(), places[0])
        if told:
            diagnostics.append(f"{place}: other tokens than {places[0]}: {told}")
        elif size != num_logits[0]:
            diagnostics.append(f"{place}: {size:,} output tokens, {places[0]} {num_logits[0]:,}")
    if diagnostics:
        diagnostics.append("distributions over tokens are mixed token by token: expected models with one tokenizer; "
                      "--method vote, which compares answers, takes any")  # fmt: skip
        raise UserError("\n".join(diagnostics))
