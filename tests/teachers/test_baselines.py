"""The baselines against what their papers say, in float64."""

import numpy as np
import pytest
import torch

from distill.errors import UserError
from distill.losses.engine.divergence import KDLoss
from distill.losses.engine.loss import distillation_loss
from distill.losses.likelihood_matching import likelihood_matching
from distill.models.head import LMHead
from distill.teachers.baselines import RankedTargets, aligned_only, exact_matches
from helpers.toy_world import CROSSING, LONG, SHORT, toy


def test_aligned_places_alone_keep_their_targets():
    found = toy(LONG, SHORT)
    kept = aligned_only(found.pairs)
    before = found.pairs.group_N
    assert (before > 0).any()
    assert (kept.group_N == torch.where(before > 0, -1, before)).all()
    assert (kept.spelling.group_N == kept.group_N.numpy()).all()
    assert len(kept.spelling.inside_I) == 0


def test_exact_matches_keep_bytes_that_both_have_and_throw_the_others_together():
    pair = toy(*CROSSING).pair
    firsts, classes = exact_matches(pair)
    both = pair.teacher.ids.keys() & pair.student.ids.keys()
    assert both == {b"a", b"b", b"c"}
    for token in pair.teacher.ids:
        led = firsts[pair.teacher.ids[token]]
        assert (pair.student.tokens[led] == token) == (token in both)
    others = [number for token, number in pair.student.ids.items() if token not in both]
    assert len(set(classes[others])) == 1
    assert {firsts[pair.teacher.ids[token]] for token in pair.teacher.ids.keys() - both} <= set(others)
    assert firsts[pair.teacher.eos] == pair.student.eos
    alike = toy(LONG, LONG).pair
    firsts, classes = exact_matches(alike)
    assert (firsts == np.arange(alike.teacher.size)).all()
    assert (classes == np.arange(alike.student.size)).all()


@pytest.mark.parametrize(("teacher_vocab", "student_vocab"), [(9, 6), (5, 8)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_ranked_targets_are_the_distance_of_sorted_distributions(teacher_vocab, student_vocab, temperature):
    hidden, weight = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (11, student_vocab))
    head = LMHead(torch.randn(teacher_vocab, 3, dtype=torch.float64))
    states, weights = torch.randn(11, 3, dtype=torch.float64), torch.rand(11, dtype=torch.float64)
    weights[3] = 0
    targets = RankedTargets(states, head, weights)
    options = {"kd": KDLoss(), "temperature": temperature, "kd_weight": 0.5, "chunk_size": 4}
    ours = distillation_loss(hidden, LMHead(weight), torch.zeros(11, dtype=torch.long), targets, **options)
    p = (head.logits(states) / temperature).softmax(-1).sort(-1, descending=True).values
    q = (hidden @ weight.T / temperature).softmax(-1).sort(-1, descending=True).values
    width = max(teacher_vocab, student_vocab)
    p, q = (torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in (p, q))
    theirs = 0.5 * temperature**2 * ((p - q).abs().sum(-1) * weights).sum()
    torch.testing.assert_close(ours.loss, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours.loss, [hidden, weight]), torch.autograd.grad(theirs, [hidden, weight])
    )


def test_ranked_targets_have_no_divergence_to_choose():
    targets = RankedTargets(torch.zeros(1, 2), LMHead(torch.zeros(3, 2)), torch.ones(1))
    with pytest.raises(UserError, match=r"^model.kd_loss.divergence: jsd, .*; leave the divergence out$"):
        targets.refuse_unsuitable(KDLoss("jsd"), 1.0, 3)


def test_likelihoods_of_stretches_match_whatever_tokens_spell_them():
    student = torch.tensor([-1.0, -0.5, -2.0, -0.25], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([-1.5, -1.0, -1.25], dtype=torch.float64)
    found = likelihood_matching(student, teacher, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1]), temperature=2.0)
    assert found.abs().max() < 1e-12
    higher = likelihood_matching(student, 2 * teacher, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1]), 2.0)
    p, q = torch.exp(torch.tensor([-1.5, -2.25]).double()), torch.exp(torch.tensor([-0.75, -1.125]).double())
    expected = 2 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())
    torch.testing.assert_close(higher.detach(), expected)
    torch.autograd.grad(higher.sum(), student)
