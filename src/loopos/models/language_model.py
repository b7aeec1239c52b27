"""A causal language model over packed rows: backbone, output embedding, next-token loss.

Enters: a transformers causal language model. Leaves: sums of next-token losses over packed rows; the model's folder.
Left out: generation.
Letters: T tokens of the row, N sequences, M positions with a next token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loopos.functional.language_loss import next_token_loss_sum
from loopos.functional.packing import PackedLayout
from loopos.models.backbone import Backbone


class LanguageModel(nn.Module):
    """`causal` is transformers' model, unchanged; its base runs as a `Backbone`, its output embedding E gives the loss
    −log softmax(E·h_t)_{token t+1}. The parameters are those of `causal`, tied ones once.
    """

    def __init__(self, causal: PreTrainedModel, *, attention: str = "auto") -> None:
        super().__init__()
        base = getattr(causal, causal.base_model_prefix)
        assert isinstance(base, PreTrainedModel)
        self.causal = causal
        # Kept out of the module tree: the backbone's parameters are those of `causal`, and are named once.
        self._backbone = (Backbone(base, attention=attention),)

    @property
    def backbone(self) -> Backbone:
        return self._backbone[0]

    @property
    def output_embedding(self) -> Tensor:
        """E `[V, d]`."""
        weight = self.causal.get_output_embeddings().weight  # type: ignore[no-untyped-call]
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, ids: Tensor, layout: PackedLayout) -> Tensor:
        """Sum of the next-token losses of a row, nats. ids `[T]`; the last token of each sequence predicts nothing, so
        that M = T − N.
        """
        positions = next_token_positions(layout)
        hidden = self.backbone(ids, layout)
        return next_token_loss_sum(hidden[positions], self.output_embedding, ids[positions + 1])


def next_token_positions(layout: PackedLayout) -> Tensor:
    """Positions of a row that have a next token in their own sequence, `[T − N]`."""
    has_next = torch.ones(layout.num_tokens, dtype=torch.bool, device=layout.device)
    has_next[layout.ends()] = False
    return has_next.nonzero().squeeze(1)
