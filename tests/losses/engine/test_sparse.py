"""Top-k and sampled targets against the dense ones that they were made from, and what refuses them."""

import pytest
import torch

from distill.errors import UserError
from distill.losses.engine.divergence import KDLoss
from distill.losses.engine.loss import distillation_loss
from distill.teachers.targets import sampled_targets, top_k_targets
from helpers.naive_loss import V, assert_same, gradients, make_case, sparse


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
