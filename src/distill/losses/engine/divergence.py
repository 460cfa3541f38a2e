"""Divergences between two next-token distributions, twice: as plain functions and as in-place rows with gradients.

The plain functions are the definition, differentiable and without side effects. The engine needs value and gradient of
a few rows at a time without new buffers, so `divergence_rows_` restates each by hand; the tests hold both forms
together to 1e-10.

Shapes: ... any leading shape, V classes (ids, or the k + 1 buckets of a sparse target), R rows.
p is the teacher, q the student. A log-probability of -inf counts as -1e5, so that p = 0 adds 0 and never NaN.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distill.errors import UserError

LOG_FLOOR = -1e5  # nats; below what any finite logit reaches, above what fp32 products with 0 turn into NaN

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation"]


@dataclass(frozen=True)
class KDLoss:
    """Which divergence the student is trained on.

    Args:
        divergence: `forward_kl` KL(p || q), `reverse_kl` KL(q || p), `jsd`, `skew_forward_kl`, `skew_reverse_kl` or
            `total_variation`.
        beta: of `jsd`: the teacher's share in the mixture; 0 is forward KL and 1 reverse KL by definition.
        alpha: of the skew divergences: the share of the first argument in the mixture.
        coefficient: constant factor, part of the raw value.
        top_k: learn from the teacher's so many most probable ids and one bucket for the rest; null = from all ids.
        samples: learn from so many ids drawn from the teacher, anew each step; null = from all ids.

    With a live teacher top_k and samples cost more than they save: they show what targets on disk would lose.

    Raises:
        UserError: a value outside its range, or values that do not go together.
    """

    divergence: Divergence = "forward_kl"
    beta: float = 0.5
    alpha: float = 0.1
    coefficient: float = 1.0
    top_k: int | None = None
    samples: int | None = None

    def __post_init__(self) -> None:
        names = Divergence.__args__  # type: ignore[attr-defined]
        if self.divergence not in names:
            raise UserError(f"model.kd_loss.divergence: {self.divergence!r} is none of {', '.join(names)}")
        if not 0 <= self.beta <= 1:
            raise UserError(f"model.kd_loss.beta: {self.beta} is outside [0, 1]; 0 is forward KL, 1 is reverse KL")
        if not 0 < self.alpha < 1:
            raise UserError(f"model.kd_loss.alpha: {self.alpha} is outside (0, 1); DistiLLM uses 0.1")
        if not 0 < self.coefficient < float("inf"):
            raise UserError(
                f"model.kd_loss.coefficient: {self.coefficient} must be a number above 0; the curriculum switches KD "
                "off"
            )
        for key in ("top_k", "samples"):
            count = getattr(self, key)
            if count is not None and count < 1:
                raise UserError(f"model.kd_loss.{key}: {count} must be at least 1 (null = learn from all ids)")
        if self.top_k is not None and self.samples is not None:
            raise UserError(f"model.kd_loss.samples: {self.samples} with top_k {self.top_k}; give one of the two")
        if self.samples is not None and self.effective != "forward_kl":
            raise UserError(
                f"model.kd_loss.samples: {self.divergence} is biased on drawn ids; use forward_kl, or top_k"
            )

    @property
    def effective(self) -> Divergence:
        """The divergence after JSD's end points became the KLs that they are defined as."""
        if self.divergence == "jsd" and self.beta in (0, 1):
            return "forward_kl" if self.beta == 0 else "reverse_kl"
        return self.divergence

    def temperature_factor(self, temperature: float) -> float:
        """T^2, and T for total variation, whose gradient falls as 1/T."""
        return temperature if self.divergence == "total_variation" else temperature**2


def forward_kl(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """Mean-seeking KL over the last dimension, (..., V) -> (...).

    Formula: KL(p || q) = sum_v p (log p - log q)

    Args:
        student_logprobs: log q, (..., V).
        teacher_logprobs: log p, (..., V).

    Returns:
        Divergence per token in nats, (...).

    Example:
        >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
        >>> round(forward_kl(q.log(), p.log()).item(), 6)  # 0.5 ln 2 + 0.5 ln (2/3)
        0.143841
    """
    return _kl(teacher_logprobs.clamp_min(LOG_FLOOR), student_logprobs.clamp_min(LOG_FLOOR))


def reverse_kl(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """Mode-seeking KL over the last dimension, (..., V) -> (...).

    Formula: KL(q || p) = sum_v q (log q - log p)

    Args:
        student_logprobs: log q, (..., V).
        teacher_logprobs: log p, (..., V).

    Returns:
        Divergence per token in nats, (...).
    """
    return forward_kl(teacher_logprobs, student_logprobs)


def generalized_jsd(student_logprobs: Tensor, teacher_logprobs: Tensor, beta: float = 0.5) -> Tensor:
    """Generalized Jensen-Shannon divergence over the last dimension, (..., V) -> (...).

    Formula: beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, the gradient passing through m;
    beta 0 is KL(p || q) and beta 1 is KL(q || p) by definition, where the formula itself tends to 0.

    Args:
        student_logprobs: log q, (..., V).
        teacher_logprobs: log p, (..., V).
        beta: the teacher's share in the mixture.

    Returns:
        Divergence per token in nats, (...).

    Source:
        GKD, arXiv 2306.13649, equation 1; end points as in TRL.
    """
    if beta == 0:
        return forward_kl(student_logprobs, teacher_logprobs)
    if beta == 1:
        return reverse_kl(student_logprobs, teacher_logprobs)
    log_p, log_q, log_m = _with_mixture(teacher_logprobs, student_logprobs, beta)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def skew_forward_kl(student_logprobs: Tensor, teacher_logprobs: Tensor, alpha: float = 0.1) -> Tensor:
    """Forward KL to a mixture with some teacher in it, (..., V) -> (...).

    Formula: KL(p || alpha p + (1 - alpha) q)

    Args:
        student_logprobs: log q, (..., V).
        teacher_logprobs: log p, (..., V).
        alpha: the teacher's share in the mixture.

    Returns:
        Divergence per token in nats, (...); at most -log alpha.

    Source:
        DistiLLM, arXiv 2402.03898, section 3.1.
    """
    log_p, _, log_m = _with_mixture(teacher_logprobs, student_logprobs, alpha)
    return _kl(log_p, log_m)


def skew_reverse_kl(student_logprobs: Tensor, teacher_logprobs: Tensor, alpha: float = 0.1) -> Tensor:
    """Reverse KL to a mixture with some student in it, (..., V) -> (...).

    Formula: KL(q || (1 - alpha) p + alpha q)

    Args:
        student_logprobs: log q, (..., V).
        teacher_logprobs: log p, (..., V).
        alpha: the student's share in the mixture.

    Returns:
        Divergence per token in nats, (...); at most -log alpha.

    Source:
        DistiLLM, arXiv 2402.03898, section 3.1.
    """
    return skew_forward_kl(teacher_logprobs, student_logprobs, alpha)


def total_variation(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """Total variation distance over the last dimension, (..., V) -> (...).

    Formula: 0.5 sum_v |p - q|

    Args:
        student_logprobs: log q, (..., V).
        teacher_logprobs: log p, (..., V).

    Returns:
        Distance per token in [0, 1], (...).
    """
    return 0.5 * (teacher_logprobs.exp() - student_logprobs.exp()).abs().sum(-1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of floored log-probabilities, (..., V) -> (...)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _with_mixture(first: Tensor, second: Tensor, weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """Both distributions floored and log(weight first + (1 - weight) second), each (..., V)."""
    first, second = first.clamp_min(LOG_FLOOR), second.clamp_min(LOG_FLOOR)
    mixture = weight * first.exp() + (1 - weight) * second.exp()
    return first, second, mixture.clamp_min(torch.finfo(mixture.dtype).tiny).log()


def divergence_rows_(
    kd: KDLoss, log_q: Tensor, log_p: Tensor, q: Tensor, p: Tensor, mixture: Tensor | None, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Divergence of R rows and its gradient, overwriting every argument, 5 x (R, V) -> (R), (R, V).

    Formula: with g = dD/dq, the gradient with respect to the student's logits is q (g - sum_v q g).

    Args:
        kd: which divergence; coefficient and temperature factors are the caller's.
        log_q: student log-probabilities, floored.
        log_p: teacher log-probabilities, floored.
        q: exp(log_q).
        p: exp(log_p).
        mixture: room for the divergences with a mixture, else None.
        gradient: whether to compute the second return value.

    Returns:
        Divergence per row in nats, and its gradient with respect to the student's logits in one of the arguments.
    """
    match kd.effective:
        case "forward_kl":
            value = log_p.sub_(log_q).mul_(p).sum(-1)
            return value, torch.sub(q, p, out=log_q) if gradient else None
        case "reverse_kl":
            log_q.sub_(log_p)
            value = torch.mul(q, log_q, out=log_p).sum(-1)
            return value, log_q.sub_(value[:, None]).mul_(q) if gradient else None
        case "jsd":
            log_m = _log_mixture_(p, q, kd.beta, mixture)
            kl_p = log_p.sub_(log_m).mul_(p).sum(-1)
            log_q.sub_(log_m)
            kl_q = torch.mul(q, log_q, out=p).sum(-1)
            value = kd.beta * kl_p + (1 - kd.beta) * kl_q
            return value, log_q.sub_(kl_q[:, None]).mul_(q).mul_(1 - kd.beta) if gradient else None
        case "skew_forward_kl":
            log_m = _log_mixture_(p, q, kd.alpha, mixture)
            log_p.sub_(log_m)  # log(p/m)
            value = torch.mul(p, log_p, out=log_q).sum(-1)
            g = log_p.exp_().mul_(kd.alpha - 1)
            return value, _through_softmax_(g, q, room=log_q) if gradient else None
        case "skew_reverse_kl":
            log_m = _log_mixture_(q, p, kd.alpha, mixture)
            log_q.sub_(log_m)  # log(q/m)
            value = torch.mul(q, log_q, out=p).sum(-1)
            g = log_q.sub_(torch.exp(log_q, out=p), alpha=kd.alpha)
            return value, _through_softmax_(g, q, room=p) if gradient else None
        case "total_variation":
            g = p.neg_().add_(q)
            value = torch.abs(g, out=log_p).sum(-1).mul_(0.5)
            return value, _through_softmax_(g.sign_().mul_(0.5), q, room=log_p) if gradient else None


def _log_mixture_(first: Tensor, second: Tensor, weight: float, room: Tensor | None) -> Tensor:
    """log(weight first + (1 - weight) second), written to `room`."""
    assert room is not None
    torch.lerp(second, first, weight, out=room)
    return room.clamp_min_(torch.finfo(room.dtype).tiny).log_()


def _through_softmax_(g: Tensor, q: Tensor, room: Tensor) -> Tensor:
    """q (g - sum_v q g), written to `g`."""
    return g.sub_(torch.mul(q, g, out=room).sum(-1, keepdim=True)).mul_(q)
