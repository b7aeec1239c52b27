"""A model's token embedding, with the gradient that packed rows call for.

Enters: a transformers model. Leaves: the same with its `nn.Embedding` of tokens exchanged for one over the same weight.
Left out: the output embedding (`language_model.py`).

The routers of a mixture of experts: how they spread the tokens of a pass, and the loss that evens it out.

Enters: a headless transformer with routers. Leaves: after each of its passes, the auxiliary loss and the load. Left
out: what is trained with them (`training.router_objective`).
Letters: T tokens of the pass, E experts, k experts that a token is sent to, L layers with a router.

The transformer behind one name: a flat row of tokens in, hidden states out.

Enters: token ids `[T]` and the row's `PackedLayout`. Leaves: hidden states of the last layer `[T, d]`. The packed path
runs transformers' modules unchanged with our attention; a probe on the loaded weights proves it exact, and where it is
not the padded path is taken, with the reason kept. Left out: heads, logits.
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


@dataclass(frozen=True)
class Routing:
    """auxiliary_loss: 1·k where every expert gets as many tokens as another, up to E·k where one gets all. load: tokens
    of the busiest expert of a layer over those of an even spread, the mean over the layers; 1 is even.
    """

    auxiliary_loss: Tensor
    load: Tensor


@dataclass(frozen=True)
class _Pass:
    """logits `[T, E]`; chosen `[T, k]`: the experts that each token was sent to."""

    logits: Tensor
    chosen: Tensor


class RouterRecorder:
    """Keeps what the routers of a model decide in its last pass."""

    def __init__(self, model: PreTrainedModel, num_chosen: int) -> None:
        self._passes: list[_Pass] = []
        self._num_chosen = num_chosen
        model.register_forward_pre_hook(lambda *_: self._passes.clear())
        for index, module in _routers(model):
            module.register_forward_hook(self._hook(index))

    @classmethod
    def of(cls, model: PreTrainedModel) -> RouterRecorder | None:
        """The recorder of a headless model; None for one without routers that transformers records the logits of."""
        config = model.config.get_text_config()
        names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k")
        chosen = next((getattr(config, name) for name in names if isinstance(getattr(config, name, None), int)), None)
        return None if chosen is None or not _routers(model) else cls(model, chosen)

    def take(self, layout: PackedLayout) -> Routing:
        """The routing of the pass that has just ended. Sequences that ran side by side had pads, which do not count."""
        passes = [self._without_pads(each, layout) for each in self._passes]
        self._passes.clear()
        assert passes, "no pass since the last one was taken"
        probabilities = torch.cat([each.logits.float() for each in passes]).softmax(-1)
        num_experts = probabilities.shape[-1]
        shares = [_shares(each.chosen, num_experts) for each in passes]
        lengths = torch.tensor([len(each.chosen) for each in passes], device=probabilities.device)
        share = (torch.stack(shares) * (lengths / lengths.sum())[:, None]).sum(0)
        auxiliary = num_experts * (share * probabilities.mean(0)).sum()
        busiest = torch.stack([each.max() / each.sum() for each in shares])
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
    """The modules whose output holds router logits `[T, E]`, and at which place, as transformers records them."""
    recorded = getattr(model, "_can_record_outputs", None) or {}
    recorder = recorded.get("router_logits") if isinstance(recorded, dict) else None
    if recorder is None or isinstance(recorder, list):
        return []
    kind, index = (recorder, 0) if isinstance(recorder, type) else (recorder.target_class, recorder.index)
    return [(index, module) for module in model.modules() if isinstance(module, kind)]


def _shares(chosen: Tensor, num_experts: int) -> Tensor:
    """The share of the tokens that each expert gets, `[E]`; they sum to k."""
    return torch.bincount(chosen.flatten(), minlength=num_experts).float() / len(chosen)


# Layer kinds whose attention is causal or two-sided, whole or banded: what the packed path serves.
_SERVED_LAYERS = frozenset({"full_attention", "sliding_attention"})
_EXPECTED = "a language model is expected to be a transformer with a token embedding below an output layer"
_PROBE_LENGTHS = (3, 7, 1, 5)
_PROBE_TOLERANCE = 2e-4


class Backbone(nn.Module):
    """A headless transformers model that maps a packed row to hidden states.

    `path` is "packed" or "padded"; `reason` says why the padded path was taken, and is empty otherwise.
    """

    def __init__(self, model: PreTrainedModel, *, attention: str = "auto") -> None:
        """attention: "packed" (refuse what it cannot serve: `PackedUnsupported`), "padded", or "auto" (packed
        where the probe proves it exact).
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
        """A copy of the model, for another backbone: with transformers' own attention, as this one got it."""
        twin = copy.deepcopy(self.model)
        twin.set_attn_implementation(self._plain_attention)
        return twin

    @cached_property
    def shares_trunks(self) -> bool:
        """Whether rows whose sequences have branches give what each branch behind its own copy of the trunk gives:
        found out on these weights.
        """
        return self.path == "packed" and _branches_are_exact(self.model)

    @cached_property
    def routers(self) -> RouterRecorder | None:
        """What its routers of experts decide, pass by pass; None for a model without."""
        return RouterRecorder.of(self.model)

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)

    def forward(self, ids: Tensor, layout: PackedLayout, token_types: Tensor | None = None) -> Tensor:
        """ids `[T]` int64, token_types `[T]` (segment ids of sentence pairs; models without such embeddings do not
        get them) → hidden states `[T, d]`.
        """
        token_types = token_types if self.takes_token_types else None
        if self.path == "packed":
            return _packed_hidden_states(self.model, ids, layout, token_types)
        return _padded_hidden_states(self.model, ids, layout, token_types)


def headless(causal: PreTrainedModel) -> PreTrainedModel:
    """The transformer below a causal language model's output layer. Raises `UserError` for a family whose model is not
    built of the two.
    """
    # Families whose weights are a part of a larger model name the part's prefix, not their own attribute.
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
    """Whether the model has an embedding for each segment of a pair. GPT-2 takes the argument too, but adds the
    embedding of token 0 or 1 to every token.
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
    """Sequences side by side with pads on the right, `[N, longest]`, and the real tokens' states taken back out in
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
    """Empty when the packed path equals each sequence run alone on these weights; else the reason in words. Leaves
    the model set to the path it will take.
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
    places = zip(layout.starts().tolist(), layout.lengths, strict=True)
    parts = [ids[start : start + length] for start, length in places]
    alone = torch.cat([model(input_ids=part[None]).last_hidden_state[0] for part in parts])
    reason = ""
    try:
        model.set_attn_implementation(IMPLEMENTATION)
        if model.config._attn_implementation != IMPLEMENTATION:
            # transformers would mask a packed row itself, up to the length that the module has a mask for.
            raise PackedUnsupported("its attention is fixed in its own modules")
        packed = _packed_hidden_states(model, ids, layout, None)
        difference = float((packed - alone).abs().max() / alone.abs().max().clamp_min(1e-6))
        if not difference <= _PROBE_TOLERANCE:
            reason = f"its hidden states differ from each sequence alone by {difference:.1e}"
    except (PackedUnsupported, ValueError, TypeError, AssertionError, RuntimeError) as problem:
        reason = (str(problem).splitlines() or [type(problem).__name__])[0]
    if reason:
        model.set_attn_implementation(before)
    model.train(was_training)
    return reason


@torch.no_grad()
def _branches_are_exact(model: PreTrainedModel) -> bool:
    """Whether the model, which runs packed, gives branches behind one trunk the hidden states that they have behind a
    trunk of their own.
    """
    was_training = model.training
    model.train(False)
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(3, vocabulary - 1), vocabulary, (11,), generator=generator).to(model.device)
    trunk, first, second = ids[:4], ids[4:7], ids[7:]
    apart = PackedLayout((7, 8), model.device)
    expected = _packed_hidden_states(model, torch.cat([trunk, first, trunk, second]), apart, None)[apart.ends()]
    together = PackedLayout.of_shared_prefixes([(4, 3, 4)], model.device)
    try:
        found = _packed_hidden_states(model, ids, together, None)[together.last_tokens()]
        # Attention dropout, which branches cannot have, is on in training only.
        model.train(True)
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            _packed_hidden_states(model, ids, together, None)
    except PackedUnsupported:
        return False
    finally:
        model.train(was_training)
    tolerance = _PROBE_TOLERANCE if model.dtype == torch.float32 else 0.05
    return bool(float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6)) <= tolerance)
