"""Refitted experts against one least-squares fit of all of them together."""

import pytest
import torch

from distill.models.layers import decoder_layers
from distill.models.start.experts import refit_experts
from distill.models.start.ffn import read_block
from distill.models.start.neurons import Task
from helpers import tiny

MOE = [
    tiny.tiny_qwen3_moe, tiny.tiny_mixtral, tiny.tiny_olmoe, tiny.tiny_granite_moe, tiny.tiny_deepseek_v3,
    tiny.tiny_gpt_oss,
]  # fmt: skip


def routed(make):
    """A block, its states, its output and its gates."""
    block = read_block(decoder_layers(make())[1])
    states, seen = torch.randn(1, 1500, 16, generator=torch.Generator().manual_seed(0)), {}
    handle = block.experts.register_forward_hook(lambda module, args, output: seen.update(i=args[1], w=args[2]))
    with torch.no_grad():
        output = block.module(states)
    handle.remove()
    output = output[0] if isinstance(output, tuple) else output
    return block, states, output[0], torch.zeros(1500, 4).scatter(1, seen["i"], seen["w"].float())


@pytest.mark.parametrize("make", MOE)
def test_a_block_that_does_what_it_should_stays_as_it_is(make):
    block, states, output, gates = routed(make)
    refit_experts(block, Task(states[0], output, torch.ones(1500)), gates)
    with torch.no_grad():
        again = block.module(states)
    again = again[0] if isinstance(again, tuple) else again
    assert (again[0] - output).abs().max() <= 1e-4 * output.abs().max()


@pytest.mark.parametrize("make", MOE)
def test_two_rounds_come_near_the_fit_of_all_experts_together(make):
    block, states, output, gates = routed(make)
    mixing = torch.randn(16, 16, generator=torch.Generator().manual_seed(1)) / 4
    target = output + torch.tanh(states[0] @ mixing)
    features = []
    for expert in block.expert_M.unique().tolist():
        gate = torch.ones(1500, 1) if expert < 0 else gates[:, expert, None]
        features.append(block.of(expert).activations(states[0]) * gate)
        if block.constants_ED is not None:
            features.append(gate)
    together = torch.cat(features, 1).double()
    best = target - together @ torch.linalg.lstsq(together, target.double()).solution
    refit_experts(block, Task(states[0], target, torch.ones(1500)), gates)
    with torch.no_grad():
        found = block.module(states)
    found = (found[0] if isinstance(found, tuple) else found)[0]
    assert (found - target).norm() < 1.1 * best.norm()
    assert (found - target).norm() < 0.95 * (output - target).norm()
