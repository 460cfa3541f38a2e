"""The engine against the naive dense computation through autograd and against loops over single tokens."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from distill.losses.engine import divergence
from distill.losses.engine.divergence import KDLoss
from distill.losses.engine.loss import distillation_loss
from distill.models.head import LMHead
from distill.teachers.targets import DenseTargets, top_k_targets
from helpers.naive_loss import (
    DIVERGENCES,
    HEADS,
    STUDENT_D,
    TAUGHT,
    N,
    V,
    assert_same,
    gradients,
    make_case,
    naive,
    sparse,
)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("kind", "name"), TAUGHT)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_value_and_gradients_equal_the_naive_computation(kind, name, head, temperature, dtype, tolerance):
    hidden, student_head, labels, dense = make_case(head, dtype=dtype)
    targets, kd = sparse(kind, dense, temperature), KDLoss(name, coefficient=1.3)
    got = distillation_loss(
        hidden,
        student_head,
        labels,
        targets,
        kd=kd,
        temperature=temperature,
        kd_weight=0.7,
        lm_weight=0.3,
        chunk_size=4,
    )
    wide = [t.detach().double().requires_grad_() for t in (hidden, student_head.weight)]
    bias = student_head.bias
    wide_head = replace(
        student_head, weight=wide[1], bias=None if bias is None else bias.detach().double().requires_grad_()
    )
    theirs = dense.head
    dense = DenseTargets(
        dense.hidden_ND.double(),
        replace(theirs, weight=theirs.weight.double(), bias=None if theirs.bias is None else theirs.bias.double()),
    )
    reference, kd_sum, lm_sum = naive(
        wide[0], wide_head, labels, targets if kind != "dense" else dense, kd, temperature, 0.7, 0.3, dense
    )
    assert_same(got.loss.double(), reference.detach(), tolerance)
    assert_same(got.kd_sum.double(), kd_sum.detach(), tolerance)
    assert_same(got.lm_sum.double(), lm_sum.detach(), tolerance)
    for ours, expected in zip(
        gradients(got.loss, hidden, student_head), gradients(reference, wide[0], wide_head), strict=True
    ):
        assert_same(ours.double(), expected, tolerance)


@pytest.mark.parametrize("kind", ["dense", "top-k", "sampled"])
@pytest.mark.parametrize(("student_vocab", "teacher_vocab"), [(V, V + 6), (V + 6, V)])
@pytest.mark.parametrize("lm_weight", [None, 0.3])
def test_padding_of_either_vocabulary_is_masked_from_kd_only(kind, student_vocab, teacher_vocab, lm_weight):
    case = make_case("all", student_vocab, teacher_vocab)
    hidden, head, labels, dense = case
    targets = sparse(kind, dense, 2.0, V)
    options = {"kd": KDLoss(), "temperature": 2.0, "kd_weight": 0.7, "lm_weight": lm_weight}
    got = distillation_loss(hidden, head, labels, targets, **options)
    reference, _, _ = naive(hidden, head, labels, targets, dense=dense, **options)
    assert_same(got.loss, reference, 1e-10)
    for ours, expected in zip(gradients(got.loss, hidden, head), gradients(reference, hidden, head), strict=True):
        assert_same(ours, expected, 1e-10)


@pytest.mark.parametrize(("kind", "name"), TAUGHT)
def test_gradcheck(kind, name):
    hidden, head, labels, dense = make_case("all", 9, 9)
    targets = sparse(kind, dense, 2.0)
    hidden = hidden[:3].detach().requires_grad_()
    targets = targets.rows(slice(0, 3)) if kind != "dense" else DenseTargets(dense.hidden_ND[:3], dense.head)

    def loss(hidden, weight, bias):
        return distillation_loss(
            hidden, replace(head, weight=weight, bias=bias), labels[:3], targets, kd=KDLoss(name), temperature=2.0,
            kd_weight=0.7, lm_weight=0.3, chunk_size=2,
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(loss, (hidden, head.weight, head.bias), atol=1e-6)


@pytest.mark.parametrize("kind", ["dense", "top-k", "sampled"])
@pytest.mark.parametrize("chunk_size", [1, 2, 5, 10, 100])
def test_any_chunk_size_gives_the_same(kind, chunk_size):
    hidden, head, labels, dense = make_case("all", dtype=torch.float32)
    targets = sparse(kind, dense, 2.0)
    options = {"kd": KDLoss(), "temperature": 2.0, "kd_weight": 0.7, "lm_weight": 0.3, "metrics": True}
    one = distillation_loss(hidden, head, labels, targets, **options, chunk_size=N)
    some = distillation_loss(hidden, head, labels, targets, **options, chunk_size=chunk_size)
    assert_same(some.loss, one.loss, 1e-6)
    assert_same(some.stats.student_nll, one.stats.student_nll, 1e-6)
    for ours, expected in zip(gradients(some.loss, hidden, head), gradients(one.loss, hidden, head), strict=True):
        assert_same(ours, expected, 1e-6)


def test_blocks_of_rows_smaller_than_a_chunk_give_the_same(monkeypatch):
    hidden, head, labels, targets = make_case("all")
    options = {"kd": KDLoss("jsd"), "temperature": 2.0, "kd_weight": 0.7, "lm_weight": 0.3}
    one = distillation_loss(hidden, head, labels, targets, **options)
    monkeypatch.setattr("distill.losses.engine.walk._BLOCK_BYTES_CPU", 3 * V * 8)
    some = distillation_loss(hidden, head, labels, targets, **options)
    assert_same(some.loss, one.loss, 1e-14)
    for ours, expected in zip(gradients(some.loss, hidden, head), gradients(one.loss, hidden, head), strict=True):
        assert_same(ours, expected, 1e-13)


def test_splitting_the_tokens_adds_up():
    hidden, head, labels, targets = make_case("all")
    options = {"kd": KDLoss(), "temperature": 2.0, "kd_weight": 0.7 / N, "lm_weight": 0.3 / N}
    whole = distillation_loss(hidden, head, labels, targets, **options).loss
    parts = [
        distillation_loss(hidden[s], head, labels[s], DenseTargets(targets.hidden_ND[s], targets.head), **options).loss
        for s in (slice(0, 1), slice(1, 8), slice(8, 8), slice(8, N))
    ]
    assert_same(sum(parts), whole, 1e-14)
    for ours, expected in zip(gradients(sum(parts), hidden, head), gradients(whole, hidden, head), strict=True):
        assert_same(ours, expected, 1e-13)


@pytest.mark.parametrize("kind", ["dense", "top-k", "sampled"])
def test_no_tokens_give_exactly_zero_with_zero_gradients(kind):
    hidden, head, labels, dense = make_case("all")
    hidden = hidden[:0].detach().requires_grad_()
    dense = DenseTargets(dense.hidden_ND[:0], dense.head)
    targets = sparse(kind, dense, 2.0)
    got = distillation_loss(
        hidden, head, labels[:0], targets, kd=KDLoss(), temperature=2.0, kd_weight=0.7, lm_weight=0.3, metrics=True
    )
    assert got.loss.item() == got.kd_sum.item() == got.lm_sum.item() == got.stats.student_nll.item() == 0
    for gradient in gradients(got.loss, hidden, head):
        assert (gradient == 0).all()


@pytest.mark.parametrize("kind", ["dense", "top-k"])
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_1e4_do_not_overflow(kind, name, dtype):
    hidden, head, labels, dense = make_case(dtype=dtype)
    with torch.no_grad():
        for tensor in (hidden, dense.hidden_ND):
            tensor.mul_(1e4 / (tensor.abs().max() * 4))
    assert head.logits(hidden).abs().max() > 3e3
    got = distillation_loss(
        hidden, head, labels, sparse(kind, dense, 1.0), kd=KDLoss(name), temperature=1.0, kd_weight=1.0, lm_weight=0.1,
        metrics=True,
    )  # fmt: skip
    assert got.loss.isfinite()
    assert got.stats.kl_div is None or got.stats.kl_div.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients(got.loss, hidden, head))


@pytest.mark.parametrize(("kind", "name"), TAUGHT)
def test_ids_that_both_models_exclude_count_for_nothing(kind, name):
    hidden, head, labels, dense = make_case()
    banned = torch.zeros(V, dtype=torch.float64)
    banned[V - 4 :] = -torch.inf
    labels = labels % (V - 4)
    options = {"kd": KDLoss(name), "temperature": 2.0, "kd_weight": 0.7, "lm_weight": 0.3}
    cut = DenseTargets(dense.hidden_ND, LMHead(dense.head.weight[: V - 4]))
    targets = DenseTargets(dense.hidden_ND, LMHead(dense.head.weight, banned))
    if kind != "dense":
        cut = targets = sparse(kind, cut, 2.0)
    expected = distillation_loss(hidden, LMHead(head.weight[: V - 4]), labels, cut, **options)
    got = distillation_loss(hidden, LMHead(head.weight, banned), labels, targets, **options)
    assert_same(got.loss, expected.loss, 1e-12)
    for ours, theirs in zip(gradients(got.loss, hidden, head), gradients(expected.loss, hidden, head), strict=True):
        assert_same(ours, theirs, 1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_an_id_that_only_the_teacher_excludes_is_finite(name):
    hidden, head, labels, dense = make_case(dtype=torch.float32)
    banned = torch.zeros(V)
    banned[3] = -torch.inf
    targets = DenseTargets(dense.hidden_ND, LMHead(dense.head.weight, banned))
    got = distillation_loss(
        hidden, head, labels, targets, kd=KDLoss(name), temperature=2.0, kd_weight=1.0, lm_weight=None
    )
    assert got.loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients(got.loss, hidden, head))


def test_a_nan_is_passed_on():
    hidden, head, labels, targets = make_case()
    with torch.no_grad():
        hidden[4, 2] = torch.nan
    options = {"kd": KDLoss(), "temperature": 1.0, "kd_weight": 1.0, "lm_weight": None}
    assert distillation_loss(hidden, head, labels, targets, **options).loss.isnan()
    targets.hidden_ND[5] = torch.inf
    assert not distillation_loss(hidden.detach().nan_to_num(), head, labels, targets, **options).loss.isfinite()


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_where_student_and_teacher_are_the_same(name, dtype):
    hidden, head, labels, _ = make_case("all", dtype=dtype)
    targets = DenseTargets(hidden.detach(), head)
    got = distillation_loss(
        hidden, head, labels, targets, kd=KDLoss(name), temperature=2.0, kd_weight=1.0, lm_weight=None
    )
    tolerance = (
        0 if name in ("forward_kl", "reverse_kl", "total_variation") else 1e-5 if dtype == torch.float32 else 1e-13
    )
    assert abs(got.loss.item()) <= tolerance
    for gradient in gradients(got.loss, hidden, head):
        assert gradient.abs().max() <= 10 * tolerance


def test_weight_none_computes_nothing_and_zero_only_the_value():
    hidden, head, labels, targets = make_case()
    both = {"kd": KDLoss(), "temperature": 2.0}
    full = distillation_loss(hidden, head, labels, targets, **both, kd_weight=0.7, lm_weight=0.3)
    kd_only = distillation_loss(hidden, head, labels, targets, **both, kd_weight=0.7, lm_weight=0.0)
    assert_same(kd_only.lm_sum, full.lm_sum, 1e-14)
    assert kd_only.loss.item() == pytest.approx(0.7 * full.kd_sum.item())
    none = distillation_loss(hidden, head, labels, targets, **both, kd_weight=0.7, lm_weight=None)
    assert none.lm_sum is None
    assert all(
        torch.equal(a, b)
        for a, b in zip(gradients(kd_only.loss, hidden, head), gradients(none.loss, hidden, head), strict=True)
    )
    lm_only = distillation_loss(hidden, head, labels, targets, **both, kd_weight=0.0, lm_weight=0.3)
    assert_same(lm_only.kd_sum, full.kd_sum, 1e-14)
    for ours, expected in zip(
        gradients(lm_only.loss, hidden, head),
        gradients(0.3 * cross_entropy(head.logits(hidden), labels, reduction="sum"), hidden, head),
        strict=True,
    ):
        assert_same(ours, expected, 1e-12)
    nothing = distillation_loss(hidden, head, labels, targets, **both, kd_weight=0.0, lm_weight=None)
    assert nothing.loss.item() == 0
    assert not nothing.loss.requires_grad


def test_teacher_is_not_touched_without_kd_and_metrics():
    hidden, head, labels, _ = make_case()
    broken = DenseTargets(None, None)  # reading anything of it would raise
    got = distillation_loss(hidden, head, labels, broken, kd=KDLoss(), temperature=1.0, kd_weight=None, lm_weight=1.0)
    assert got.kd_sum is None
    assert_same(got.loss, cross_entropy(head.logits(hidden), labels, reduction="sum"), 1e-12)


def test_teacher_gets_no_gradient():
    hidden, head, labels, targets = make_case("all")
    targets.hidden_ND.requires_grad_()
    got = distillation_loss(hidden, head, labels, targets, kd=KDLoss(), temperature=1.0, kd_weight=1.0, lm_weight=1.0)
    got.loss.backward()
    assert targets.hidden_ND.grad is targets.head.weight.grad is targets.head.bias.grad is None
    assert head.weight.grad is not None


def test_frozen_head_costs_no_gradient_and_changes_no_other(monkeypatch):
    hidden, head, labels, targets = make_case("all")
    options = {"kd": KDLoss(), "temperature": 2.0, "kd_weight": 0.7, "lm_weight": 0.3}
    expected = gradients(distillation_loss(hidden, head, labels, targets, **options).loss, hidden, head)[0]
    monkeypatch.setattr("distill.losses.engine.walk.addmm_into", None)  # would fail if called
    frozen = replace(head, weight=head.weight.detach(), bias=head.bias.detach())
    loss = distillation_loss(hidden, frozen, labels, targets, **options).loss
    assert torch.equal(torch.autograd.grad(loss, hidden)[0], expected)


def test_tied_weights_get_both_gradients():
    embedding = torch.randn(V, STUDENT_D, dtype=torch.float64, requires_grad=True)
    _, _, labels, targets = make_case()
    ids = torch.randint(0, V, (N,))

    def loss_of(function):
        hidden = torch.tanh(embedding[ids])
        return function(hidden, LMHead(embedding), labels, targets, KDLoss(), 2.0, 0.7, 0.3)

    def engine(hidden, head, labels, targets, kd, temperature, kd_weight, lm_weight):
        return distillation_loss(
            hidden, head, labels, targets, kd=kd, temperature=temperature, kd_weight=kd_weight, lm_weight=lm_weight
        ).loss

    ours = torch.autograd.grad(loss_of(engine), embedding)[0]
    theirs = torch.autograd.grad(loss_of(lambda *args: naive(*args)[0]), embedding)[0]
    assert_same(ours, theirs, 1e-12)


def test_rows_need_not_be_contiguous():
    _, head, labels, targets = make_case()
    storage = torch.randn(STUDENT_D, 2 * N, dtype=torch.float64, requires_grad=True)
    options = {"kd": KDLoss(), "temperature": 2.0, "kd_weight": 0.7, "lm_weight": 0.3, "chunk_size": 4}
    loss = distillation_loss(storage.T[::2], head, labels, targets, **options).loss
    expected = distillation_loss(storage.T[::2].contiguous(), head, labels, targets, **options).loss
    assert_same(torch.autograd.grad(loss, storage)[0], torch.autograd.grad(expected, storage)[0], 1e-14)


def test_backward_takes_the_incoming_factor_and_can_be_repeated():
    hidden, head, labels, targets = make_case("all")
    loss = distillation_loss(
        hidden, head, labels, targets, kd=KDLoss(), temperature=2.0, kd_weight=0.7, lm_weight=0.3
    ).loss
    once = torch.autograd.grad(loss, [hidden, head.weight, head.bias], retain_graph=True)
    again = torch.autograd.grad(3 * loss, [hidden, head.weight, head.bias])
    for ours, expected in zip(again, once, strict=True):
        assert_same(ours, 3 * expected, 1e-14)


def test_gradients_accumulate_into_parameters():
    hidden, head, labels, targets = make_case("all")
    options = {"kd": KDLoss(), "temperature": 2.0, "kd_weight": 0.7, "lm_weight": 0.3}
    for _ in range(2):
        (distillation_loss(hidden, head, labels, targets, **options).loss / 2).backward()
    expected = gradients(distillation_loss(hidden, head, labels, targets, **options).loss, hidden, head)
    for tensor, gradient in zip((hidden, head.weight, head.bias), expected, strict=True):
        assert_same(tensor.grad, gradient, 1e-14)


def test_no_grad_gives_values_without_graph():
    hidden, head, labels, targets = make_case()
    options = {"kd": KDLoss(), "temperature": 2.0, "kd_weight": 0.7, "lm_weight": 0.3}
    with_graph = distillation_loss(hidden, head, labels, targets, **options)
    with torch.no_grad():
        without = distillation_loss(hidden, head, labels, targets, **options)
    assert torch.equal(without.loss, with_graph.loss)
    assert not without.loss.requires_grad
    assert not with_graph.kd_sum.requires_grad


def test_statistics_equal_those_of_whole_logits():
    hidden, head, labels, targets = make_case("all", student_vocab=V + 3, teacher_vocab=V)
    got = distillation_loss(
        hidden, head, labels, targets, kd=KDLoss("jsd"), temperature=3.0, kd_weight=0.5, lm_weight=0.5, metrics=True,
        chunk_size=3,
    ).stats  # fmt: skip
    student, teacher = head.logits(hidden).detach(), targets.head.logits(targets.hidden_ND).detach()
    log_q, log_p = student[:, :V].log_softmax(-1), teacher.log_softmax(-1)
    torch.testing.assert_close(got.kl_div, divergence.forward_kl(log_q, log_p).sum())
    torch.testing.assert_close(got.student_nll, cross_entropy(student, labels, reduction="sum"))
    torch.testing.assert_close(got.teacher_nll, cross_entropy(teacher, labels, reduction="sum"))
    torch.testing.assert_close(got.student_entropy, -(log_q.exp() * log_q).sum())
    torch.testing.assert_close(got.teacher_entropy, -(log_p.exp() * log_p).sum())
    assert got.agreement.item() == (log_q.argmax(-1) == log_p.argmax(-1)).sum().item()
    assert got.tokens.item() == N
    table = [[0.0, 0.0, 0.0] for _ in range(15)]
    for row, label in zip(student.softmax(-1).tolist(), labels.tolist(), strict=True):
        confidence = max(row)
        entry = table[math.ceil(confidence * 15) - 1]
        entry[0] += 1
        entry[1] += confidence
        entry[2] += row.index(confidence) == label
    torch.testing.assert_close(got.calibration_B3, torch.tensor(table, dtype=torch.float64))


def test_statistics_without_a_dense_teacher_are_the_students():
    hidden, head, labels, dense = make_case()
    alone = distillation_loss(
        hidden, head, labels, None, kd=None, temperature=1.0, kd_weight=None, lm_weight=None, metrics=True
    )
    assert alone.loss.item() == 0
    assert alone.stats.kl_div is alone.stats.teacher_nll is alone.stats.agreement is None
    with_top_k = distillation_loss(
        hidden, head, labels, top_k_targets(dense, 4, 1.0), kd=KDLoss(), temperature=1.0, kd_weight=1.0, lm_weight=None,
        metrics=True,
    )  # fmt: skip
    assert with_top_k.stats.kl_div is None
    assert torch.equal(with_top_k.stats.student_nll, alone.stats.student_nll)
