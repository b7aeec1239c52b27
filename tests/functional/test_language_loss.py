"""The chunked next-token loss equals cross-entropy over whole logits, in value and in gradients."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from loopos.functional.language_loss import next_token_loss_sum


@pytest.mark.parametrize("rows", [1, 255, 256, 700])
def test_value_and_gradients_equal_the_whole_logits(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 8, generator=generator, dtype=torch.float32, requires_grad=True)
    embedding = torch.randn(13, 8, generator=generator, requires_grad=True)
    targets = torch.randint(0, 13, (rows,), generator=generator)
    weights = torch.rand(rows, generator=generator)

    expected = (F.cross_entropy(hidden @ embedding.t(), targets, reduction="none") * weights).sum() / 3
    gradients = torch.autograd.grad(expected, (hidden, embedding))
    loss = next_token_loss_sum(hidden, embedding, targets, weights) / 3
    found = torch.autograd.grad(loss, (hidden, embedding))

    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for actual, expected in zip(found, gradients, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_equal_logits_cost_the_logarithm_of_the_vocabulary() -> None:
    loss = next_token_loss_sum(torch.zeros(4, 2), torch.ones(10, 2), torch.tensor([0, 3, 9, 9]))
    assert loss.item() == pytest.approx(4 * math.log(10))


def test_frozen_states_and_frozen_embedding() -> None:
    hidden, embedding = torch.randn(5, 3), torch.randn(7, 3)
    targets = torch.tensor([0, 1, 2, 3, 4])
    for trained in (hidden, embedding):
        trained.requires_grad_()
        next_token_loss_sum(hidden, embedding, targets).backward()
        assert trained.grad is not None
        assert trained.grad.abs().sum() > 0
        trained.requires_grad_(False)
        trained.grad = None
