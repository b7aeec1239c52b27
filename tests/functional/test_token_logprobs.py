"""Log-probabilities of chosen tokens and entropies, and their gradients, against torch's own over whole logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loopos.functional.language_loss import CHUNK, LogitShape, token_logprobs
from loopos.functional.reductions import sum_gradient_of

SHAPES = {"plain": LogitShape(), "scaled": LogitShape(0.5), "capped": LogitShape(2.0, 5.0)}


def plain(
    hidden: Tensor, embedding: Tensor, targets: Tensor, shape: LogitShape, temperature: float
) -> tuple[Tensor, Tensor]:
    logits = hidden @ embedding.t() * shape.scale
    if shape.softcap is not None:
        logits = shape.softcap * torch.tanh(logits / shape.softcap)
    logprobs = torch.log_softmax(logits / temperature, -1)
    return logprobs.gather(1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_are_torch_s(shape: str, temperature: float) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = CHUNK + 37  # more than a chunk
    hidden = torch.randn(rows, 8, generator=generator)
    embedding = torch.randn(50, 8, generator=generator)
    targets = torch.randint(50, (rows,), generator=generator)
    weights = torch.randn(2, rows, generator=generator)
    found = []
    for function in (plain, None):
        h, e = hidden.clone().requires_grad_(), embedding.clone().requires_grad_()
        if function is None:
            logprobs, entropies, _ = token_logprobs(h, e, targets, temperature=temperature, shape=SHAPES[shape])
        else:
            logprobs, entropies = function(h, e, targets, SHAPES[shape], temperature)
        (logprobs * weights[0] + entropies * weights[1]).sum().backward()
        found.append((logprobs.detach(), entropies.detach(), h.grad, e.grad))
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


def test_the_collision_log_probability_is_that_of_two_draws() -> None:
    """log Σ p²; asking for it changes no other bit, and it has no gradient."""
    hidden, embedding, targets = torch.randn(CHUNK + 3, 4), torch.randn(9, 4), torch.arange(CHUNK + 3) % 9
    both = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    alone = token_logprobs(both[0], embedding, targets, temperature=0.7)
    found = token_logprobs(both[1], embedding, targets, temperature=0.7, collisions=True)
    assert found.collisions is not None
    assert not found.collisions.requires_grad
    p = torch.softmax(hidden @ embedding.t() / 0.7, -1)
    torch.testing.assert_close(found.collisions, p.square().sum(-1).log(), atol=1e-6, rtol=1e-5)
    assert torch.equal(alone.logprobs, found.logprobs)
    for each in (alone, found):
        (each.logprobs * torch.arange(CHUNK + 3)).sum().backward()
    assert both[0].grad is not None
    assert both[1].grad is not None
    assert torch.equal(both[0].grad, both[1].grad)


def test_without_a_use_of_the_entropy_its_gradient_costs_nothing_and_changes_nothing() -> None:
    hidden, embedding = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4)
    targets = torch.arange(5)
    token_logprobs(hidden, embedding, targets)[0].sum().backward()
    separate = hidden.grad
    again = hidden.detach().clone().requires_grad_()
    plain(again, embedding, targets, LogitShape(), 1.0)[0].sum().backward()
    torch.testing.assert_close(separate, again.grad, atol=1e-6, rtol=1e-5)


def test_the_embedding_s_gradient_goes_to_its_own_sum() -> None:
    embedding = torch.nn.Parameter(torch.randn(9, 4))
    total = torch.ones(9, 4)
    sum_gradient_of(embedding, lambda: total)
    hidden, targets = torch.randn(5, 4), torch.arange(5)
    token_logprobs(hidden, embedding, targets)[0].sum().backward()
    assert embedding.grad is None
    twin = embedding.detach().clone().requires_grad_()
    plain(hidden, twin, targets, LogitShape(), 1.0)[0].sum().backward()
    assert twin.grad is not None
    torch.testing.assert_close(total - 1, twin.grad, atol=1e-6, rtol=1e-5)
