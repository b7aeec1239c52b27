"""New tokens of a language model: added to its tokenizer, with rows of the embeddings that start as the mean of those
of their old pieces.

Letters: V tokens, d hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from loopos.config.diagnostics import UserError
from loopos.models.load import Pretrained


def with_new_tokens(pretrained: Pretrained, plain: Sequence[str], special: Sequence[str]) -> Pretrained:
    """A language model and its tokenizer with more tokens, in place. special: tokens that decoding may leave out. The
    embeddings get more rows only where the model has no spare ones. Raises `UserError` for a token that there is, and
    for one without pieces.
    """
    model, tokenizer = pretrained.model, pretrained.tokenizer
    pieces = old_pieces(tokenizer, [*plain, *special])
    known = len(tokenizer)
    add_tokens(tokenizer, plain, special)
    rows = len(embedding_weights(model)[0])
    if len(tokenizer) > rows:
        # Their rows are set below, from the pieces.
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for text, ids in pieces.items():
            row = tokenizer.get_vocab()[text]
            for each in (*embedding_weights(model), *_output_biases(model)):
                each[row] = each[torch.tensor(ids)].float().mean(0).to(each.dtype)
    spare = min(rows, len(tokenizer)) - known
    filled = f" ({spare} in spare rows)" if spare > 0 else ""
    summary = f"{pretrained.summary}; {len(pieces)} new tokens{filled}"
    return replace(pretrained, summary=summary, fingerprint=f"{pretrained.fingerprint} with {len(pieces)} new tokens")


def add_tokens(tokenizer: PreTrainedTokenizerBase, plain: Sequence[str], special: Sequence[str]) -> None:
    """Adds tokens to a tokenizer, in place."""
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in plain])
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=True) for text in special], special_tokens=True)


def embedding_weights(model: PreTrainedModel) -> list[nn.Parameter]:
    """The weights of the input and the output embedding, `[V, d]`; one if they are tied."""
    opened: Any = model
    modules = (opened.get_input_embeddings(), opened.get_output_embeddings())
    weights = [module.weight for module in modules if module is not None]
    return weights[:1] if len(weights) > 1 and weights[0] is weights[1] else weights


def new_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> Tensor:
    """Which rows of the embeddings are those of these tokens, bool `[V]`."""
    mask = torch.zeros(len(embedding_weights(model)[0]), dtype=torch.bool)
    mask[torch.tensor([tokenizer.convert_tokens_to_ids(token) for token in tokens])] = True
    return mask


def _output_biases(model: PreTrainedModel) -> Iterator[Tensor]:
    bias = getattr(model.get_output_embeddings(), "bias", None)  # type: ignore[no-untyped-call]
    if isinstance(bias, Tensor):
        yield bias


def old_pieces(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> dict[str, list[int]]:
    """Token → the ids that the tokenizer wrote it with so far."""
    vocabulary, found = tokenizer.get_vocab(), {}
    for text in tokens:
        if text in vocabulary:
            raise UserError(f"data.new_tokens: {text!r} is a token already (id {vocabulary[text]}); leave it out")
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise UserError(
                f"data.new_tokens: {text!r} has no pieces in this tokenizer; expected text that it can write"
            )
        found[text] = list(ids)
    return found
