"""Products in 16 bits with sums in 32, with and without units for them."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from distill.losses.engine import divergence
from distill.losses.engine.divergence import KDLoss
from distill.losses.engine.loss import distillation_loss
from distill.models.head import LMHead
from helpers.naive_loss import gradients, make_case


@pytest.fixture
def units(monkeypatch):
    """Products in 16 bits, as on a CPU that has units for them."""
    monkeypatch.setattr("distill.models.precision.has_units", lambda dtype: True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_without_16_bit_units_products_are_fp32(dtype, monkeypatch):
    hidden, head, labels, targets = make_case("all", dtype=torch.float32)
    options = {"kd": KDLoss(), "temperature": 2.0, "kd_weight": 0.7, "lm_weight": 0.3}
    exact = distillation_loss(hidden, head, labels, targets, **options)
    monkeypatch.setattr("distill.models.precision.has_units", lambda dtype: False)
    with torch.autocast("cpu", dtype=dtype):
        got = distillation_loss(hidden, head, labels, targets, **options)
    assert torch.equal(got.loss, exact.loss)
    for ours, theirs in zip(gradients(got.loss, hidden, head), gradients(exact.loss, hidden, head), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("units")
@pytest.mark.parametrize("part_bytes", [1, 16 << 20])
def test_bf16_products_keep_fp32_sums(part_bytes, monkeypatch):
    """Against the same logits, rounded to bf16, in fp64: only the products may be coarse."""
    monkeypatch.setattr("distill.models.head._PART_BYTES", part_bytes)
    hidden, head, labels, targets = make_case("all", dtype=torch.float32)
    options = {"kd": KDLoss(), "temperature": 2.0, "kd_weight": 0.7, "lm_weight": 0.3}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = distillation_loss(hidden, head, labels, targets, **options)
    assert got.loss.dtype == got.kd_sum.dtype == torch.float32
    low = lambda x: x.detach().bfloat16()  # noqa: E731
    student, teacher = low(hidden) @ low(head.weight).T, low(targets.hidden_ND) @ low(targets.head.weight).T
    student, teacher = (
        6 * torch.tanh(1.5 * (z.double() + b.detach().double()) / 6)
        for z, b in ((student, head.bias), (teacher, targets.head.bias))
    )
    log_q, log_p = (student / 2).log_softmax(-1), (teacher / 2).log_softmax(-1)
    expected = 0.7 * 4 * divergence.forward_kl(log_q, log_p).sum() + 0.3 * cross_entropy(
        student, labels, reduction="sum"
    )
    assert got.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    exact = gradients(distillation_loss(hidden, head, labels, targets, **options).loss, hidden, head)
    for ours, theirs in zip(gradients(got.loss, hidden, head), exact, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize("has_units", [True, False])
def test_bf16_student_and_fp32_teacher_mix(has_units, monkeypatch):
    monkeypatch.setattr("distill.models.precision.has_units", lambda dtype: has_units)
    hidden, head, labels, targets = make_case(dtype=torch.float32)
    options = {"kd": KDLoss(), "temperature": 2.0, "kd_weight": 0.7, "lm_weight": 0.3}
    exact = distillation_loss(hidden, head, labels, targets, **options).loss
    low = hidden.detach().bfloat16().requires_grad_()
    low_head = LMHead(head.weight.detach().bfloat16().requires_grad_())
    loss = distillation_loss(low, low_head, labels, targets, **options).loss
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    for ours, theirs in zip(gradients(loss, low, low_head), gradients(exact, hidden, head), strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.usefixtures("units")
def test_fp16_gradients_survive_a_small_normaliser():
    """Logit gradients stay in their natural range in fp16; weight and loss scale are applied in fp32."""
    hidden, head, labels, targets = make_case(dtype=torch.float32)
    options = {"kd": KDLoss(), "temperature": 1.0, "lm_weight": None}
    exact = gradients(distillation_loss(hidden, head, labels, targets, **options, kd_weight=1.0).loss, hidden, head)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = distillation_loss(hidden, head, labels, targets, **options, kd_weight=1e-7).loss
    for ours, theirs in zip(gradients(loss * 65536, hidden, head), exact, strict=True):
        assert (ours / (1e-7 * 65536) - theirs).norm() < 0.01 * theirs.norm()
