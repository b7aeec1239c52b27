"""The backbone: a headless transformers model that maps a packed row of tokens to hidden states.

The packed path runs transformers' modules unchanged with LoopOS's attention. A probe on the loaded weights verifies it;
otherwise the padded path is used. Also here: the token embedding with summed gradients, and the recorder of
mixture-of-experts routers.
Letters: T tokens of the row, d hidden size, E experts, k experts per token, L layers with a router.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loopos.config.diagnostics import UserError
from loopos.functional.packing import PackedLayout
from loopos.functional.reductions import lookup
from loopos.models.attention import IMPLEMENTATION, PackedUnsupported
from loopos.models.quantized import exact_activations


class TokenEmbedding(nn.Embedding):
    """An `nn.Embedding` over an existing weight whose gradient may be summed in fp32."""

    def __init__(self, weight: nn.Parameter) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = None
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.weight = weight

    def forward(self, input: Tensor) -> Tensor:
        return lookup(input, self.weight)


def use_summed_embedding(model: PreTrainedModel) -> None:
    """Replaces the token embedding, in place.

    transformers gives the pad token's row no gradient. Packed rows have no pads, and many models pad with their end
    token, which must learn: here every row of the embedding gets its gradient.
    """
    embedding = model.get_input_embeddings()
    if type(embedding) is nn.Embedding and embedding.max_norm is None:
        assert isinstance(embedding.weight, nn.Parameter)
        model.set_input_embeddings(TokenEmbedding(embedding.weight))
    elif isinstance(embedding, nn.Embedding):
        embedding.padding_idx = None


@dataclass(frozen=True)
class Routing:
    """auxiliary_loss: 1·k if all experts get equally many tokens, up to E·k if one gets all. load: tokens of a layer's
    busiest expert relative to an even distribution, averaged over layers; 1 is even.
    """

    auxiliary_loss: Tensor
    load: Tensor


@dataclass(frozen=True)
class _Pass:
    """logits `[T, E]`; chosen `[T, k]`: the experts of each token."""

    logits: Tensor
    chosen: Tensor


class RouterRecorder:
    """Records the routers' decisions of a model's last pass."""

    def __init__(self, model: PreTrainedModel, num_chosen: int) -> None:
        self._passes: list[_Pass] = []
        self._num_chosen = num_chosen
        model.register_forward_pre_hook(lambda *_: self._passes.clear())
        for index, module in _routers(model):
            module.register_forward_hook(self._hook(index))

    @classmethod
    def of(cls, model: PreTrainedModel) -> RouterRecorder | None:
        """The recorder of a headless model; None if transformers records no router logits for it."""
        config = model.config.get_text_config()
        names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k")
        chosen = next((getattr(config, name) for name in names if isinstance(getattr(config, name, None), int)), None)
        return None if chosen is None or not _routers(model) else cls(model, chosen)

    def take(self, layout: PackedLayout) -> Routing:
        """The routing of the last pass. Pads of the padded path do not count."""
        passes = [self._without_pads(each, layout) for each in self._passes]
        self._passes.clear()
        assert passes, "no pass since the last one was taken"
        probabilities = torch.cat([each.logits.float() for each in passes]).softmax(-1)
        num_experts = probabilities.shape[-1]
        fractions = [_expert_fractions(each.chosen, num_experts) for each in passes]
        lengths = torch.tensor([len(each.chosen) for each in passes], device=probabilities.device)
        fraction = (torch.stack(fractions) * (lengths / lengths.sum())[:, None]).sum(0)
        auxiliary = num_experts * (fraction * probabilities.mean(0)).sum()
        busiest = torch.stack([each.max() / each.sum() for each in fractions])
        return Routing(auxiliary, num_experts * busiest.mean())

    def _hook(self, index: int) -> Any:
        def record(module: nn.Module, inputs: object, output: Any) -> None:
            logits = (output[index] if isinstance(output, tuple) else output).flatten(0, -2)
            last = output[-1] if isinstance(output, tuple) else None
            if isinstance(last, Tensor) and not last.is_floating_point() and last.shape[-1] == self._num_chosen:
                chosen = last.flatten(0, -2)
            else:
                chosen = logits.topk(self._num_chosen, dim=-1).indices
            self._passes.append(_Pass(logits, chosen.detach()))

        return record

    @staticmethod
    def _without_pads(each: _Pass, layout: PackedLayout) -> _Pass:
        if len(each.logits) == layout.num_tokens:
            return each
        real = torch.arange(max(layout.lengths), device=layout.device)[None] < layout.lengths_tensor()[:, None]
        assert real.numel() == len(each.logits), (real.shape, each.logits.shape)
        return _Pass(each.logits[real.flatten()], each.chosen[real.flatten()])


def _routers(model: PreTrainedModel) -> list[tuple[int, nn.Module]]:
    """The modules whose output contains router logits `[T, E]`, with their index in the output, as transformers records
    them.
    """
    recorded = getattr(model, "_can_record_outputs", None) or {}
    recorder = recorded.get("router_logits") if isinstance(recorded, dict) else None
    if recorder is None or isinstance(recorder, list):
        return []
    kind, index = (recorder, 0) if isinstance(recorder, type) else (recorder.target_class, recorder.index)
    return [(index, module) for module in model.modules() if isinstance(module, kind)]


def _expert_fractions(chosen: Tensor, num_experts: int) -> Tensor:
    """The fraction of tokens that each expert gets, `[E]`; they sum to k."""
    return torch.bincount(chosen.flatten(), minlength=num_experts).float() / len(chosen)


# Layer types that the packed path supports: causal or two-sided attention, full or banded.
_SERVED_LAYERS = frozenset({"full_attention", "sliding_attention"})
_EXPECTED = "expected a language model with a transformer, a token embedding and an output layer"
_PROBE_LENGTHS = (3, 7, 1, 5)
_PROBE_TOLERANCE = 2e-4


class Backbone(nn.Module):
    """A headless transformers model that maps a packed row to hidden states.

    `path`: "packed" or "padded". `reason`: why the padded path is used; otherwise empty.
    """

    def __init__(self, model: PreTrainedModel, *, attention: str = "auto") -> None:
        """attention: "packed" (raises `PackedUnsupported` if it is not exact), "padded", or "auto" (packed if the probe
        verifies it).
        """
        super().__init__()
        self.model = model
        self._plain_attention = model.config._attn_implementation
        use_summed_embedding(model)
        self.takes_token_types = _takes_token_types(model)
        self.path, self.reason = "padded", ""
        if attention == "padded":
            self.reason = 'model.attention is "padded"'
            return
        with exact_activations(model):
            self.reason = _why_not_packed(model)
        if not self.reason:
            self.path = "packed"
        elif attention == "packed":
            raise PackedUnsupported(f"{type(model).__name__} cannot run packed: {self.reason}")

    def copied_model(self) -> PreTrainedModel:
        """A copy of the model for another backbone, with transformers' own attention."""
        twin = copy.deepcopy(self.model)
        twin.set_attn_implementation(self._plain_attention)
        return twin

    @cached_property
    def supports_shared_prefixes(self) -> bool:
        """Whether continuations that share a prefix in one row give the same hidden states as with separate copies of
        the prefix, probed on these weights.
        """
        return self.path == "packed" and _shared_prefixes_are_exact(self.model)

    @cached_property
    def routers(self) -> RouterRecorder | None:
        """The recorder of its expert routers; None for a model without routers."""
        return RouterRecorder.of(self.model)

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)

    def forward(self, ids: Tensor, layout: PackedLayout, token_types: Tensor | None = None) -> Tensor:
        """ids `[T]` int64, token_types `[T]` (segment ids of sentence pairs, ignored by models without such embeddings)
        → hidden states `[T, d]`.
        """
        token_types = token_types if self.takes_token_types else None
        if self.path == "packed":
            return _packed_hidden_states(self.model, ids, layout, token_types)
        return _padded_hidden_states(self.model, ids, layout, token_types)


def headless(causal: PreTrainedModel) -> PreTrainedModel:
    """The transformer below a causal language model's output layer. Raises `UserError` for a family with another
    structure.
    """
    # If the weights are part of a larger model, base_model_prefix is the part's prefix, not an attribute.
    for name in (causal.base_model_prefix, "model", "transformer"):
        base = getattr(causal, name, None) if name else None
        if isinstance(base, PreTrainedModel) and base is not causal:
            break
    else:
        raise UserError(f"{type(causal).__name__} is not supported: {_EXPECTED}, and it has no such part")
    try:
        embedding = base.get_input_embeddings()
    except NotImplementedError:
        embedding = None
    if embedding is None:
        raise UserError(
            f"{type(causal).__name__} is not supported: {_EXPECTED}, and its {type(base).__name__} does not give its "
            "token embedding"
        )
    return base


def _takes_token_types(model: PreTrainedModel) -> bool:
    """Whether the model has an embedding for each segment of a pair. GPT-2 accepts the argument, but adds the embedding
    of token 0 or 1 to every token.
    """
    segments = getattr(model.config, "type_vocab_size", None) or 0
    return segments > 1 and "token_type_ids" in inspect.signature(model.forward).parameters


def _packed_hidden_states(
    model: PreTrainedModel, ids: Tensor, layout: PackedLayout, token_types: Tensor | None
) -> Tensor:
    extra: dict[str, Tensor | bool] = {} if token_types is None else {"token_type_ids": token_types[None]}
    if getattr(model.config, "use_cache", None) is not None:
        extra["use_cache"] = False
    output = model(input_ids=ids[None], position_ids=layout.positions()[None], packed_layout=layout, **extra)
    hidden: Tensor = output.last_hidden_state[0]
    return hidden


def _padded_hidden_states(
    model: PreTrainedModel, ids: Tensor, layout: PackedLayout, token_types: Tensor | None
) -> Tensor:
    """Runs sequences side by side with pads on the right, `[N, longest]`, and returns the real tokens' states in
    order.
    """
    mask = torch.arange(max(layout.lengths), device=ids.device)[None] < layout.lengths_tensor()[:, None]
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    padded = torch.full(
        mask.shape, pad if isinstance(pad, int) and pad >= 0 else 0, dtype=ids.dtype, device=ids.device
    ).masked_scatter(mask, ids)
    extra: dict[str, Tensor | bool] = {}
    if token_types is not None:
        extra["token_type_ids"] = torch.zeros_like(padded).masked_scatter(mask, token_types)
    if getattr(model.config, "use_cache", None) is not None:
        extra["use_cache"] = False
    hidden: Tensor = model(input_ids=padded, attention_mask=mask.long(), **extra).last_hidden_state[mask]
    return hidden


@torch.no_grad()
def _why_not_packed(model: PreTrainedModel) -> str:
    """The reason why the packed path is not exact on these weights; empty if it is. Sets the model's attention
    accordingly.
    """
    config = model.config.get_text_config()
    served = set(getattr(config, "layer_types", None) or ()) - _SERVED_LAYERS
    if served:
        return f"its layers use {', '.join(sorted(served))}"
    before, was_training = model.config._attn_implementation, model.training
    model.train(False)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(
        min(3, config.vocab_size - 1), config.vocab_size, (sum(_PROBE_LENGTHS),), generator=generator
    ).to(model.device)
    layout = PackedLayout(_PROBE_LENGTHS, model.device)
    spans = zip(layout.starts().tolist(), layout.lengths, strict=True)
    parts = [ids[start : start + length] for start, length in spans]
    separate = torch.cat([model(input_ids=part[None]).last_hidden_state[0] for part in parts])
    reason = ""
    try:
        model.set_attn_implementation(IMPLEMENTATION)
        if model.config._attn_implementation != IMPLEMENTATION:
            # transformers would apply its own mask to a packed row.
            raise PackedUnsupported("its attention is fixed in its own modules")
        packed = _packed_hidden_states(model, ids, layout, None)
        difference = float((packed - separate).abs().max() / separate.abs().max().clamp_min(1e-6))
        if not difference <= _PROBE_TOLERANCE:
            reason = f"its hidden states differ from those of separate sequences by {difference:.1e}"
    except (PackedUnsupported, ValueError, TypeError, AssertionError, RuntimeError) as problem:
        reason = (str(problem).splitlines() or [type(problem).__name__])[0]
    if reason:
        model.set_attn_implementation(before)
    model.train(was_training)
    return reason


@torch.no_grad()
def _shared_prefixes_are_exact(model: PreTrainedModel) -> bool:
    """Whether a packed model gives two continuations of one shared prefix the hidden states that they have with
    prefixes of their own.
    """
    was_training = model.training
    model.train(False)
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(3, vocabulary - 1), vocabulary, (11,), generator=generator).to(model.device)
    prefix, first, second = ids[:4], ids[4:7], ids[7:]
    apart = PackedLayout((7, 8), model.device)
    expected = _packed_hidden_states(model, torch.cat([prefix, first, prefix, second]), apart, None)[apart.ends()]
    together = PackedLayout.of_shared_prefixes([(4, 3, 4)], model.device)
    try:
        found = _packed_hidden_states(model, ids, together, None)[together.last_tokens()]
        # Attention dropout, which shared prefixes do not support, is active only in training.
        model.train(True)
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            _packed_hidden_states(model, ids, together, None)
    except PackedUnsupported:
        return False
    finally:
        model.train(was_training)
    tolerance = _PROBE_TOLERANCE if model.dtype == torch.float32 else 0.05
    return bool(float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6)) <= tolerance)
