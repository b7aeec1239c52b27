"""A causal language model over packed rows: next-token losses and log-probabilities.

Letters: T tokens of the row, N sequences, M positions whose next token is trained.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from loopos.config.diagnostics import UserError
from loopos.functional.language_loss import LogitShape, TokenLogprobs, next_token_loss_sum, token_logprobs
from loopos.functional.packing import PackedLayout
from loopos.models.backbone import Backbone, headless
from loopos.models.quantized import exact_activations
from loopos.storage.tensor_files import require_finite

_PROBE_TOLERANCE = 2e-4


class LanguageModel(nn.Module):
    """`causal` is transformers' model, unchanged; its base runs as a `Backbone`. With the output embedding E the loss
    is −log softmax(shape(E·h_t))_{token t+1}. The parameters are those of `causal`, tied ones once.
    """

    def __init__(self, causal: PreTrainedModel, *, attention: str = "auto") -> None:
        """attention: as for `Backbone`. Raises `UserError` for a model that sees later tokens, or that computes its
        logits in an unknown way.
        """
        super().__init__()
        base = headless(causal)
        self.causal = causal
        self.shape = _logit_shape(causal.config.get_text_config())
        with exact_activations(causal):
            _check(causal, base, self.shape)
        # In a tuple to stay out of the module tree: the backbone's parameters are those of `causal`.
        self._backbone = (Backbone(base, attention=attention),)

    @property
    def backbone(self) -> Backbone:
        return self._backbone[0]

    @property
    def output_embedding(self) -> Tensor:
        """E `[V, d]`."""
        return _output_embedding(self.causal)

    def forward(self, ids: Tensor, layout: PackedLayout, weights: Tensor | None = None) -> Tensor:
        """Weighted sum of the next-token losses of a row, nats. ids `[T]`. weights `[T]`: the factor on the loss of
        each token as a target, 0 for the first of each sequence; None = 1 for all others.
        """
        targets, weights = trained_tokens(layout, weights)
        hidden = self.backbone(ids, layout)
        return next_token_loss_sum(hidden[targets - 1], self.output_embedding, ids[targets], weights, shape=self.shape)

    def logprobs(
        self, hidden: Tensor, targets: Tensor, *, temperature: float = 1.0, collisions: bool = False
    ) -> TokenLogprobs:
        """Log-probabilities of the tokens `targets` `[M]` after hidden states `[M, d]` of this model, and the entropies
        of their distributions, in fp32 and nats; temperature divides the logits. collisions: as in `token_logprobs`.
        """
        return token_logprobs(
            hidden,
            self.output_embedding,
            targets,
            temperature=temperature,
            shape=self.shape,
            collisions=collisions,
        )


def trained_tokens(layout: PackedLayout, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The positions of the tokens whose loss counts, `[M]`, and their weights; None = 1 for every token with a
    predecessor in its sequence.
    """
    if weights is None:
        return next_token_positions(layout) + 1, None
    targets = weights.nonzero().squeeze(1)
    return targets, weights[targets]


def next_token_positions(layout: PackedLayout) -> Tensor:
    """Positions of a row with a next token in their sequence, `[T − N]`."""
    has_next = torch.ones(layout.num_tokens, dtype=torch.bool, device=layout.device)
    has_next[layout.ends()] = False
    return has_next.nonzero().squeeze(1)


def _output_embedding(causal: PreTrainedModel) -> Tensor:
    weight = causal.get_output_embeddings().weight  # type: ignore[no-untyped-call]
    assert isinstance(weight, Tensor)
    return weight


def _logit_shape(config: PreTrainedConfig) -> LogitShape:
    """Cohere multiplies its logits, Granite divides them, Gemma 2 caps them."""
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    return LogitShape(float(scale), getattr(config, "final_logit_softcapping", None))


@torch.no_grad()
def _check(causal: PreTrainedModel, base: PreTrainedModel, shape: LogitShape) -> None:
    """Raises `UserError` unless logits on these weights are finite, equal shape(E·h), and depend on no later token."""
    config, was_training = causal.config.get_text_config(), causal.training
    causal.train(False)
    ids = torch.arange(config.vocab_size - 1, config.vocab_size - 7, -1, device=causal.device).clamp_(min=0)[None]
    logits = causal(input_ids=ids).logits[0].float()
    hidden = base(input_ids=ids).last_hidden_state[0]
    embedding = _output_embedding(causal)
    if hidden.shape[-1] != embedding.shape[-1]:
        raise UserError(
            f"{type(causal).__name__} computes its logits in an unsupported way (hidden states of "
            f"{hidden.shape[-1]} features, an output layer of {embedding.shape[-1]}); expected a model whose output "
            "layer is a matrix without bias"
        )
    expected = shape(hidden @ embedding.t())
    before = causal(input_ids=ids[:, :-1]).logits[0].float()
    causal.train(was_training)
    if not bool(logits.isfinite().all()):
        for name, weight in causal.state_dict().items():
            require_finite(name, weight)
        raise UserError(
            f"{type(causal).__name__}: its logits are not finite though its weights are: they overflow "
            f"{str(causal.dtype).removeprefix('torch.')}; choose another number format, or take other weights"
        )
    tolerance = _PROBE_TOLERANCE if causal.dtype == torch.float32 else 0.05
    largest = logits.abs().max().clamp_min(1e-6)
    if not float((logits[:-1] - before).abs().max() / largest) <= tolerance:
        raise UserError(
            f"{type(causal).__name__} attends to later tokens, so it is an encoder; expected a causal language model"
        )
    difference = float((logits - expected).abs().max() / largest)
    if not difference <= tolerance:
        raise UserError(
            f"{type(causal).__name__} computes its logits in an unsupported way (other than E·h by "
            f"{difference:.1e}); expected a model whose output layer is a matrix without bias"
        )
