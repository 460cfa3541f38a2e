"""Errors of states and the weights of tokens against numpy in float64."""

import numpy as np
import pytest
import torch

from distill.models.start.fit import Kept, token_weights, train_alone, unexplained


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_unexplained_share_is_weighted_and_looks_at_nothing_else():
    target, weight = drawn(3, 5, 4) + 7, drawn(3, 5, seed=1).square()
    states = target + 0.3 * drawn(3, 5, 4, seed=2)
    weight[:, 0] = weight[2] = 0.0
    states[:, 0] = target[2] = float("nan")
    t, s = (x.flatten(0, 1)[weight.flatten() > 0].double().numpy() for x in (target, states))
    w = weight.flatten()[weight.flatten() > 0].double().numpy()
    mean = np.average(t, axis=0, weights=w)
    expected = (w @ ((s - t) ** 2).sum(1)) / (w @ ((t - mean) ** 2).sum(1))
    assert unexplained(states, target, weight) == pytest.approx(expected, rel=1e-5)
    assert unexplained(states.bfloat16(), target.bfloat16(), weight) == pytest.approx(expected, rel=0.1)
    assert unexplained(target, target, weight) == 0.0


def test_tokens_count_by_one_over_their_mean_square():
    states, counted = drawn(2, 6, 8), torch.ones(2, 6, dtype=torch.bool)
    states[0, 3] *= 1000
    counted[1, 0] = False
    expected = 1 / (states.double() ** 2).mean(-1).numpy()
    expected[1, 0] = 0.0
    np.testing.assert_allclose(token_weights(states, counted).numpy(), expected, rtol=1e-5)


def test_a_module_alone_is_trained_and_put_back():
    torch.manual_seed(0)
    module, inputs, told = torch.nn.Linear(4, 2), drawn(64, 4), []
    wanted, kept = inputs @ drawn(4, 2, seed=1), Kept(module)
    before = [parameter.clone() for parameter in module.parameters()]
    train_alone(module, lambda step: (module(inputs) - wanted).square().mean(), 200, 0.1, told.append)
    assert (module(inputs) - wanted).square().mean() < 1e-3
    assert told[-1] == 1.0
    assert all(parameter.grad is None for parameter in module.parameters())
    kept.put_back()
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
