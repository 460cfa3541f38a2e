"""The engine against the naive dense computation through autograd and against loops over single tokens."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from distill.errors import UserError
from distill.losses.engine import divergence
from distill.losses.engine.divergence import KDLoss
from distill.losses.engine.loss import distillation_loss
from distill.models.head import LMHead
from distill.teachers.targets import DenseTargets, SampledTargets, TopKTargets, sampled_targets, top_k_targets

DIVERGENCES = {
    "forward_kl": divergence.forward_kl,
    "reverse_kl": divergence.reverse_kl,
    "jsd": divergence.generalized_jsd,
    "skew_forward_kl": divergence.skew_forward_kl,
    "skew_reverse_kl": divergence.skew_reverse_kl,
    "total_variation": divergence.total_variation,
}
HEADS = {
    "plain": {},
    "soft-cap": {"softcap": 6.0},
    "scale": {"scale": 0.4},
    "bias": {"bias": True},
    "all": {"softcap": 6.0, "scale": 1.5, "bias": True},
}
N, STUDENT_D, TEACHER_D, V = 11, 6, 9, 37


def make_head(width, vocab=V, bias=False, dtype=torch.float64, **options) -> LMHead:
    weight = torch.randn(vocab, width, dtype=dtype, requires_grad=True)
    return LMHead(weight, torch.randn(vocab, dtype=dtype, requires_grad=True) if bias else None, **options)


def make_case(head="plain", student_vocab=V, teacher_vocab=V, dtype=torch.float64):
    """Student hidden states, head, labels and dense targets."""
    hidden = torch.randn(N, STUDENT_D, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, min(student_vocab, teacher_vocab), (N,))
    targets = DenseTargets(
        torch.randn(N, TEACHER_D, dtype=dtype), make_head(TEACHER_D, teacher_vocab, dtype=dtype, **HEADS[head])
    )
    return hidden, make_head(STUDENT_D, student_vocab, dtype=dtype, **HEADS[head]), labels, targets


def bucketed(logprobs, ids):
    """Log-probabilities of the ids and of all others together, by a loop over rows."""
    rows = []
    for row, kept in zip(logprobs, ids, strict=True):
        others = [row[i] for i in range(len(row)) if i not in kept.tolist()]
        rows.append(torch.cat([row[kept], torch.stack(others).logsumexp(0, keepdim=True)]))
    return torch.stack(rows)


def naive(hidden, head, labels, targets, kd, temperature, kd_weight, lm_weight, dense=None):
    """The same loss with all logits at once, by autograd; `dense` are the targets that sparse ones were made from."""
    dense = dense or targets
    logits = head.logits(hidden)
    shared = min(logits.shape[1], dense.head.vocab_size)
    log_q = (logits[:, :shared] / temperature).log_softmax(-1)
    log_p = (dense.head.logits(dense.hidden_ND).detach()[:, :shared] / temperature).log_softmax(-1)
    option = {"jsd": {"beta": kd.beta}, "skew_forward_kl": {"alpha": kd.alpha}, "skew_reverse_kl": {"alpha": kd.alpha}}
    measure = DIVERGENCES[kd.divergence]
    if isinstance(targets, TopKTargets):
        log_q, log_p = bucketed(log_q, targets.ids_NK), bucketed(log_p, targets.ids_NK)
    if isinstance(targets, SampledTargets):
        value = torch.zeros((), dtype=hidden.dtype)
        for n in range(len(hidden)):
            draws = targets.counts_NS[n].sum()
            for index, count in zip(targets.ids_NS[n], targets.counts_NS[n], strict=True):
                value = value - count / draws * log_q[n, index]
            value = value + (log_p[n].exp() * log_p[n]).sum()
    else:
        value = measure(log_q, log_p, **option.get(kd.divergence, {})).sum()
    factor = temperature if kd.divergence == "total_variation" else temperature**2
    kd_sum = kd.coefficient * factor * value
    lm_sum = cross_entropy(logits, labels, reduction="sum")
    return (kd_weight or 0) * kd_sum + (lm_weight or 0) * lm_sum, kd_sum, lm_sum


def gradients(loss, hidden, head):
    inputs = [hidden, head.weight] + ([] if head.bias is None else [head.bias])
    return torch.autograd.grad(loss, inputs)


def assert_same(ours, theirs, tolerance):
    """Equal up to the tolerance, relative to the largest element."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * max(theirs.abs().max().item(), 1e-3))


TAUGHT = [*(("dense", d) for d in DIVERGENCES), *(("top-k", d) for d in DIVERGENCES), ("sampled", "forward_kl")]


def sparse(kind, targets, temperature, shared=None):
    if kind == "top-k":
        return top_k_targets(targets, 5, temperature, shared)
    if kind == "sampled":
        return sampled_targets(targets, 12, temperature, shared)
    return targets


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


def test_top_k_of_everything_is_dense_and_of_less_a_lower_bound():
    hidden, head, labels, dense = make_case()
    options = {"kd": KDLoss(), "temperature": 2.0, "kd_weight": 1.0, "lm_weight": None}
    value = [distillation_loss(hidden, head, labels, dense, **options).loss]
    for k in (V, 20, 5, 1):
        value.append(distillation_loss(hidden, head, labels, top_k_targets(dense, k, 2.0), **options).loss)
    assert_same(value[1], value[0], 1e-10)
    assert value[0] > value[2] > value[3] > value[4] > 0


def test_sampled_targets_are_unbiased():
    hidden, head, labels, dense = make_case()
    options = {"kd": KDLoss(), "temperature": 2.0, "kd_weight": 1.0, "lm_weight": None}
    exact = distillation_loss(hidden, head, labels, dense, **options).loss
    exact_gradient = gradients(exact, hidden, head)[0]
    many = distillation_loss(hidden, head, labels, sampled_targets(dense, 200_000, 2.0), **options).loss
    torch.testing.assert_close(many, exact, rtol=1e-2, atol=0)
    torch.testing.assert_close(gradients(many, hidden, head)[0], exact_gradient, rtol=0, atol=2e-2)


def test_sampled_targets_count_every_draw_once():
    _, _, _, dense = make_case()
    targets = sampled_targets(dense, 50, 2.0)
    assert (targets.counts_NS.sum(-1) == 50).all()
    for ids, counts in zip(targets.ids_NS.tolist(), targets.counts_NS.tolist(), strict=True):
        used = [index for index, count in zip(ids, counts, strict=True) if count]
        assert len(used) == len(set(used))
    log_p = (dense.head.logits(dense.hidden_ND) / 2).log_softmax(-1)
    torch.testing.assert_close(targets.entropy_N, -(log_p.exp() * log_p).sum(-1).detach())


@pytest.mark.parametrize("kind", ["top-k", "sampled"])
def test_sparse_targets_are_refused_at_another_temperature(kind):
    hidden, head, labels, dense = make_case()
    with pytest.raises(UserError, match=r"temperature: 3 .* made at 2"):
        distillation_loss(
            hidden, head, labels, sparse(kind, dense, 2.0), kd=KDLoss(), temperature=3.0, kd_weight=1.0, lm_weight=None
        )


@pytest.mark.parametrize("kind", ["top-k", "sampled"])
def test_sparse_targets_are_refused_for_a_smaller_vocabulary(kind):
    hidden, head, labels, dense = make_case(teacher_vocab=V + 6)
    options = {"kd": KDLoss(), "temperature": 2.0, "kd_weight": 1.0, "lm_weight": None}
    with pytest.raises(UserError, match=f"cover {V + 6} ids but the student has {V}"):
        distillation_loss(hidden, head, labels, sparse(kind, dense, 2.0), **options)
    assert distillation_loss(hidden, head, labels, sparse(kind, dense, 2.0, V), **options).loss > 0


def test_sampled_targets_refuse_other_divergences_by_name():
    hidden, head, labels, dense = make_case()
    targets = sampled_targets(dense, 5, 1.0)
    options = {"temperature": 1.0, "kd_weight": 1.0, "lm_weight": None}
    with pytest.raises(UserError, match="divergence: jsd"):
        distillation_loss(hidden, head, labels, targets, kd=KDLoss("jsd"), **options)
    assert distillation_loss(hidden, head, labels, targets, kd=KDLoss("jsd", beta=0), **options).loss > 0


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


def test_memory_is_that_of_one_chunk(monkeypatch):
    """No tensor as large as [N, V] is made; the largest are the logits of a chunk and the head's gradient."""
    from torch.utils._python_dispatch import TorchDispatchMode

    tokens, vocab, chunk = 64, 500, 8
    hidden = torch.randn(tokens, 4, requires_grad=True)
    head, teacher = make_head(4, vocab, dtype=torch.float32), make_head(5, vocab, dtype=torch.float32)
    targets = DenseTargets(torch.randn(tokens, 5), teacher)

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.untyped_storage().nbytes() // 4)
            return result

    with Largest() as largest:
        loss = distillation_loss(
            hidden, head, torch.zeros(tokens, dtype=torch.long), targets, kd=KDLoss("jsd"), temperature=2.0,
            kd_weight=1.0, lm_weight=1.0, chunk_size=chunk, metrics=True,
        ).loss  # fmt: skip
        loss.backward()
    assert largest.elements <= chunk * vocab


@pytest.mark.parametrize("kind", ["dense", "top-k", "sampled"])
def test_nothing_waits_for_a_value(kind):
    """Fake tensors have no values: anything that read one, as a host sync would, raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        hidden, head, labels, dense = make_case("all", dtype=torch.bfloat16)
        targets = sparse(kind, dense, 2.0)
        got = distillation_loss(
            hidden, head, labels, targets, kd=KDLoss(), temperature=2.0, kd_weight=0.7, lm_weight=0.3, metrics=True
        )
        got.loss.backward()
        assert head.weight.grad.shape == head.weight.shape
        assert got.stats.student_nll.dtype == torch.float64


def test_default_chunk_follows_the_memory_budget(monkeypatch):
    seen = []
    from distill.losses.engine import walk

    original = walk._Side.allocate
    monkeypatch.setattr(walk._Side, "allocate", lambda self, tokens: (seen.append(tokens), original(self, tokens)))
    hidden, head, labels, targets = make_case()
    options = {"kd": KDLoss(), "temperature": 2.0, "kd_weight": 0.7, "lm_weight": 0.3}
    monkeypatch.setattr(walk, "_BLOCK_BYTES_CPU", V * 8)
    monkeypatch.setattr(walk, "_CHUNK_BYTES_CPU", (4 * 2 + walk.BUFFERS) * V * 8)
    distillation_loss(hidden, head, labels, targets, **options)
    assert seen == [4, 4]
    monkeypatch.setattr(walk, "_CHUNK_BYTES_CPU", 1)
    distillation_loss(hidden, head, labels, targets, **options)
    assert seen[2:] == [1, 1]


def test_nothing_wanted_costs_nothing():
    """Not even the head is read, which a run on hidden states alone may have sharded."""
    hidden = torch.randn(N, 4, requires_grad=True)
    nothing = distillation_loss(hidden, None, torch.zeros(N, dtype=torch.long), None)
    assert (nothing.loss.item(), nothing.kd_sum, nothing.lm_sum, nothing.stats) == (0.0, None, None, None)


@pytest.mark.parametrize("vocab", [32_000, 151_936, 262_144])
@pytest.mark.parametrize(
    ("device", "threads", "budget", "share"),
    [("cpu", 1, 256 << 20, 0.95), ("cpu", 64, 256 << 20, 0.7), ("meta", 1, 2 << 30, 0.75)],
)
def test_a_budget_goes_to_the_chunk_on_any_device(device, threads, budget, share, vocab, monkeypatch):
    """Buffers of the blocks take a few per cent on a CPU of few threads, and about a quarter elsewhere."""
    from distill.losses.engine import walk

    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    chunk, block = walk.sizes([vocab, vocab], torch.empty(100_000, 0, device=device), torch.float32, None)
    logits, buffers = 2 * chunk * vocab * 4, walk.BUFFERS * block * vocab * 4
    assert share * budget <= logits <= logits + buffers <= budget
    assert device != "cpu" or block >= min(threads, 8)  # each thread has a row, or at least eight of them


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
