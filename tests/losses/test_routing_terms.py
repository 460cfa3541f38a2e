"""The terms of the routing losses against hand-computed cases and plain float64 loops."""

import math
import subprocess
import sys

import pytest
import torch
from scipy.special import rel_entr

from distill.losses import routing_terms
from distill.losses.relation_kl import relation_heads
from distill.losses.routing import UNIT
from distill.losses.states import normalise
from helpers.routing import make_batch, number, plain_relation_kl

FEATURE, IMPORTANCE, BALANCE, ALIGNMENT = UNIT


def test_feature_matching_is_one_for_predicting_nothing_at_any_scale():
    mixture = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    for scale in (1e-4, 1.0, 1e4):
        nothing = routing_terms.feature_matching(torch.zeros(5, 16), mixture * scale)
        assert number(nothing) == pytest.approx(5.0, rel=1e-5)
        assert number(routing_terms.feature_matching(normalise(mixture), mixture * scale)) < 1e-9
    # [3, 1] normalises to [1, -1]: ((0.5 - 1)^2 + (0 + 1)^2) / 2
    value = routing_terms.feature_matching(torch.tensor([[0.5, 0.0]]), torch.tensor([[3.0, 1.0]]))
    assert number(value) == pytest.approx(0.625)


def test_importance_is_zero_for_a_perfect_probe_and_the_constant_line_for_the_mean_gate():
    gates = torch.softmax(torch.randn(50, 6, generator=torch.Generator().manual_seed(0)).double(), -1)
    assert number(routing_terms.expert_importance(gates.log() + 3.0, gates)) == pytest.approx(0.0, abs=1e-12)
    constant = gates.mean(0).log().expand(50, 6)
    expected = rel_entr(gates.numpy(), gates.mean(0).numpy()).sum(-1)
    assert number(routing_terms.expert_importance(constant, gates)) == pytest.approx(expected.sum(), rel=1e-12)
    assert number(routing_terms.constant_gate_kl(gates)) == pytest.approx(expected.mean(), rel=1e-12)
    one_hot = torch.eye(6)[:4]
    assert number(routing_terms.expert_importance(torch.zeros(4, 6), one_hot)) == pytest.approx(4 * math.log(6))


def test_balance_is_zero_when_balanced_and_e_minus_one_when_collapsed_in_each_layer():
    balanced = 50.0 * torch.eye(4).repeat(3, 1)
    assert number(routing_terms.load_balance(balanced, 1, 1)) == pytest.approx(0.0, abs=1e-6)
    # Each layer has collapsed on another expert: pooled over layers this would look balanced.
    collapsed = 50.0 * torch.eye(4).repeat_interleave(5, 0)
    assert number(routing_terms.load_balance(collapsed, 1, 4)) == pytest.approx(3.0, rel=1e-6)
    logits = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    assert number(routing_terms.load_balance(logits, 4, 2)) == pytest.approx(0.0, abs=1e-6)
    by_hand = 0.0
    for layer in logits.double().split(10):
        probs = layer.softmax(-1)
        for e in range(4):
            chosen = sum(e in sorted(range(4), key=lambda i: -number(row[i]))[:2] for row in layer)
            by_hand += 4 / 2 * (chosen / 10) * number(probs[:, e].mean()) / 2
    assert number(routing_terms.load_balance(logits, 2, 2)) == pytest.approx(by_hand - 1, abs=1e-6)


def test_what_the_student_lacks_gains_weight_by_the_stated_amount():
    gates = torch.tensor([[0.6, 0.3, 0.1]])
    gap = torch.tensor([[0.0, 2 * math.log(4), 0.0]])  # at tau 2 the second expert gains a factor of 4
    weights, index = routing_terms.student_aware_weights(gates, gates.log(), gap, 2, 2.0)
    assert index.tolist() == [[1, 0]]
    assert weights[0].tolist() == pytest.approx([1.2 / 1.8, 0.6 / 1.8])
    # A plain sum has weight 1 for each: the same gain, without the gate.
    weights, index = routing_terms.student_aware_weights(gates, torch.zeros(1, 3), gap, 2, 2.0)
    assert index.tolist() == [[1, 0]]
    assert weights[0].tolist() == pytest.approx([0.8, 0.2])


@pytest.mark.parametrize("block_rows", [1, 3, 16])
def test_relation_kl_against_loops(monkeypatch, block_rows):
    monkeypatch.setattr("distill.losses.relation_kl.LEAST_ROWS", block_rows)
    monkeypatch.setattr("distill.losses.relation_kl.CPU_BLOCK_BYTES", 1)
    batch = make_batch([[4, 3], [5], [1, 2]], 8)
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(3, 8, 12, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(3, 8, 16, generator=generator, dtype=torch.float64)
    value = routing_terms.attention_alignment(student, teacher, batch)
    expected = plain_relation_kl(student, teacher, batch, 4)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    (grad,), (expected_grad,) = (torch.autograd.grad(v, student) for v in (value, expected))
    assert torch.allclose(grad, expected_grad, rtol=1e-10, atol=1e-12)
    assert number(routing_terms.attention_alignment(student.detach(), student.detach(), batch)) == 0.0


def test_padding_may_hold_anything():
    batch = make_batch([[4, 3], [5]], 8)
    student, teacher = torch.randn(2, 2, 8, 12, generator=torch.Generator().manual_seed(0)).unbind()
    expected = routing_terms.attention_alignment(student, teacher, batch)
    padded = batch.attention_mask == 0
    student = student.masked_fill(padded[:, :, None], torch.nan).requires_grad_()
    value = routing_terms.attention_alignment(student, teacher.masked_fill(padded[:, :, None], torch.inf), batch)
    value.backward()
    assert torch.equal(value, expected)
    assert student.grad.isfinite().all()


def test_relation_heads_divide_both_widths():
    assert [relation_heads(576, 1024), relation_heads(576, 576), relation_heads(15, 40), relation_heads(7, 16)] == [
        16,
        16,
        5,
        1,
    ]


def test_relation_kl_is_fp32_under_autocast():
    batch = make_batch([[8]], 8)
    states = torch.randn(2, 1, 8, 12, generator=torch.Generator().manual_seed(0)).unbind()
    with torch.autocast("cpu", torch.bfloat16):
        inside = routing_terms.attention_alignment(*states, batch)
    assert torch.equal(inside, routing_terms.attention_alignment(*states, batch))


OTHER_RANK = """
import sys
import torch
from distill.losses.routing_terms import load_balance
torch.set_num_threads(1)
folder = sys.argv[1]
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=1, world_size=2)
mine = torch.load(f"{folder}/logits")[:, 3:].flatten(0, 1).requires_grad_()
value = load_balance(mine, 2, 2)
value.backward()
torch.save((value.detach(), mine.grad), f"{folder}/result")
torch.distributed.destroy_process_group()
"""


def test_balance_on_two_ranks_is_that_of_one_process(tmp_path):
    logits = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.save(logits, tmp_path / "logits")
    other = subprocess.Popen([sys.executable, "-c", OTHER_RANK, str(tmp_path)])
    whole = logits.clone().flatten(0, 1).requires_grad_()
    expected = routing_terms.load_balance(whole, 2, 2)
    expected.backward()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=2)
    try:
        mine = logits[:, :3].flatten(0, 1).requires_grad_()
        value = routing_terms.load_balance(mine, 2, 2)
        value.backward()
    finally:
        torch.distributed.destroy_process_group()
    assert other.wait(120) == 0
    other_value, other_grad = torch.load(tmp_path / "result")
    assert number(value) == number(other_value) == pytest.approx(number(expected), rel=1e-12)
    grads = [mine.grad.view(2, 3, 5), other_grad.view(2, 5, 5)]
    averaged = torch.cat(grads, 1) / 2  # as DDP does, for parameters that both ranks share
    assert torch.allclose(averaged, whole.grad.view(2, 8, 5), rtol=1e-12, atol=1e-15)
