"""Divergences between masses of classes against autograd over plain sums, in float64."""

import numpy as np
import pytest
import torch

from distill.losses.engine import divergence
from distill.losses.engine.divergence import LOG_FLOOR, KDLoss
from distill.losses.engine.mapped import LEAST, Ahead, Inside, conditioned, mapped_rows, target_rows, vocabulary_map
from distill.losses.engine.rows import Buffers

ROWS, TEACHER, STUDENT = 7, 12, 10
CLASSES = np.array([0, 1, 1, 3, 1, 3, 6, 7, 8, 8])  # {1, 2, 4}, {3, 5}, {8, 9} and singles
FIRSTS = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 1, 3])  # the ninth leads nowhere; the head has one id more
DIVERGENCES = {
    "forward_kl": divergence.forward_kl,
    "reverse_kl": divergence.reverse_kl,
    "jsd": divergence.generalized_jsd,
    "skew_forward_kl": divergence.skew_forward_kl,
    "skew_reverse_kl": divergence.skew_reverse_kl,
    "total_variation": divergence.total_variation,
}
INSIDE = Inside(
    torch.tensor([1, 4]), torch.tensor([0, 0, 0, 1, 1]), torch.tensor([3, 5, 6, 0, 9]), torch.tensor([2, 2, 7, 1, 3])
)
AHEAD = Ahead(
    torch.tensor([0, 0, 4, 5]), torch.tensor([1, 9, 9, 0]),  # one that leads nowhere, and one within a token
    torch.tensor([0, 0, 4]), torch.tensor([1, 4, 2]), torch.tensor([1e-2, 1e-3, 0.2], dtype=torch.float64),
    torch.tensor([0, -1, -1, -1, 1, -1, -1]),
)  # fmt: skip


def tables():
    return vocabulary_map(FIRSTS, CLASSES, TEACHER + 1, STUDENT + 2)


def plain_target(teacher_RV: torch.Tensor, temperature: float, inside: Inside | None, ahead: Ahead | None):
    """The target and the mass of each row, entry by entry."""
    p_RV = (teacher_RV / temperature).softmax(-1)
    target = torch.zeros(ROWS, STUDENT, dtype=torch.float64)
    stays = torch.ones_like(p_RV)
    if ahead is not None:
        stays[ahead.rows_A, ahead.teacher_A] = 0
    mass = torch.zeros(ROWS, dtype=torch.float64)
    for number, student in enumerate(FIRSTS):
        if student < STUDENT:
            target[:, student] += p_RV[:, number] * stays[:, number]
            mass += p_RV[:, number]
    if inside is not None:
        for place, row in enumerate(inside.rows_I.tolist()):
            entries = [e for e in range(len(inside.nth_E)) if inside.nth_E[e] == place]
            shares = p_RV[row, inside.teacher_E[entries]]
            target[row], mass[row] = 0, 1
            left = shares / shares.sum() * stays[row, inside.teacher_E[entries]]
            for share, student in zip(left, inside.student_E[entries], strict=True):
                target[row, student] += share
    if ahead is not None:
        for row, student, change in zip(ahead.rows_H, ahead.student_H, ahead.mass_H, strict=True):
            target[row, student] += change
    return target / target.sum(-1, keepdim=True), mass


def buckets(probs_RS: torch.Tensor, class_R: list[int]) -> torch.Tensor:
    """Masses of classes, the class of a row that stands for itself apart, (R, 2 S)."""
    summed = []
    numbers = {0: 1, 1: 3, 2: 8}  # class number -> its root
    for row, number in zip(probs_RS, class_R, strict=True):
        apart = torch.tensor(numbers.get(number, -1) == CLASSES)
        of = torch.where(apart, torch.arange(STUDENT) + STUDENT, torch.from_numpy(CLASSES))
        summed.append(torch.zeros(2 * STUDENT, dtype=row.dtype).index_add(0, of, row))
    return torch.stack(summed)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("inside", "ahead"), [(None, None), (INSIDE, None), (INSIDE, AHEAD)])
def test_value_and_gradient_are_those_of_plain_sums(name, temperature, inside, ahead):
    student = torch.randn(ROWS, STUDENT, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(ROWS, TEACHER + 1, dtype=torch.float64)
    taught = torch.tensor([True] * 5 + [False, True])
    buffers = Buffers(3, ROWS * (TEACHER + 1), teacher, torch.float64)
    kd = KDLoss(name)
    value, gradient = mapped_rows(
        kd, student.detach().clone(), teacher.clone(), tables(), taught, inside, ahead, temperature, buffers, True
    )
    target, mass = plain_target(teacher, temperature, inside, ahead)
    class_R = [-1] * ROWS if ahead is None else ahead.class_R.tolist()
    log_q = buckets((student / temperature).softmax(-1), class_R).log().clamp_min(LOG_FLOOR)
    log_p = buckets(target, class_R).clamp_min(LEAST).log()
    option = {"jsd": {"beta": kd.beta}, "skew_forward_kl": {"alpha": kd.alpha}, "skew_reverse_kl": {"alpha": kd.alpha}}
    expected = DIVERGENCES[name](log_q, log_p, **option.get(name, {})) * mass * taught
    torch.testing.assert_close(value, expected.detach())
    theirs = torch.autograd.grad(expected.sum(), student)[0] * temperature  # with respect to logits / T
    torch.testing.assert_close(gradient, theirs)
    assert gradient[5].eq(0).all()


def test_what_leads_somewhere_and_what_does_not_are_all_of_the_mass():
    teacher = torch.randn(ROWS, TEACHER + 1, dtype=torch.float64)
    buffers = Buffers(3, ROWS * (TEACHER + 1), teacher, torch.float64)
    target, mapped = target_rows(teacher.clone(), tables(), INSIDE, None, 1.0, buffers)
    residual = teacher.softmax(-1)[:, [9, 12]].sum(-1).index_fill(0, INSIDE.rows_I, 0)
    torch.testing.assert_close(mapped + residual, torch.ones(ROWS, dtype=torch.float64))
    torch.testing.assert_close(target.sum(-1), torch.ones(ROWS, dtype=torch.float64))


def test_it_is_nothing_exactly_where_the_masses_of_classes_agree():
    teacher = torch.randn(ROWS, TEACHER + 1, dtype=torch.float64)
    buffers = Buffers(3, ROWS * (TEACHER + 1), teacher, torch.float64)
    taught = torch.ones(ROWS, dtype=torch.bool)
    target, _ = plain_target(teacher, 1.0, None, None)
    other = target.clone()
    other[:, 1], other[:, 2] = target[:, 1] / 2, target[:, 2] + target[:, 1] / 2  # within a class
    wrong = target.clone()
    wrong[:, 0], wrong[:, 1] = target[:, 0] / 2, target[:, 1] + target[:, 0] / 2  # between two
    for logits, zero in ((other.log(), True), (wrong.log(), False)):
        value, _ = mapped_rows(KDLoss(), logits, teacher.clone(), tables(), taught, None, None, 1.0, buffers, False)
        assert (value.abs() < 1e-12).all() == zero
        assert (value > 1e-6).all() != zero


def test_tables_leave_padding_and_foreign_ids_out():
    made = tables()
    assert made.student_vocab == STUDENT
    assert made.nowhere_U.tolist() == [9, 12]
    assert made.members_M.tolist() == [1, 2, 4, 3, 5, 8, 9]
    assert made.class_M.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert made.roots_C.tolist() == [1, 3, 8]
    assert made.class_S.tolist() == [-1, 0, 0, 1, 0, 1, -1, -1, 2, 2]
    smaller = vocabulary_map(FIRSTS, CLASSES, TEACHER - 4, STUDENT - 2)
    assert (smaller.student_vocab, smaller.firsts_V.tolist()) == (8, FIRSTS[:8].tolist())
    assert smaller.nowhere_U.tolist() == []


def test_a_sure_student_is_right_in_fp32():
    logits = torch.randn(4, STUDENT)
    logits[:, 0] += 130.0  # the others have no probability in fp32
    teacher = torch.randn(4, TEACHER + 1)
    taught = torch.ones(4, dtype=torch.bool)
    values = []
    for dtype in (torch.float32, torch.float64):
        buffers = Buffers(3, 4 * (TEACHER + 1), teacher.to(dtype), dtype)
        values.append(
            mapped_rows(
                KDLoss(),
                logits.to(dtype, copy=True),
                teacher.to(dtype, copy=True),
                tables(),
                taught,
                None,
                None,
                1.0,
                buffers,
                True,
            )
        )
    (value, gradient), (wide_value, wide_gradient) = values
    torch.testing.assert_close(value.double(), wide_value, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), wide_gradient, rtol=1e-4, atol=1e-6)


def test_entries_are_conditioned_without_underflow():
    logits = torch.tensor([-900.0, -901.0, 3.0, -500.0])
    p = conditioned(logits, torch.tensor([0, 0, 1, 2]), 3)
    torch.testing.assert_close(p, torch.tensor([0.731058578, 0.268941421, 1.0, 1.0]))
