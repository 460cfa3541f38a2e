"""Walking a model border by border against its own forward pass."""

import pytest
import torch

from distill.models.start.walk import Rows, Walk
from helpers import tiny

FAMILIES = [
    tiny.tiny_llama, tiny.tiny_qwen2, tiny.tiny_gemma, tiny.tiny_gpt2, tiny.tiny_qwen3_moe, tiny.tiny_mixtral,
    tiny.tiny_olmoe, tiny.tiny_granite_moe, tiny.tiny_deepseek_v3, tiny.tiny_gpt_oss,
]  # fmt: skip
IDS = torch.randint(3, tiny.VOCAB, (3, 9), generator=torch.Generator().manual_seed(1))
CPU = torch.device("cpu")


@pytest.mark.parametrize("make", FAMILIES)
def test_states_at_every_border_are_the_models_own(make, monkeypatch):
    monkeypatch.setattr("distill.models.start.walk.PART_TOKENS", 18)  # two parts
    model = make(**({"n_layer": 3} if make is tiny.tiny_gpt2 else {"num_hidden_layers": 3}))
    with torch.no_grad():
        expected = model.get_decoder()(input_ids=IDS, use_cache=False, output_hidden_states=True).hidden_states
    walk = Walk(model, Rows.of(IDS), CPU)
    states = walk.embed()
    assert torch.equal(states, expected[0])
    one = walk.advance(range(0, 1), states)
    three = walk.advance(range(1, 3), one)
    assert torch.allclose(one, expected[1], atol=1e-6)
    assert torch.allclose(walk.advance(range(1, 2), one), expected[2], atol=1e-6)
    assert torch.allclose(walk.advance(range(1, 3), one, normed=True), expected[3], atol=1e-5)
    assert torch.allclose(walk.advance(range(0), three, normed=True), expected[3], atol=1e-5)
    with torch.no_grad():  # nothing is left behind
        again = model.get_decoder()(input_ids=IDS, use_cache=False).last_hidden_state
    assert torch.equal(again, expected[3])


def test_documents_of_packed_rows_do_not_see_each_other():
    model = tiny.tiny_llama()
    positions = torch.arange(9).remainder(5).expand(3, 9)
    rows = Rows(IDS, torch.ones_like(IDS, dtype=torch.bool), positions)
    with torch.no_grad():
        expected = model.get_decoder()(input_ids=IDS[:, 5:], use_cache=False).last_hidden_state
    walk = Walk(model, rows, CPU)
    found = walk.advance(range(0, 2), walk.embed(), normed=True)
    assert torch.allclose(found[:, 5:], expected, atol=1e-5)


def test_gradients_reach_the_layer_and_nothing_else():
    model = tiny.tiny_llama()
    walk = Walk(model, Rows.of(IDS), CPU)
    states = walk.embed()
    after, _ = walk.through(range(1, 2), states, slice(0, 3))
    after.square().sum().backward()
    touched = {name.split(".layers.")[1][0] for name, p in model.named_parameters() if p.grad is not None}
    assert touched == {"1"}
