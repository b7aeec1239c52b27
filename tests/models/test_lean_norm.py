"""Norms of ours give what transformers' own give, gradients included."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from loopos.functional.rms_norm import rms_norm
from loopos.models.lean_norm import make_norms_lean


def gradients(norm: nn.Module, states: Tensor, of: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    states = states.detach().requires_grad_()
    norm.zero_grad()
    found: Tensor = norm(states)
    found.backward(of.to(found.dtype))  # type: ignore[no-untyped-call]
    assert states.grad is not None
    assert isinstance(norm.weight.grad, Tensor)
    return found.detach(), states.grad, norm.weight.grad.clone()


@pytest.mark.parametrize("kind", [LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_those_of_transformers(kind: type[nn.Module], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    own = kind(48, eps=1e-3).to(dtype)
    assert isinstance(own.weight, nn.Parameter)
    nn.init.normal_(own.weight, mean=1.0, std=0.5)
    lean = nn.Sequential(copy.deepcopy(own))
    make_norms_lean(lean)
    assert type(lean[0]) is not kind
    states, of = 3 * torch.randn(2, 7, 48).to(dtype), torch.randn(2, 7, 48).to(dtype)
    found, theirs = gradients(lean[0], states, of), gradients(own, states, of)
    rounding = torch.finfo(dtype).eps
    for mine, other in zip(found, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=4 * rounding, atol=4 * rounding * float(other.abs().max()))


def test_by_hand() -> None:
    # mean x² = 8, ε = 1: x / 3, scaled by 3 and 6.
    states = torch.tensor([[4.0, 0.0]], requires_grad=True)
    found = rms_norm(states, torch.tensor([3.0, 6.0]), 1.0)
    assert found.tolist() == [[4.0, 0.0]]
    # n = (4/3, 0), dn = (3, 6): dx = (1/3)·(dn − n·(3·4/3)/2) = (1 − 8/9, 2).
    found.sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(states.grad, torch.tensor([[1 / 9, 2.0]]))


def test_other_formulas_stay() -> None:
    model = nn.Sequential(GemmaRMSNorm(8), nn.LayerNorm(8))
    make_norms_lean(model)
    assert [type(module) for module in model] == [GemmaRMSNorm, nn.LayerNorm]
