"""Metrics against numbers computed by hand and against one pass over everything."""

import math

import pytest
import torch

from distill.losses.engine.divergence import KDLoss
from distill.losses.engine.loss import distillation_loss
from distill.losses.engine.metrics import DistillationMetrics, TokenStats
from distill.models.head import LMHead
from distill.teachers.targets import DenseTargets


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def stats(tokens=4.0, nll=8.0, teacher=True) -> TokenStats:
    calibration = torch.zeros(15, 3, dtype=torch.float64)
    calibration[3] = torch.tensor([3.0, 0.6, 1.0])
    calibration[14] = torch.tensor([1.0, 0.9, 0.0])
    of_teacher = {"kl_div": 2.0, "teacher_nll": 4.0, "teacher_entropy": 6.0, "agreement": 3.0, "top5_agreement": 2.0}
    of_teacher["acceptance"] = 1.0
    return TokenStats(
        tokens=scalar(tokens),
        student_nll=scalar(nll),
        student_entropy=scalar(12.0),
        calibration_B3=calibration,
        **{name: scalar(value) for name, value in of_teacher.items() if teacher},
    )


def test_hand_computed():
    metrics = DistillationMetrics()
    metrics.update(stats(), num_bytes=16)
    assert {name: value.item() for name, value in metrics.compute().items()} == pytest.approx(
        {
            "kl_div_T1": 0.5,
            "student_nll": 2.0,
            "student_perplexity": math.e**2,
            "teacher_nll": 1.0,
            "teacher_perplexity": math.e,
            "top1_agreement": 0.75,
            "top5_agreement": 0.5,
            "acceptance": 0.25,
            "ece": (abs(0.6 - 1.0) + 0.9) / 4,
            "bits_per_byte": 8 / math.log(2) / 16,
            "student_entropy": 3.0,
            "teacher_entropy": 1.5,
        }
    )


def test_batches_weigh_by_their_tokens_not_equally():
    metrics = DistillationMetrics()
    metrics.update(stats(tokens=1.0, nll=10.0), num_bytes=4)
    metrics.update(stats(tokens=9.0, nll=9.0), num_bytes=36)
    assert metrics.compute()["student_nll"].item() == pytest.approx(1.9)


def test_without_teacher_its_metrics_are_absent():
    metrics = DistillationMetrics()
    metrics.update(stats(teacher=False), num_bytes=0)
    assert set(metrics.compute()) == {"student_nll", "student_perplexity", "student_entropy", "ece"}


def test_no_tokens_are_an_empty_result():
    metrics = DistillationMetrics()
    metrics.update(stats(tokens=0.0), num_bytes=0)
    assert metrics.compute() == {}


def test_sums_stay_exact_in_float64_through_casts_of_the_module():
    metrics = torch.nn.ModuleList([DistillationMetrics()]).to(torch.bfloat16)[0]
    metrics.update(stats(tokens=2.0**40), num_bytes=8)
    metrics.update(stats(tokens=1.0), num_bytes=8)
    assert metrics.tokens.item() == metrics.tokens_with_teacher.item() == 2**40 + 1
    metrics.reset()
    assert all(getattr(metrics, name).dtype == torch.float64 for name in metrics._defaults)


def test_split_into_batches_equals_one_pass():
    tokens, vocab = 60, 23
    hidden, teacher_hidden = torch.randn(2, tokens, 5, dtype=torch.float64)
    head, teacher_head = (LMHead(torch.randn(vocab, 5, dtype=torch.float64)) for _ in range(2))
    labels = torch.randint(0, vocab, (tokens,))

    def run(sizes):
        metrics = DistillationMetrics()
        start = 0
        for size in sizes:
            rows = slice(start, start + size)
            found = distillation_loss(
                hidden[rows], head, labels[rows], DenseTargets(teacher_hidden[rows], teacher_head), kd=KDLoss(),
                temperature=2.0, kd_weight=0.0, lm_weight=0.0, metrics=True,
            ).stats  # fmt: skip
            metrics.update(found, num_bytes=size * 3)
            start += size
        return metrics.compute()

    once, split = run([60]), run([1, 40, 0, 19])
    assert len(once) == 12
    for name, value in once.items():
        torch.testing.assert_close(split[name], value, rtol=1e-12, atol=0)
    log_q = (hidden @ head.weight.T).log_softmax(-1)
    torch.testing.assert_close(once["student_nll"], -log_q.gather(1, labels[:, None]).mean())
    fives = [x.topk(5).indices.tolist() for x in (log_q, teacher_hidden @ teacher_head.weight.T)]
    shared = [len(set(ours) & set(theirs)) / 5 for ours, theirs in zip(*fives, strict=True)]
    assert once["top5_agreement"].item() == pytest.approx(sum(shared) / tokens)


def draft_and_target(vocabs: tuple[int, int], tokens: int = 200):
    """Metrics of the engine, and what the two models say of each token over the shared ids, (N, S) each."""
    hidden, teacher_hidden = torch.randn(2, tokens, 5, dtype=torch.float64)
    heads = [LMHead(torch.randn(vocab, 5, dtype=torch.float64)) for vocab in vocabs]
    labels, shared = torch.randint(0, min(vocabs), (tokens,)), min(vocabs)
    targets = DenseTargets(teacher_hidden, heads[1])
    found = distillation_loss(hidden, heads[0], labels, targets, chunk_size=64, metrics=True).stats
    metrics = DistillationMetrics()
    metrics.update(found, num_bytes=0)
    pairs = ((hidden, heads[0]), (teacher_hidden, heads[1]))
    q, p = ((x @ head.weight.T)[:, :shared].softmax(-1) for x, head in pairs)
    return metrics.compute(), q, p


@pytest.mark.parametrize("vocabs", [(23, 23), (23, 19), (19, 23)])
def test_acceptance_is_one_minus_the_mean_total_variation(vocabs):
    metrics, q, p = draft_and_target(vocabs)
    rows = zip(q.tolist(), p.tolist(), strict=True)
    variation = [0.5 * sum(abs(a - b) for a, b in zip(*row, strict=True)) for row in rows]
    assert metrics["acceptance"].item() == pytest.approx(1 - sum(variation) / len(variation), abs=1e-6)
