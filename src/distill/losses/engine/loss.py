"""KD loss, LM loss and their gradients from hidden states and head weights, in the memory of one chunk of tokens.

The vocabulary dominates distillation, so loss and gradients are computed together in the forward pass, chunk by chunk,
and a [tokens, vocabulary] tensor never exists; backward only multiplies by the incoming gradient. So the weights of the
two losses must be known in the forward pass, and every element-wise step is written by hand, in place.

Matrix products run in the compute dtype: the autocast dtype where autocast is on, else that of the hidden states; in
fp32 on a CPU that has no units for it. Softmax, sums and the head's gradient are in fp32, and in fp64 for an fp64
student.

Shapes: N tokens, D hidden width, V student vocabulary.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from distill.losses.engine.divergence import KDLoss
from distill.losses.engine.metrics import TokenStats, token_stats_of
from distill.losses.engine.targets import Targets
from distill.losses.engine.walk import Task, walk, wide_dtype
from distill.models.head import LMHead


@dataclass(frozen=True, eq=False)
class EngineOutput:
    """What one call returns.

    Args:
        loss: kd_weight * kd_sum + lm_weight * lm_sum, differentiable unless both weights are 0 or None.
        kd_sum: summed KD loss in nats, coefficient and T^2 included, detached; None if not asked for.
        lm_sum: summed LM loss in nats, detached; None if not asked for.
        stats: weight-free sums; None if not asked for.
    """

    loss: Tensor
    kd_sum: Tensor | None
    lm_sum: Tensor | None
    stats: TokenStats | None


def distillation_loss(
    student_hidden_ND: Tensor,
    student_head: LMHead,
    labels_N: Tensor,
    targets: Targets | None,
    *,
    kd: KDLoss | None = None,
    temperature: float = 1.0,
    kd_weight: float | None = None,
    lm_weight: float | None = None,
    chunk_size: int | None = None,
    metrics: bool = False,
) -> EngineOutput:
    """KD and LM loss of N valid tokens, (N, D) -> scalar, differentiable in hidden states, head weight and head bias.

    Formula: kd_weight * coefficient * T^2 * sum_n D(p_n, q_n) + lm_weight * sum_n -log q_n(label_n)

    Args:
        student_hidden_ND: last hidden states of the valid tokens; rows need not be contiguous.
        student_head: of the student.
        labels_N: next-token ids.
        targets: of the teacher for the same tokens; None for the LM loss alone.
        kd: which divergence; None only together with `kd_weight` None.
        temperature: KD temperature T.
        kd_weight: factor on the summed KD loss, normaliser included. None: not computed. 0: value without gradient.
        lm_weight: the same for the LM loss.
        chunk_size: tokens at a time; chosen by a memory budget when None.
        metrics: also return the weight-free statistics (validation).

    Returns:
        Loss, raw sums in nats and statistics.

    Raises:
        UserError: sparse targets at another temperature or for a larger vocabulary; sampled targets without forward KL.
    """
    if kd_weight is None:
        kd = None
    if kd is not None:
        assert targets is not None, "KD needs targets"
        targets.refuse_unsuitable(kd, temperature, student_head.vocab_size)
    elif not metrics:
        targets = None  # the teacher's head is not even read
        if lm_weight is None:
            return EngineOutput(student_hidden_ND.new_zeros((), dtype=wide_dtype(student_hidden_ND)), None, None, None)
    head = student_head.whole()
    inputs = (student_hidden_ND, head.weight, head.bias)
    learns = torch.is_grad_enabled() and bool(kd_weight or lm_weight)
    needs = tuple(learns and x is not None and x.requires_grad for x in inputs)
    with torch.no_grad():
        shared = head.vocab_size if targets is None else targets.shared_vocab(head.vocab_size)
        task = Task(kd, temperature, kd_weight, lm_weight, shared, metrics, needs)
        values, gradients = walk(student_hidden_ND, head, labels_N, targets, task, chunk_size)
        loss = torch.zeros((), dtype=wide_dtype(student_hidden_ND), device=student_hidden_ND.device)
        kd_sum = lm_sum = None
        if kd is not None:
            kd_sum = values["kd"].sum() * (kd.coefficient * kd.temperature_factor(temperature))
            loss = loss + kd_weight * kd_sum if kd_weight else loss
        if lm_weight is not None:
            lm_sum = values["lm"].sum()
            loss = loss + lm_weight * lm_sum if lm_weight else loss
        stats = token_stats_of(values, targets is not None and targets.whole) if metrics else None
    if any(needs):
        loss = _WithGradients.apply(loss, gradients, *inputs)
    return EngineOutput(loss, kd_sum, lm_sum, stats)


def with_classes(
    stats: TokenStats, student_hidden_ND: Tensor, student_head: LMHead, labels_N: Tensor, classes: Targets,
    taught_N: Tensor, chunk_size: int | None = None,
) -> TokenStats:  # fmt: skip
    """Statistics with the KL at T = 1 to a teacher that has another tokenizer.

    Args:
        stats: of the same tokens.
        student_hidden_ND, student_head, labels_N, chunk_size: as in `distillation_loss`.
        classes: targets of which a token without any counts as zero.
        taught_N: bool, which tokens have one.
    """
    engine = distillation_loss(
        student_hidden_ND, student_head, labels_N, classes, kd=KDLoss(), kd_weight=0.0, chunk_size=chunk_size
    )
    assert engine.kd_sum is not None
    return replace(stats, class_kl=engine.kd_sum.double(), targets=taught_N.sum(dtype=torch.float64))


class _WithGradients(torch.autograd.Function):
    """Gives a scalar the gradients that were computed along with it."""

    @staticmethod
    def forward(ctx: FunctionCtx, loss: Tensor, gradients: list[Tensor | None], *inputs: Tensor | None) -> Tensor:
        ctx.gradients = gradients  # type: ignore[attr-defined]
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]  # type: ignore[attr-defined]
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        gradients: list[Tensor | None] = ctx.gradients  # type: ignore[attr-defined]
        dtypes: list[torch.dtype | None] = ctx.dtypes  # type: ignore[attr-defined]
        last = not torch._C._autograd._get_current_graph_task_keep_graph()
        if last:
            ctx.gradients = None  # type: ignore[attr-defined]
        return None, None, *(_scaled(g, grad_output, d, last) for g, d in zip(gradients, dtypes, strict=True))


def _scaled(gradient: Tensor | None, factor: Tensor, dtype: torch.dtype | None, last: bool) -> Tensor | None:
    """The product in another dtype; in place if nobody reads the gradient again: no second copy of [V, D]."""
    if gradient is None or dtype is None:
        return None
    if gradient.dtype != dtype and gradient.is_cuda:  # one pass; a CPU would make the copy first
        return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))
    return (gradient.mul_(factor) if last else gradient * factor).to(dtype)
