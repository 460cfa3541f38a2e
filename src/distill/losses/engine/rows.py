"""The element-wise part of the loss engine: a few rows of logits in, values per row and gradients out.

Everything works in place, in the logits themselves and in a handful of buffers that are small enough to stay in a CPU's
cache, so each function says which buffers it fills and which of its arguments it overwrites. Gradients are with respect
to the student's finished logits (head's bias, scale and soft-cap applied) divided by T.

Shapes: R rows, V vocabulary of one model, S shared vocabulary, K kept or drawn ids.
"""

import torch
from torch import Tensor

from distill.losses.engine.divergence import LOG_FLOOR, KDLoss, divergence_rows_

BUFFERS = 7  # 0 to 4 for the functions here and the soft-cap, 5 and 6 for logits that must be widened first


class Buffers:
    """Room for some [R, V] tensors, handed out by number as contiguous [rows, width] tensors.

    Args:
        count: how many.
        elements: of the largest tensor asked for.
        like: gives the device.
        dtype: of the buffers.
    """

    def __init__(self, count: int, elements: int, like: Tensor, dtype: torch.dtype) -> None:
        self._flat = [like.new_empty(elements, dtype=dtype) for _ in range(count)]

    def get(self, number: int, rows: int, width: int) -> Tensor:
        """Buffer `number` as (rows, width), with whatever it holds."""
        return self._flat[number][: rows * width].view(rows, width)


def log_softmax_(logits_RV: Tensor, temperature: float, probs_RV: Tensor) -> Tensor:
    """log softmax(logits / T) in place of the logits, its exponential in `probs_RV`; -inf becomes the floor."""
    logits_RV.sub_(logits_RV.amax(-1, keepdim=True)).clamp_min_(LOG_FLOOR)
    if temperature != 1:
        logits_RV.mul_(1 / temperature)
    if probs_RV.device.type == "cpu":  # see `softmax_into`
        sum_R1 = torch.exp(logits_RV, out=probs_RV).sum(-1, keepdim=True)
        probs_RV.div_(sum_R1)
        return logits_RV.sub_(sum_R1.log_())
    softmax_into(logits_RV, probs_RV)
    return logits_RV.add_(probs_RV.amax(-1, keepdim=True).log_())  # the largest logit is 0, so this is -log of the sum


def softmax_into(logits_RV: Tensor, probs_RV: Tensor) -> None:
    """softmax(logits), written to the last argument.

    On a CPU torch's own adds up a row in eight running sums, which is off by 5e-6 at 150,000 ids in fp32; its `sum` is
    not, which makes the gradient 7 to 20 times as exact, and step by step it is faster as well.
    """
    if probs_RV.device.type != "cpu":
        torch.softmax(logits_RV, -1, out=probs_RV)
        return
    torch.sub(logits_RV, logits_RV.amax(-1, keepdim=True), out=probs_RV).exp_()
    probs_RV.div_(probs_RV.sum(-1, keepdim=True))


def dense_rows(
    kd: KDLoss, student_RS: Tensor, teacher_RS: Tensor, temperature: float, buffers: Buffers, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Divergence from a whole teacher distribution, 2 x (R, S) -> (R), (R, S). Fills buffers 0 to 2.

    Args:
        kd: which divergence.
        student_RS: logits over the shared ids; overwritten.
        teacher_RS: logits over the shared ids; overwritten.
        temperature: T.
        buffers: three.
        gradient: whether to compute the second value.

    Returns:
        Value per row in nats, without T^2, and gradient: in place of the student's logits, if that costs no copy.
    """
    q, p, mixture = (buffers.get(i, *student_RS.shape) for i in range(3))
    log_q, log_p = log_softmax_(student_RS, temperature, q), log_softmax_(teacher_RS, temperature, p)
    return divergence_rows_(kd, log_q, log_p, q, p, mixture, gradient)


def top_k_rows(
    kd: KDLoss,
    student_RS: Tensor,
    ids_RK: Tensor,
    logprobs_RK: Tensor,
    log_tail_R: Tensor,
    temperature: float,
    buffers: Buffers,
    gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Divergence on the k kept ids and one bucket for the rest, (R, S) -> (R), (R, S). Fills buffers 0 and 1.

    Formula: with d the gradient with respect to bucket logits, ids kept get d, the others d_tail exp(x) / sum exp(x)
    over the ids not kept. Neither side's tail is taken as 1 minus what was kept: where the kept ids hold nearly
    everything, that difference is rounding.

    Args:
        kd, student_RS, temperature, gradient: as in `dense_rows`.
        ids_RK: ids kept, distinct.
        logprobs_RK: their log-probabilities under the teacher.
        log_tail_R: log of the probability that the teacher gives to all others.
        buffers: two.

    Returns:
        As `dense_rows`.
    """
    rest_RS, tail_RS = (buffers.get(i, *student_RS.shape) for i in range(2))
    torch.mul(student_RS, 1 / temperature, out=rest_RS)
    kept_RK = rest_RS.gather(1, ids_RK)
    # Far below what was kept, and finite where everything was.
    rest_RS.scatter_(1, ids_RK, (kept_RK.amax(-1, keepdim=True) + 2 * LOG_FLOOR).expand_as(kept_RK))
    softmax_into(rest_RS, tail_RS)
    tail_R1 = rest_RS.amax(-1, keepdim=True) - tail_RS.amax(-1, keepdim=True).log_()
    # The k + 1 buckets are few: fp64 makes what is nearly one as right as what is nearly nothing.
    dtype = torch.float32 if student_RS.device.type == "mps" else torch.float64
    log_q = _bucketed(kept_RK.to(dtype), tail_R1.to(dtype))
    log_p = _bucketed(logprobs_RK.to(dtype), log_tail_R[:, None].to(dtype))
    value_R, d = divergence_rows_(kd, log_q, log_p, log_q.exp(), log_p.exp(), torch.empty_like(log_q), gradient)
    value_R = value_R.to(student_RS.dtype)
    if d is None:
        return value_R, None
    d = d.to(student_RS.dtype)
    return value_R, tail_RS.mul_(d[:, -1:]).scatter_(1, ids_RK, d[:, :-1])


def _bucketed(kept_RK: Tensor, tail_R1: Tensor) -> Tensor:
    """Log-probabilities of k ids and their tail from what they are up to a constant, (R, K + 1), floored."""
    return torch.cat([kept_RK, tail_R1], dim=-1).log_softmax(-1).clamp_min_(LOG_FLOOR)


def sampled_rows(
    student_RS: Tensor,
    ids_RK: Tensor,
    counts_RK: Tensor,
    entropy_R: Tensor,
    temperature: float,
    buffers: Buffers,
    gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Unbiased estimate of the forward KL from draws, (R, S) -> (R), (R, S). Fills buffer 0, overwrites the logits.

    Formula: sum_k count_k / N (-log q_k) - H(p)

    Args:
        student_RS, temperature, gradient: as in `dense_rows`.
        ids_RK: ids drawn.
        counts_RK: how often.
        entropy_R: of the teacher's distribution in nats.
        buffers: one.

    Returns:
        As `dense_rows`.
    """
    q = buffers.get(0, *student_RS.shape)
    log_q = log_softmax_(student_RS, temperature, q)
    share_RK = counts_RK.to(q.dtype)
    share_RK = share_RK / share_RK.sum(-1, keepdim=True)
    value_R = -(share_RK * log_q.gather(1, ids_RK)).sum(-1) - entropy_R.to(q.dtype)
    return value_R, q.scatter_add_(1, ids_RK, -share_RK) if gradient else None


def nll_rows(logits_RV: Tensor, labels_R: Tensor, room_RV: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Next-token cross-entropy at T = 1, (R, V) -> (R), (R, V), the gradient written to `room_RV`."""
    labels_R1 = labels_R[:, None]
    softmax_into(logits_RV, room_RV)
    max_R1, log_max_R1 = logits_RV.amax(-1, keepdim=True), room_RV.amax(-1, keepdim=True).log_()
    value_R = (max_R1 - logits_RV.gather(1, labels_R1) - log_max_R1)[:, 0]  # the label's own probability may be 0
    return value_R, room_RV.scatter_add_(1, labels_R1, torch.full_like(max_R1, -1.0)) if gradient else None


def statistics_rows(
    student_RV: Tensor, teacher_RV: Tensor | None, labels_R: Tensor, shared: int, buffers: Buffers
) -> dict[str, Tensor]:
    """Weight-free values of each row at T = 1, all (R). Fills buffers 0 to 4.

    Args:
        student_RV: finished logits of the student.
        teacher_RV: finished logits of the teacher, or None.
        labels_R: next-token ids.
        shared: ids over which KL, agreement, acceptance and entropies are taken; likelihoods are over each model's own
            vocabulary.
        buffers: five.

    Returns:
        Name -> value per row: those of `TokenStats`, and `confidence` and `correct` of the student's first choice.
    """
    log_q, q = _log_softmax(student_RV, buffers, 0)
    confidence_R, choice_R = q.max(-1)
    rows = {
        "student_nll": -log_q.gather(1, labels_R[:, None])[:, 0],
        "confidence": confidence_R,
        "correct": (choice_R == labels_R).to(q.dtype),
    }
    if teacher_RV is not None:
        log_p, p = _log_softmax(teacher_RV, buffers, 2)
        rows["teacher_nll"] = -log_p.gather(1, labels_R[:, None])[:, 0]
        if shared < teacher_RV.shape[1]:
            log_p, p = _log_softmax(teacher_RV[:, :shared], buffers, 2)
    if shared < student_RV.shape[1]:
        log_q, q = _log_softmax(student_RV[:, :shared], buffers, 0)
    if teacher_RV is not None:  # sum min(p, q) = 1 - TV(p, q), while both are whole
        rows["acceptance"] = torch.minimum(p, q, out=buffers.get(4, *q.shape)).sum(-1)
    rows["student_entropy"] = -q.mul_(log_q).sum(-1)
    if teacher_RV is not None:
        rows["agreement"] = (log_q.argmax(-1) == log_p.argmax(-1)).to(q.dtype)
        top_q_R5, top_p_R5 = (x.topk(min(5, shared), sorted=False).indices for x in (log_q, log_p))
        rows["top5_agreement"] = (top_q_R5[:, :, None] == top_p_R5[:, None]).any(1).to(q.dtype).mean(-1)
        rows["teacher_entropy"] = -torch.mul(p, log_p, out=q).sum(-1)
        rows["kl_div"] = p.mul_(log_p.sub_(log_q)).sum(-1)
    return rows


def _log_softmax(logits_RV: Tensor, buffers: Buffers, first: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities and probabilities at T = 1 in the buffers `first` and `first` + 1."""
    logprobs_RV, probs_RV = buffers.get(first, *logits_RV.shape), buffers.get(first + 1, *logits_RV.shape)
    return log_softmax_(logprobs_RV.copy_(logits_RV), 1.0, probs_RV), probs_RV
