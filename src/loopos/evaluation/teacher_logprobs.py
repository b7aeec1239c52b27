"""A model's most likely tokens at each place of answers that it wrote, as `data.stored_logprobs` keeps them.

A forward pass over prompt and answer, because generation keeps only the log-probability of the token that it took.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loopos.config.diagnostics import UserError
from loopos.data.batches import in_packs
from loopos.data.stored_logprobs import StoredLogprobs, vocabulary_digest
from loopos.functional.distillation_loss import Logits, top_logprobs
from loopos.functional.packing import PackedLayout
from loopos.models.language_ensemble import LanguageEnsemble
from loopos.models.language_model import LanguageModel

# Tokens of one forward pass.
_TOKENS = 2048


class TeacherLogprobs:
    """Computes the column of rows: `TeacherLogprobs(model, tokenizer, k)(prompts, answers)`."""

    def __init__(self, model: PreTrainedModel | LanguageEnsemble, tokenizer: PreTrainedTokenizerBase, k: int) -> None:
        """k: candidates at each place. Raises `UserError` for more of them than tokens, and for an ensemble."""
        if isinstance(model, LanguageEnsemble):
            raise UserError("--logprobs: got an ensemble; expected one model: its members have their own distributions")
        self._model, self.k, self._vocabulary = LanguageModel(model), k, vocabulary_digest(tokenizer)
        size = len(self._model.output_embedding)
        if k > size:
            raise UserError(f"--logprobs: got {k}; expected at most {size}, the model's tokens")

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[Mapping[str, Any]]:
        """The column of each answer, which has at least one token, to its prompt."""
        lengths = [len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)]
        found: dict[int, Mapping[str, Any]] = {}
        device = self._model.causal.device
        for pack in in_packs(lengths, tokens=_TOKENS):
            ids = torch.tensor([token for row in pack for token in (*prompts[row], *answers[row])], device=device)
            layout = PackedLayout(tuple(lengths[row] for row in pack), device)
            positions, start = [], 0
            for row in pack:
                first = start + len(prompts[row])
                # Each token is predicted one position before it.
                positions.append(torch.arange(first - 1, first - 1 + len(answers[row])))
                start += lengths[row]
            hidden = self._model.backbone(ids, layout)[torch.cat(positions).to(device)]
            top = top_logprobs(Logits(hidden, self._model.output_embedding, self._model.shape), self.k)
            sizes = [len(answers[row]) for row in pack]
            parts = (torch.split(each.cpu(), sizes) for each in (top.ids, top.logprobs))
            for row, candidates, logprobs in zip(pack, *parts, strict=True):
                stored = StoredLogprobs(
                    [*prompts[row]], [*answers[row]], candidates.int().numpy(), logprobs.half().numpy()
                )
                found[row] = stored.as_column(self._vocabulary)
        return [found[row] for row in range(len(lengths))]
