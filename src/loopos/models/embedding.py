"""A model's token embedding, with the gradient that packed rows call for.

Enters: a transformers model. Leaves: the same with its `nn.Embedding` of tokens exchanged for one over the same weight.
Left out: the output embedding (`language_model.py`).
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from loopos.functional.gradient_sum import lookup


class TokenEmbedding(nn.Embedding):
    """An `nn.Embedding` over a given weight whose gradient may be summed in fp32."""

    def __init__(self, weight: nn.Parameter) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = None
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.weight = weight

    def forward(self, input: Tensor) -> Tensor:
        return lookup(input, self.weight)


def use_summed_embedding(model: PreTrainedModel) -> None:
    """Exchanges the token embedding, in place.

    transformers gives the pad token's row no gradient. Rows here have no pads, while many models pad with their end
    token, which must learn: so every row of the embedding gets its gradient.
    """
    embedding = model.get_input_embeddings()
    if type(embedding) is nn.Embedding and embedding.max_norm is None:
        assert isinstance(embedding.weight, nn.Parameter)
        model.set_input_embeddings(TokenEmbedding(embedding.weight))
    elif isinstance(embedding, nn.Embedding):
        embedding.padding_idx = None
