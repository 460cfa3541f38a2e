"""The choice of neurons and their fit against brute force in float64."""

import itertools

import numpy as np
import pytest
import torch

from distill.models.layers import decoder_layers
from distill.models.start.ffn import Block, Neurons, read_block, write_ffn
from distill.models.start.neurons import RIDGES, Task, choose, contributions, gram, narrow_ffn
from helpers import tiny

MOE = [
    tiny.tiny_qwen3_moe, tiny.tiny_mixtral, tiny.tiny_olmoe, tiny.tiny_granite_moe, tiny.tiny_deepseek_v3,
    tiny.tiny_gpt_oss,
]  # fmt: skip
DENSE = [tiny.tiny_llama, tiny.tiny_qwen2, tiny.tiny_gemma, tiny.tiny_gpt2]


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def task_of(states, target, weight=None):
    return Task(states, target, torch.ones(len(states)) if weight is None else weight)


def ridge_error(features, target, ridge):
    """Minimum over W of |T - H W|^2 + ridge |W|^2, by normal equations in float64."""
    h, t = features.numpy().astype(np.float64), target.numpy().astype(np.float64)
    w = np.linalg.solve(h.T @ h + ridge * np.eye(h.shape[1]), h.T @ t)
    return float(((t - h @ w) ** 2).sum() + ridge * (w**2).sum())


@pytest.mark.parametrize("seed", range(5))
def test_each_choice_lowers_the_error_most_among_all(seed):
    features, target = drawn(40, 12, seed=seed), drawn(40, 3, seed=seed + 100)
    features[:, 7] = features[:, 2] + 1e-3 * features[:, 3]  # nearly the same as another
    ridge = 0.3
    gram_CC = features.T @ features + ridge * torch.eye(12)
    found = choose(gram_CC, features.T @ target, 6).tolist()
    chosen: list[int] = []
    for _ in range(6):
        errors = {j: ridge_error(features[:, [*chosen, j]], target, ridge) for j in set(range(12)) - set(chosen)}
        chosen.append(min(errors, key=errors.get))
    assert found == chosen


def test_a_constant_is_in_from_the_start():
    features, target = drawn(60, 8), drawn(60, 2, seed=1) + 5.0
    with_ones = torch.cat([features, torch.ones(60, 1)], 1)
    ridge = 0.1
    found = choose(with_ones.T @ with_ones + ridge * torch.eye(9), with_ones.T @ target, 3, constant=True).tolist()
    chosen = [8]
    for _ in range(3):
        errors = {j: ridge_error(with_ones[:, [*chosen, j]], target, ridge) for j in set(range(8)) - set(chosen)}
        chosen.append(min(errors, key=errors.get))
    assert found == chosen[1:]


def test_the_greedy_choice_is_near_the_best_of_all_subsets():
    features, target = drawn(50, 9, seed=3), drawn(50, 2, seed=4)
    found = choose(features.T @ features + 1e-6 * torch.eye(9), features.T @ target, 4).tolist()
    best = min(ridge_error(features[:, list(s)], target, 1e-6) for s in itertools.combinations(range(9), 4))
    assert ridge_error(features[:, found], target, 1e-6) <= 1.1 * best


def test_the_gram_matrix_is_summed_by_blocks(monkeypatch):
    neurons, weight = read_block(decoder_layers(tiny.tiny_llama())[0]).neurons, drawn(50, seed=2).square()
    task = task_of(drawn(50, 16), drawn(50, 16), weight)
    whole = gram(neurons, task)
    monkeypatch.setattr("distill.models.start.neurons.BLOCK_BYTES", 4 * 24 * 7)
    parts = gram(neurons, task)
    activations = neurons.activations(task.states_ND)
    weighted = (activations * weight[:, None]).T
    assert torch.allclose(whole[0], weighted @ activations, atol=1e-4)
    assert torch.allclose(whole[1], weighted @ task.target_ND, atol=1e-4)
    assert torch.allclose(parts[0], whole[0], atol=1e-4)
    assert torch.allclose(parts[1], whole[1], atol=1e-4)


def linear(inward, outward, expert=None):
    """A block of neurons that activate linearly."""
    neurons = Neurons(inward[None], outward, lambda read: read[0])
    return Block(torch.nn.Identity(), None, neurons, torch.tensor(expert or [-1] * len(outward)))


def test_contributions_are_gated_second_moments():
    block = linear(drawn(6, 4), drawn(6, 4, seed=1), [0, 0, 1, 1, -1, -1])
    states, gates = drawn(30, 4, seed=2), drawn(30, 2, seed=3).clamp(min=0)
    weight = gates[:, [0, 0, 1, 1]].numpy().astype(np.float64)
    weight = np.concatenate([weight, np.ones((30, 2))], 1)
    activations = states.numpy().astype(np.float64) @ block.neurons.inward_PMD[0].T.numpy()
    expected = ((weight * activations) ** 2).sum(0) * (block.neurons.outward_MD.numpy() ** 2).sum(1)
    assert contributions(block, task_of(states, states), gates).tolist() == pytest.approx(expected.tolist(), rel=1e-4)


def test_what_is_written_is_the_ridge_fit_around_the_mean_gated_start():
    block = linear(drawn(5, 4), drawn(5, 4, seed=1), [0, 0, 1, 1, 1])
    states, target, gates = drawn(80, 4, seed=2), drawn(80, 4, seed=5), torch.tensor([0.3, 0.7]).expand(80, 2)
    found = narrow_ffn(block, task_of(states, target), gates, 5, ridges=(0.2,))
    h, t = (states @ block.neurons.inward_PMD[0].T).double(), target.double()
    start = block.neurons.outward_MD.double() * torch.tensor([0.3, 0.3, 0.7, 0.7, 0.7])[:, None]
    ridge = 0.2 * (h.T @ h).diagonal().mean()
    expected = start + torch.linalg.solve(h.T @ h + ridge * torch.eye(5), h.T @ (t - h @ start))
    assert torch.allclose(found.outward_MD.double(), expected, atol=1e-4)


@pytest.mark.parametrize("make", MOE)
def test_a_block_of_fixed_gates_is_reproduced_by_all_its_neurons(make):
    """Biased, transposed and interleaved experts, and shared ones, are read right."""
    model = make(num_experts_per_tok=4)
    block = read_block(decoder_layers(model)[1])
    router = next(child for child in block.module.children() if hasattr(child, "top_k"))
    for parameter in router.parameters():
        parameter.data.zero_()
    states = drawn(1, 40, 16)
    seen = {}
    block.experts.register_forward_hook(lambda module, args, output: seen.update(index=args[1], weights=args[2]))
    with torch.no_grad():
        output = block.module(states)
    target = (output[0] if isinstance(output, tuple) else output)[0]
    gates = torch.zeros(40, 4).scatter(1, seen["index"], seen["weights"].float())
    width = len(block.neurons)
    constant = block.constants_ED is not None
    found = narrow_ffn(block, task_of(states[0], target), gates, width, constant=constant)
    assert width == 4 * block.experts.down_proj.numel() // 4 // 16 + (16 if make is tiny.tiny_deepseek_v3 else 0)
    assert (found.output(states[0]) - target).abs().max() <= 1e-5 * target.abs().max()
    fewer = narrow_ffn(block, task_of(states[0], target), gates, width // 2, constant=constant)
    some = block.neurons[slice(0, width // 2)]
    assert (fewer.output(states[0]) - target).norm() < 0.7 * (some.output(states[0]) - target).norm()


@pytest.mark.parametrize("make", DENSE)
def test_a_dense_ffn_is_the_sum_of_its_neurons_and_takes_them_back(make):
    layer = decoder_layers(make())[1]
    block, states = read_block(layer), drawn(1, 20, 16)
    with torch.no_grad():
        expected = layer.mlp(states)
        assert torch.allclose(block.neurons.output(states[0]), expected[0], atol=1e-5)
        order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
        copies = block.neurons.to(torch.device("cpu"))[order]
        write_ffn(layer.mlp, Neurons(*(x if x is None or callable(x) else x.clone() for x in vars(copies).values())))
        assert torch.allclose(layer.mlp(states), expected, atol=1e-5)


def test_more_neurons_than_there_are_write_nothing_yet():
    block = linear(drawn(3, 4), drawn(3, 4, seed=1))
    states = drawn(30, 4, seed=2)
    target = block.neurons.output(states)
    found = narrow_ffn(block, task_of(states, target), None, 5, generator=torch.Generator().manual_seed(0))
    assert len(found) == 5
    assert found.outward_MD[3:].abs().max() == 0
    assert found.inward_PMD[:, 3:].abs().min() > 0
    assert torch.allclose(found.output(states), target, atol=1e-5)


@pytest.mark.parametrize(("count", "noise"), [(60, 8.0), (400, 4.0), (4000, 0.0)])
def test_the_ridge_that_is_taken_does_nearly_best_on_fresh_tokens(count, noise):
    """Noise in the target and few tokens want a strong pull to the start, many tokens without noise a weak one."""
    inward, outward = drawn(20, 20), drawn(20, 4, seed=1)
    block, true = linear(inward, outward), outward + 0.3 * drawn(20, 4, seed=3)
    states, fresh = drawn(count, 20, seed=2), drawn(2000, 20, seed=6)
    task = task_of(states, states @ inward.T @ true + noise * drawn(count, 4, seed=4))

    def error(ridges):
        found = narrow_ffn(block, task, None, 20, ridges=ridges)
        return float((found.output(fresh) - fresh @ inward.T @ true).norm())

    single = [error((ridge,)) for ridge in RIDGES]
    assert error(RIDGES) <= 1.3 * min(single) + 1e-3
    assert error(RIDGES) < 0.7 * max(single)


def test_tokens_count_by_their_weight():
    block = linear(drawn(5, 4), drawn(5, 4, seed=1))
    states, target = drawn(80, 4, seed=2), drawn(80, 4, seed=5)
    weight = torch.ones(80)
    weight[40:] = 0.0
    found = narrow_ffn(block, task_of(states, target, weight), None, 5, ridges=(0.1,))
    half = narrow_ffn(block, task_of(states[:40], target[:40]), None, 5, ridges=(0.1,))
    assert torch.allclose(found.outward_MD, half.outward_MD, atol=1e-5)
