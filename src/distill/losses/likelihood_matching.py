"""Approximate likelihood matching: how probable each stretch of text is, whatever tokens spell it.

A baseline to compare with. It needs the student's probability of whole stretches, which no row of the loss engine
knows, so it is a plain function of the log-probabilities of labels.

Shapes: N tokens of the student, M of the teacher, C stretches between places where both have a boundary.
"""

import torch
from torch import Tensor


def likelihood_matching(
    student_logprobs_N: Tensor, teacher_logprobs_M: Tensor, of_N: Tensor, of_M: Tensor, temperature: float = 100.0
) -> Tensor:
    """Divergence between two events' probabilities, that the stretch comes or that it does not, (N), (M) -> (C).

    Formula: with P = exp(1/T sum log p), and Q likewise: T (P log (P/Q) + (1 - P) log((1 - P)/(1 - Q)))

    The factor keeps it in nats: without it, it falls as 1/T.

    Args:
        student_logprobs_N: log-probability of each of the student's tokens, differentiable.
        teacher_logprobs_M: of the teacher's.
        of_N: stretch that each token belongs to, int64, from 0 on.
        of_M: likewise.
        temperature: T.

    Returns:
        Nats per stretch.

    Source:
        ALM, arXiv 2503.20083, equation 6 in its simple form: without debiasing and without a threshold on stretches.

    Example:
        >>> same = torch.tensor([-1.0, -2.0])
        >>> likelihood_matching(same, same.sum()[None], torch.tensor([0, 0]), torch.tensor([0])).abs().max() < 1e-6
        tensor(True)
    """
    count = int(of_M.max()) + 1
    log_q, log_p = (
        logprobs.new_zeros(count).index_add(0, of, logprobs).div(temperature).clamp(max=-1e-6)
        for logprobs, of in ((student_logprobs_N, of_N), (teacher_logprobs_M, of_M))
    )
    log_rest_q, log_rest_p = (torch.log(-torch.expm1(log)) for log in (log_q, log_p))
    return temperature * (log_p.exp() * (log_p - log_q) + log_rest_p.exp() * (log_rest_p - log_rest_q))
