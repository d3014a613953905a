"""The tiled cross-entropy against F.cross_entropy: value, gradients, zero weights, 16-bit inputs."""

import pytest
import torch
import torch.nn.functional as F

from lcconvert.convert.loss import weighted_cross_entropy, weighted_divergence


def make(rows: int = 37, hidden: int = 16, vocab: int = 101) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(rows, hidden, generator=generator, requires_grad=True)
    head = torch.randn(vocab, hidden, generator=generator, requires_grad=True)
    targets = torch.randint(vocab, (rows,), generator=generator)
    weights = torch.rand(rows, generator=generator)
    return states, head, targets, weights


def plain(states: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (weights * F.cross_entropy(states @ head.T, targets, reduction="none")).sum()


@pytest.mark.parametrize("tile_rows", [1, 8, 37, 512])
def test_equals_the_plain_form(tile_rows: int) -> None:
    states, head, targets, weights = make()
    expected = plain(states, head, targets, weights)
    expected_grads = torch.autograd.grad(expected * 3.0, (states, head))
    loss = weighted_cross_entropy(states, head, targets, weights, tile_rows)
    grads = torch.autograd.grad(loss * 3.0, (states, head))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grads, expected_grads)


def test_gradcheck_in_double() -> None:
    states, head, targets, weights = make(rows=5, hidden=4, vocab=7)
    states, head = (x.detach().double().requires_grad_() for x in (states, head))
    grads = torch.autograd.grad(weighted_cross_entropy(states, head, targets, weights, 2), (states, head))
    expected = torch.autograd.grad(plain(states, head, targets, weights.double()), (states, head))
    torch.testing.assert_close(grads, expected, rtol=1e-6, atol=1e-6)


def test_rows_of_weight_zero_do_not_count() -> None:
    states, head, targets, weights = make()
    weights[::2] = 0.0
    with torch.no_grad():
        states[::2] = float("nan")  # would poison the loss if it were touched
    loss = weighted_cross_entropy(states, head, targets, weights, 8)
    grad = torch.autograd.grad(loss, states)[0]
    torch.testing.assert_close(loss, plain(states[1::2], head, targets[1::2], weights[1::2]))
    assert not grad[::2].any()


def test_no_supervised_row() -> None:
    states, head, targets, weights = make()
    loss = weighted_cross_entropy(states, head, targets, torch.zeros_like(weights))
    assert loss.item() == 0.0
    assert not torch.autograd.grad(loss, states)[0].any()


def test_frozen_head_and_bfloat16() -> None:
    states, head, targets, weights = make()
    states16 = states.detach().bfloat16().requires_grad_()
    frozen = head.detach()
    loss = weighted_cross_entropy(states16, frozen, targets, weights, 8)
    assert loss.dtype == torch.float32
    grad = torch.autograd.grad(loss, states16)[0]
    expected = torch.autograd.grad(plain(states, frozen, targets, weights), states)[0]
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(grad.float(), expected, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("tile_rows", [8, 512])
def test_divergence_equals_the_plain_form(tile_rows: int) -> None:
    states, head, _, weights = make()
    generator = torch.Generator().manual_seed(1)
    teacher_states, teacher_head = torch.randn(37, 12, generator=generator), torch.randn(101, 12, generator=generator)
    said, wanted = (states @ head.T).log_softmax(-1), (teacher_states @ teacher_head.T).log_softmax(-1)
    expected = (weights * F.kl_div(said, wanted, log_target=True, reduction="none").sum(-1)).sum()
    expected_grads = torch.autograd.grad(expected * 3.0, (states, head))
    loss = weighted_divergence(states, head, teacher_states, teacher_head, weights, tile_rows)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss * 3.0, (states, head)), expected_grads)
