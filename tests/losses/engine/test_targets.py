"""Kinds of targets: one of a test's own, and top-k targets of a teacher that is sure, against float64."""

from dataclasses import dataclass

import pytest
import torch

from distill.losses.engine import divergence
from distill.losses.engine.divergence import LOG_FLOOR, KDLoss
from distill.losses.engine.loss import distillation_loss
from distill.losses.engine.rows import Buffers, dense_rows
from distill.models.head import LMHead
from distill.teachers.targets import DenseTargets, TopKTargets, top_k_targets

DIVERGENCES = {
    "forward_kl": divergence.forward_kl,
    "reverse_kl": divergence.reverse_kl,
    "jsd": divergence.generalized_jsd,
    "skew_forward_kl": divergence.skew_forward_kl,
    "skew_reverse_kl": divergence.skew_reverse_kl,
    "total_variation": divergence.total_variation,
}


@dataclass(frozen=True, eq=False)
class MappedTargets:
    """A teacher of another vocabulary, each of whose ids stands for one of the student's."""

    hidden_ND: torch.Tensor
    head: LMHead
    student_id_V: torch.Tensor
    whole = False

    @property
    def head_and_hidden(self):
        return self.head, self.hidden_ND

    def shared_vocab(self, student_vocab):
        return student_vocab

    def refuse_unsuitable(self, kd, temperature, student_vocab):
        pass

    def divergence(self, kd, student_RS, teacher_RV, rows, temperature, buffers: Buffers, gradient):
        probs_RV = (teacher_RV / temperature).softmax(-1)
        mapped_RS = torch.zeros_like(student_RS).index_add_(1, self.student_id_V, probs_RV)
        return dense_rows(kd, student_RS, temperature * mapped_RS.log(), temperature, buffers, gradient)


@pytest.mark.parametrize("kd", [KDLoss(), KDLoss("jsd")])
def test_a_new_kind_of_targets_needs_nothing_but_its_class(kd):
    hidden, weight = (torch.randn(n, 6, dtype=torch.float64, requires_grad=True) for n in (9, 20))
    targets = MappedTargets(
        torch.randn(9, 4, dtype=torch.float64),
        LMHead(torch.randn(31, 4, dtype=torch.float64)),
        torch.cat([torch.arange(20), torch.arange(11)]),
    )
    options = {"kd": kd, "temperature": 2.0, "kd_weight": 0.7, "lm_weight": None, "chunk_size": 4}
    labels = torch.zeros(9, dtype=torch.long)
    ours = distillation_loss(hidden, LMHead(weight), labels, targets, **options, metrics=True)
    p = (targets.head.logits(targets.hidden_ND) / 2).softmax(-1) @ torch.eye(20, dtype=torch.float64)[
        targets.student_id_V
    ]
    theirs = 0.7 * 4 * DIVERGENCES[kd.divergence]((hidden @ weight.T / 2).log_softmax(-1), p.log()).sum()
    torch.testing.assert_close(ours.loss, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours.loss, [hidden, weight]), torch.autograd.grad(theirs, [hidden, weight])
    )
    assert ours.stats.teacher_nll is None  # its logits are not over the student's ids


def buckets(logits_NV, ids_NK, temperature):
    """log-probabilities of the kept ids and of all others together, in float64."""
    logprobs = (logits_NV / temperature).log_softmax(-1)
    rest = logprobs.scatter(1, ids_NK, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logprobs.gather(1, ids_NK), rest], dim=-1).clamp_min(LOG_FLOOR)


def peaked(gap, rows=6, vocab=900):
    """Logits of `rows` tokens, the first id of each `gap` nats above what the others reach."""
    logits = torch.randn(rows, vocab, dtype=torch.float64)
    logits[:, 0] = logits.amax(-1) + gap
    return logits


def identity_head(vocab):
    return LMHead(torch.eye(vocab))


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(("teacher_gap", "student_gap"), [(27, 0), (40, 3), (0, 33), (2, 120), (35, 31)])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("k", [5, 64])
def test_the_tail_of_a_sure_model_is_right_in_fp32(name, teacher_gap, student_gap, temperature, k):
    """Logits are the hidden states themselves, the same numbers in both precisions."""
    student, teacher = peaked(student_gap).float(), peaked(teacher_gap).float()
    student.requires_grad_()
    vocab = student.shape[1]
    targets = top_k_targets(DenseTargets(teacher, identity_head(vocab)), k, temperature)
    kd = KDLoss(name)
    got = distillation_loss(
        student, identity_head(vocab), torch.zeros(6, dtype=torch.long), targets, kd=kd, temperature=temperature,
        kd_weight=1.0, lm_weight=None,
    )  # fmt: skip
    wide = student.detach().double().requires_grad_()
    option = {"jsd": {"beta": kd.beta}, "skew_forward_kl": {"alpha": kd.alpha}, "skew_reverse_kl": {"alpha": kd.alpha}}
    log_q, log_p = (buckets(x, targets.ids_NK, temperature) for x in (wide, teacher.double()))
    expected = kd.temperature_factor(temperature) * DIVERGENCES[name](log_q, log_p, **option.get(name, {})).sum()
    assert got.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    ours, theirs = torch.autograd.grad(got.loss, student)[0], torch.autograd.grad(expected, wide)[0]
    assert float((ours - theirs).norm()) <= 1e-5 * float(theirs.norm()) + 1e-12  # a student that is sure learns less


def test_the_tail_is_what_the_kept_ids_leave():
    logits = torch.randn(8, 50, dtype=torch.float64)
    targets = top_k_targets(DenseTargets(logits, LMHead(torch.eye(50, dtype=torch.float64))), 7, 2.0)
    torch.testing.assert_close(targets.log_tail_N.exp(), 1 - targets.logprobs_NK.exp().sum(-1))
    whole = top_k_targets(DenseTargets(logits, LMHead(torch.eye(50, dtype=torch.float64))), 50, 2.0)
    assert torch.isneginf(whole.log_tail_N).all()


def test_rows_of_top_k_targets_keep_their_tails():
    targets = TopKTargets(
        ids_NK=torch.arange(12).view(6, 2), logprobs_NK=torch.randn(6, 2), log_tail_N=torch.randn(6), temperature=1.0,
        vocab_size=12,
    )  # fmt: skip
    part = targets.rows(slice(2, 4))
    assert torch.equal(part.log_tail_N, targets.log_tail_N[2:4])
    assert torch.equal(part.ids_NK, targets.ids_NK[2:4])
