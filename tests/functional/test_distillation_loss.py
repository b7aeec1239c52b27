"""Losses of distillation: numbers worked by hand, the formulas over whole logits with their gradients, TRL's, and the
identities between them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from loopos.functional.distillation_loss import (
    DistillationLoss,
    DistillationSettings,
    Logits,
    TopLogprobs,
    forward_kl,
    jsd,
    reverse_kl,
    sampled_reverse_kl,
)
from loopos.functional.language_loss import LogitShape

NONE = DistillationSettings()


def test_numbers_worked_by_hand() -> None:
    """p = (1/2, 1/2), q = (1/4, 3/4), m = (3/8, 5/8)."""
    student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    log = math.log
    assert forward_kl(student, teacher, NONE).item() == pytest.approx(log(0.5) / 4 + 3 * log(1.5) / 4)
    assert reverse_kl(student, teacher, NONE).item() == pytest.approx(log(2) / 2 + log(2 / 3) / 2)
    to_mixture = (log(2 / 3) / 4 + 3 * log(1.2) / 4, log(4 / 3) / 2 + log(0.8) / 2)
    assert jsd(student, teacher, NONE).item() == pytest.approx(sum(to_mixture) / 2)
    # A = log q(y) − log p_old(y) = log ½, and ρ = 2.
    each = sampled_reverse_kl(torch.tensor([0.5]).log(), torch.tensor([0.25]).log(), torch.tensor([0.125]).log())
    assert each.item() == pytest.approx(2 * log(2))


def drawn(rows: int, vocabulary: int = 50) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and output embedding of the student, with gradients, and of a wider teacher; targets, weights."""
    draw = torch.Generator().manual_seed(rows)
    student = [torch.randn(n, 8, generator=draw).requires_grad_() for n in (rows, vocabulary)]
    teacher = [torch.randn(n, 12, generator=draw) for n in (rows, vocabulary)]
    targets = torch.randint(vocabulary, (rows,), generator=draw)
    return student[0], student[1], teacher[0], teacher[1], targets, torch.rand(rows, generator=draw)


def whole(name: str, p: Tensor, q: Tensor, beta: float) -> Tensor:
    """The formulas over probabilities `[M, V]`, in fp64."""
    if name == "forward_kl":
        return (q * (q / p).log()).sum(-1)
    if name == "reverse_kl":
        return (p * (p / q).log()).sum(-1)
    m = beta * q + (1 - beta) * p
    return beta * (q * (q / m).log()).sum(-1) + (1 - beta) * (p * (p / m).log()).sum(-1)


FUNCTIONS = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("rows", [1, 33, 700])
def test_value_and_gradients_equal_the_whole_logits(name: str, temperature: float, rows: int) -> None:
    hidden, embedding, of_teacher, teacher_embedding, targets, weights = drawn(rows)
    shape = LogitShape(scale=0.7, softcap=9.0)

    def probabilities(states: Tensor, matrix: Tensor) -> Tensor:
        logits = 9.0 * torch.tanh(0.7 * (states.double() @ matrix.double().t()) / 9.0)
        return torch.softmax(logits / temperature, -1)

    p, q = probabilities(hidden, embedding), probabilities(of_teacher, teacher_embedding)
    expected = (whole(name, p, q, 0.3) * weights).sum() / 3
    gradients = torch.autograd.grad(expected, (hidden, embedding))
    loss = DistillationLoss(FUNCTIONS[name], DistillationSettings(0.3), temperature)
    total, reported = loss(
        Logits(hidden, embedding, shape), Logits(of_teacher, teacher_embedding, shape), targets, weights
    )
    assert total.item() / 3 == pytest.approx(expected.item(), rel=1e-5)
    for actual, gradient in zip(torch.autograd.grad(total / 3, (hidden, embedding)), gradients, strict=True):
        torch.testing.assert_close(actual, gradient, atol=1e-5, rtol=1e-4)
    logits = 9.0 * torch.tanh(0.7 * (hidden @ embedding.t()) / 9.0)
    by_hand = {
        "forward_kl": whole("forward_kl", p, q, 0.3),
        "reverse_kl": whole("reverse_kl", p, q, 0.3),
        "student_entropy": -(p * p.log()).sum(-1),
        "teacher_entropy": -(q * q.log()).sum(-1),
        "top_token_agreement": (p.argmax(-1) == q.argmax(-1)).double(),
        "nll": F.cross_entropy(logits, targets, reduction="none"),
    }
    assert set(reported) == set(by_hand)
    for key, values in by_hand.items():
        assert reported[key].item() == pytest.approx((values * weights).sum().item(), rel=1e-4, abs=1e-5), key
        assert not reported[key].requires_grad


# Importing trl takes longer than all other tests of this file.
@pytest.mark.slow
@pytest.mark.parametrize(("name", "beta"), [("forward_kl", 0.0), ("reverse_kl", 1.0), ("jsd", 0.25)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_losses_are_those_of_trl(name: str, beta: float, temperature: float) -> None:
    trainer = pytest.importorskip("trl.experimental.gkd").GKDTrainer
    chunked: Callable[..., Any] = pytest.importorskip("trl.trainer.distillation_trainer")._chunked_divergence_loss
    hidden, embedding, of_teacher, teacher_embedding, targets, _ = drawn(40)
    weights = (torch.arange(40) % 3 > 0).float()
    loss = DistillationLoss(FUNCTIONS[name], DistillationSettings(beta or 0.5), temperature)
    total, _ = loss(Logits(hidden, embedding), Logits(of_teacher, teacher_embedding), targets, weights)
    own = torch.autograd.grad(total / weights.sum(), (hidden, embedding))
    gkd = trainer.generalized_jsd_loss(
        (hidden @ embedding.t())[None], (of_teacher @ teacher_embedding.t())[None],
        labels=torch.where(weights > 0, targets, -100)[None], beta=beta, temperature=temperature,
    )  # fmt: skip
    distilled, _, number = chunked(
        hidden[None], of_teacher[None], embedding, teacher_embedding, weights[None], beta=beta, temperature=temperature
    )
    assert int(number) == int(weights.sum())
    for theirs in (gkd, distilled):
        assert total.item() / float(weights.sum()) == pytest.approx(theirs.item(), rel=2e-6)
        for actual, gradient in zip(own, torch.autograd.grad(theirs, (hidden, embedding)), strict=True):
            torch.testing.assert_close(actual, gradient, atol=2e-7, rtol=1e-4)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_candidates_of_the_whole_vocabulary_are_the_whole_distribution(name: str) -> None:
    hidden, embedding, of_teacher, teacher_embedding, targets, weights = drawn(40)
    student, teacher = Logits(hidden, embedding), Logits(of_teacher, teacher_embedding)
    top = torch.log_softmax(of_teacher @ teacher_embedding.t(), -1).topk(50)
    loss = DistillationLoss(FUNCTIONS[name])
    found = [loss(student, known, targets, weights) for known in (teacher, TopLogprobs(top.indices, top.values))]
    (total, reported), (other, of_candidates) = found
    assert other.item() == pytest.approx(total.item(), rel=1e-6)
    for key, value in reported.items():
        assert of_candidates[key].item() == pytest.approx(value.item(), rel=1e-5)
    assert of_candidates["teacher_top_k_mass"].item() == pytest.approx(weights.sum().item(), rel=1e-6)
    for one, two in zip(*(torch.autograd.grad(each, (hidden, embedding)) for each in (total, other)), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_other_tokens_are_one_outcome(name: str) -> None:
    """The divergence of k + 1 outcomes by hand; it is below that of the vocabulary, which is a finer partition."""
    hidden, embedding, of_teacher, teacher_embedding, targets, weights = drawn(40)
    p = torch.softmax((hidden @ embedding.t()).double(), -1)
    q = torch.softmax((of_teacher @ teacher_embedding.t()).double(), -1)
    top = q.topk(4)

    def coarse(values: Tensor) -> Tensor:
        chosen = values.gather(1, top.indices)
        return torch.cat([chosen, 1.0 - chosen.sum(-1, keepdim=True)], -1)

    expected = (whole(name, coarse(p), coarse(q), 0.5) * weights).sum()
    loss = DistillationLoss(FUNCTIONS[name])
    total, reported = loss(
        Logits(hidden, embedding), TopLogprobs(top.indices, top.values.log().float()), targets, weights
    )
    assert total.item() == pytest.approx(expected.item(), rel=1e-4)
    assert total.item() < (whole(name, p, q, 0.5) * weights).sum().item()
    gradients = torch.autograd.grad(expected, (hidden, embedding))
    for actual, gradient in zip(torch.autograd.grad(total, (hidden, embedding)), gradients, strict=True):
        torch.testing.assert_close(actual, gradient, atol=1e-4, rtol=1e-3)
    mass = (coarse(q)[:, :4].sum(-1) * weights).sum()
    assert reported["teacher_top_k_mass"].item() == pytest.approx(mass.item(), rel=1e-4)


def test_the_sampled_loss_has_the_gradient_of_the_reverse_kl_in_expectation() -> None:
    logits = torch.tensor([0.3, -1.0, 0.8], requires_grad=True)
    teacher = torch.log_softmax(torch.tensor([1.0, 0.0, -0.5]), -1)
    logprobs = torch.log_softmax(logits, -1)
    exact = torch.autograd.grad((logprobs.exp() * (logprobs - teacher)).sum(), logits, retain_graph=True)[0]
    each = sampled_reverse_kl(logprobs, logprobs.detach(), teacher)
    expected = torch.autograd.grad((logprobs.detach().exp() * each).sum(), logits)[0]
    torch.testing.assert_close(expected, exact)


def test_vocabularies_padded_to_different_sizes_are_compared_over_the_smaller() -> None:
    hidden, embedding, of_teacher, teacher_embedding, targets, weights = drawn(40)
    loss = DistillationLoss(forward_kl)
    expected, _ = loss(Logits(hidden, embedding), Logits(of_teacher, teacher_embedding), targets, weights)
    padded = torch.cat([embedding, torch.randn(6, 8)])
    found, _ = loss(Logits(hidden, padded), Logits(of_teacher, teacher_embedding), targets, weights)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(found, embedding)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, embedding)[0])


def test_nothing_is_kept_without_gradients() -> None:
    hidden, embedding, of_teacher, teacher_embedding, targets, weights = drawn(40)
    with torch.no_grad():
        total, _ = DistillationLoss(jsd)(
            Logits(hidden, embedding), Logits(of_teacher, teacher_embedding), targets, weights
        )
    assert not total.requires_grad
