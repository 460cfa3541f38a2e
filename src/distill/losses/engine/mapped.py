"""Rows of a teacher with another tokenizer: its distribution on the student's ids, compared class by class.

The teacher's probabilities are added up where its ids lead to in the student's vocabulary. Where the student's text has
a longer token than the teacher would write, a row of the teacher cannot say how its mass parts between that token and
shorter ones; such ids make up a class, and divergences are between the masses of classes. Within the class of a token
that was looked ahead to, the row can say it, and its ids stand for themselves. What looking ahead moves is taken out of
the teacher's row, never subtracted from a sum: beside a token that is nearly sure, that difference would be rounding.

Shapes: R rows, V teacher's vocabulary, S student's ids, M ids in classes of more than one, C such classes, I rows that
stand inside a token of the teacher, E pairs of ids, U ids of the teacher that lead nowhere, A of its ids in a row
that are looked at, H shares of their mass.
"""

from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from distill.batch import Pairs
from distill.losses.engine.divergence import LOG_FLOOR, KDLoss, divergence_rows_
from distill.losses.engine.rows import Buffers, log_softmax_, softmax_into

LEAST = 1e-30  # probability that counts as none: what nothing leads to is improbable, not impossible


@dataclass(frozen=True, eq=False)
class VocabularyMap:
    """Tables of a pair of vocabularies on a device.

    Args:
        student_vocab: S.
        firsts_V: the student's id that each of the teacher's leads to, int64; 0 where `nowhere_U` has it.
        nowhere_U: ids of the teacher that lead nowhere.
        members_M: the student's ids in classes of more than one, those of a class behind each other.
        class_M: number of each one's class.
        roots_C: the id under which a class is counted, one of its members.
        class_S: number of each id's class; -1 for an id that is one of its own.
        root_S: the id under which each one's class is counted; itself where it is one of its own.
        roots_V: the same of `firsts_V`.
    """

    student_vocab: int
    firsts_V: Tensor
    nowhere_U: Tensor
    members_M: Tensor
    class_M: Tensor
    roots_C: Tensor
    class_S: Tensor
    root_S: Tensor
    roots_V: Tensor

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        moved: dict[str, Any] = {name: x.to(device) for name, x in self.__dict__.items() if isinstance(x, Tensor)}
        return replace(self, **moved)


def vocabulary_map(firsts: np.ndarray, classes: np.ndarray, teacher_vocab: int, student_vocab: int) -> VocabularyMap:
    """Tables for two heads, whose vocabularies may be padded.

    Args:
        firsts: the student's id for each of the teacher's; what is none of the student's leads nowhere.
        classes: of each of the student's ids, named by a member.
        teacher_vocab: V of its head.
        student_vocab: of the student's head.
    """
    shared = min(student_vocab, len(classes))
    led_V = np.full(teacher_vocab, -1, dtype=np.int64)
    led_V[: len(firsts)] = firsts[:teacher_vocab]
    nowhere_V = (led_V < 0) | (led_V >= shared)
    _, of_S, sizes = np.unique(classes[:shared], return_inverse=True, return_counts=True)
    members_M = np.flatnonzero(sizes[of_S] > 1)
    members_M = members_M[np.argsort(of_S[members_M], kind="stable")]
    _, firsts_of, class_M = np.unique(of_S[members_M], return_index=True, return_inverse=True)
    class_S = np.full(shared, -1, dtype=np.int64)
    class_S[members_M] = class_M
    roots_C, led_V = members_M[firsts_of], np.where(nowhere_V, 0, led_V)
    root_S = np.arange(shared)
    root_S[members_M] = roots_C[class_M]
    parts = led_V, np.flatnonzero(nowhere_V), members_M, class_M, roots_C, class_S, root_S, root_S[led_V]
    return VocabularyMap(shared, *map(torch.from_numpy, parts))


@dataclass(frozen=True, eq=False)
class Inside:
    """Rows that stand inside a token of the teacher, and what can still come of it.

    Args:
        rows_I: which rows.
        nth_E: which of them a pair of ids belongs to.
        teacher_E: the teacher's id.
        student_E: the student's id that what is left of it leads to.
    """

    rows_I: Tensor
    nth_E: Tensor
    teacher_E: Tensor
    student_E: Tensor


def inside_rows(pairs: Pairs, rows: slice) -> Inside | None:
    """Those of some of the N that stand inside a token of the teacher; the host waits for nothing."""
    on_host, device = pairs.spelling, pairs.group_N.device
    first, last = np.searchsorted(on_host.inside_I, (rows.start, rows.stop))
    if first == last:
        return None
    total = int(on_host.sizes_I[first:last].sum())
    places_I = torch.from_numpy(on_host.inside_I[first:last]).to(device, non_blocking=True)
    group_I = pairs.group_N[places_I]
    starts_I = pairs.starts_G[group_I - 1]
    sizes_I = pairs.starts_G[group_I] - starts_I
    nth_E = torch.repeat_interleave(torch.arange(len(group_I), device=device), sizes_I, output_size=total)
    entries_E = torch.arange(total, device=device) + (starts_I - sizes_I.cumsum(0) + sizes_I)[nth_E]
    return Inside(places_I - rows.start, nth_E, pairs.teacher_ids_E[entries_E], pairs.student_ids_E[entries_E])


@dataclass(frozen=True, eq=False)
class Ahead:
    """What looking ahead changes in some rows.

    Args:
        rows_A: which row a token belongs to that does not stay where the tables lead.
        teacher_A: its id, once a row.
        rows_H: which row a share of their mass belongs to.
        student_H: the student's id that it goes to.
        mass_H: how much it is.
        class_R: class within which ids stand for themselves; -1 for none.
    """

    rows_A: Tensor
    teacher_A: Tensor
    rows_H: Tensor
    student_H: Tensor
    mass_H: Tensor
    class_R: Tensor


def mapped_rows(
    kd: KDLoss,
    student_RS: Tensor,
    teacher_RV: Tensor,
    tables: VocabularyMap,
    taught_R: Tensor,
    inside: Inside | None,
    ahead: Ahead | None,
    temperature: float,
    buffers: Buffers,
    gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Divergence between the masses of classes, (R, S) -> (R), (R, S). Fills buffers 0 to 2.

    A row counts for as much as the part of the teacher's mass that leads somewhere; one without a target is 0.

    Args:
        kd, temperature, gradient: as in `dense_rows`.
        student_RS: finished logits; overwritten.
        teacher_RV: finished logits over the teacher's own vocabulary; overwritten.
        tables: of the pair.
        taught_R: bool, whether there is a target.
        inside: of these rows.
        ahead: of these rows.
        buffers: three.

    Returns:
        As `dense_rows`.
    """
    p_RS, mapped_R = target_rows(teacher_RV, tables, inside, ahead, temperature, buffers, pooled=ahead is None)
    q_RS = buffers.get(2, *student_RS.shape)
    log_q_RS = log_softmax_(student_RS, temperature, q_RS)
    shares_RM = None
    own_R = None if ahead is None else ahead.class_R
    if len(tables.members_M):
        shares_RM = _pool(log_q_RS, q_RS, p_RS, tables, own_R)
    log_p_RS = torch.log(p_RS.clamp_min_(LEAST), out=buffers.get(0, *p_RS.shape))
    mixes = kd.effective in ("jsd", "skew_forward_kl", "skew_reverse_kl")
    mixture = torch.empty_like(p_RS) if mixes else None
    value_R, d_RS = divergence_rows_(kd, log_q_RS, log_p_RS, q_RS, p_RS, mixture, gradient)
    weight_R = mapped_R.mul_(taught_R)
    if d_RS is not None:
        if shares_RM is not None:
            _part(d_RS, shares_RM, tables, own_R)
        d_RS.mul_(weight_R[:, None])
    return value_R.mul_(weight_R), d_RS


def target_rows(
    teacher_RV: Tensor, tables: VocabularyMap, inside: Inside | None, ahead: Ahead | None, temperature: float,
    buffers: Buffers, pooled: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The teacher's distribution on the student's ids in buffer 1, (R, S), and the mass that leads there, (R).

    Args as in `mapped_rows`; buffer 0 is filled too. `pooled`: the mass of each class on its root.
    """
    rows, vocab = teacher_RV.shape
    p_RV = buffers.get(0, rows, vocab)
    if temperature != 1:
        teacher_RV.mul_(1 / temperature)
    softmax_into(teacher_RV, p_RV)
    p_RV.index_fill_(1, tables.nowhere_U, 0)
    taken = None if ahead is None else (ahead.rows_A, ahead.teacher_A)
    if taken is not None:
        taken_A = p_RV[taken]
        p_RV.index_put_(taken, p_RV.new_zeros(()))
    p_RS = buffers.get(1, rows, tables.student_vocab).zero_()
    p_RS.index_add_(1, tables.roots_V if pooled else tables.firsts_V, p_RV)
    mapped_R = p_RS.sum(-1)
    if taken is not None:
        mapped_R.index_add_(0, taken[0], taken_A)
    if inside is not None:
        rows_E = inside.rows_I[inside.nth_E]
        p_E = conditioned(teacher_RV[rows_E, inside.teacher_E].to(p_RS.dtype), inside.nth_E, len(inside.rows_I))
        if taken is not None:  # the rows of the teacher are done with, and have room
            where = rows_E, inside.teacher_E
            p_E = p_RV.index_put_(where, p_E).index_put_(taken, p_RV.new_zeros(()))[where]
        student_E = tables.root_S[inside.student_E] if pooled else inside.student_E
        p_RS.index_fill_(0, inside.rows_I, 0).index_put_((rows_E, student_E), p_E, accumulate=True)
        mapped_R.index_fill_(0, inside.rows_I, 1)
    whole_R = mapped_R
    if ahead is not None:
        p_RS.index_put_((ahead.rows_H, ahead.student_H), ahead.mass_H.to(p_RS.dtype), accumulate=True)
        whole_R = p_RS.sum(-1)
    return p_RS.div_(whole_R[:, None].clamp_min(LEAST)), mapped_R


def conditioned(logits_E: Tensor, nth_E: Tensor, count: int) -> Tensor:
    """Softmax over the entries of the same number, (E) -> (E)."""
    largest_I = logits_E.new_full((count,), -torch.inf).scatter_reduce_(0, nth_E, logits_E, "amax")
    p_E = (logits_E - largest_I[nth_E]).exp_()
    return p_E.div_(p_E.new_zeros(count).index_add_(0, nth_E, p_E)[nth_E])


def _pool(log_q_RS: Tensor, q_RS: Tensor, p_RS: Tensor, tables: VocabularyMap, own_R: Tensor | None) -> Tensor:
    """Puts the mass of each class on its root, in place, and returns the student's shares within classes, (R, M).

    Without a class that is not pooled, the teacher's is there already.
    """
    rows, classes, members_M = len(q_RS), len(tables.roots_C), tables.members_M
    q_RM = q_RS.index_select(1, members_M)
    q_RC = q_RM.new_zeros(rows, classes).index_add_(1, tables.class_M, q_RM)
    log_RC = q_RC.log()
    if q_RC.device.type != "cpu" or bool(q_RC.amin() < LEAST):  # looking costs nothing there: nobody is waited for
        shares_RM, log_RC = _sure_shares(log_q_RS.index_select(1, members_M), tables, classes)
    else:
        shares_RM = q_RM.div_(q_RC.index_select(1, tables.class_M))
    pooled = [(log_q_RS, log_RC, LOG_FLOOR), (q_RS, q_RC, 0.0)]
    if own_R is None:
        for x_RS, _, nothing in pooled:
            x_RS.index_fill_(1, members_M, nothing)
    else:  # the class of each row that is not pooled
        p_RM = p_RS.index_select(1, members_M)
        pooled.append((p_RS, p_RM.new_zeros(rows, classes).index_add_(1, tables.class_M, p_RM), 0.0))
        apart_RM = tables.class_M == own_R[:, None]
        apart_RC = torch.arange(classes, device=own_R.device) == own_R[:, None]
        for x_RS, x_RC, nothing in pooled:
            x_RC.copy_(torch.where(apart_RC, x_RS.index_select(1, tables.roots_C), x_RC))
            x_RS.index_copy_(1, members_M, x_RS.index_select(1, members_M).masked_fill_(~apart_RM, nothing))
    for x_RS, x_RC, _ in pooled:
        x_RS.index_copy_(1, tables.roots_C, x_RC)
    return shares_RM


def _sure_shares(log_RM: Tensor, tables: VocabularyMap, classes: int) -> tuple[Tensor, Tensor]:
    """Shares within classes and logarithms of their masses, however small these are, (R, M) -> (R, M), (R, C)."""
    largest_RC = log_RM.new_full((len(log_RM), classes), -torch.inf)
    largest_RC.scatter_reduce_(1, tables.class_M.expand(len(log_RM), -1), log_RM, "amax")
    shares_RM = log_RM.sub_(largest_RC.index_select(1, tables.class_M)).exp_()
    sums_RC = torch.zeros_like(largest_RC).index_add_(1, tables.class_M, shares_RM)
    return shares_RM.div_(sums_RC.index_select(1, tables.class_M)), largest_RC.add_(sums_RC.log_())


def _part(d_RS: Tensor, shares_RM: Tensor, tables: VocabularyMap, own_R: Tensor | None) -> None:
    """Parts the gradient of a class among its members by their shares, in place."""
    of_class_RM = d_RS.index_select(1, tables.roots_C).index_select(1, tables.class_M).mul_(shares_RM)
    if own_R is not None:
        apart_RM = tables.class_M == own_R[:, None]
        of_class_RM = torch.where(apart_RM, d_RS.index_select(1, tables.members_M), of_class_RM)
    d_RS.index_copy_(1, tables.members_M, of_class_RM)
