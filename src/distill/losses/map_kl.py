"""KL between two models' head-averaged attention maps, with its gradient worked out in the forward pass.

Maps are made anew from queries and keys, a block of query rows at a time, so no [B, H, L, L] tensor outlives its block
and no model has to return its attention. The scores of one layer are computed twice on each side, and there is no
second derivative.

Shapes: B rows, L positions, H query heads, G key heads, R = H / G, d width of a head (each side its own), Q query rows
of one block, K keys.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill.losses.relation_kl import BLOCK_BYTES, CPU_BLOCK_BYTES, LEAST_ROWS
from distill.models.trace import QKV


def map_kl(student: QKV, teacher: QKV, document_BL: Tensor, real_BL: Tensor, query_BL: Tensor) -> Tensor:
    """Sum over queries of KL(teacher map || student map), scalar; a map is the mean of its layer's heads.

    A key takes part where it lies in the query's document, not after it, and both models may attend to it; with two
    different windows each map is that of the positions in both.

    Args:
        student: gradient flows to its queries and keys; in fp32 or wider.
        teacher: detached, in the same precision.
        document_BL: number of the document that a position belongs to.
        real_BL: bool, positions that may be keys.
        query_BL: bool, positions that count as queries.

    Returns:
        Nats.
    """
    with torch.autocast(student.query_BHLd.device.type, enabled=False):
        total: Tensor = _MapKL.apply(
            student.query_BHLd, student.key_BGLd, student, teacher, document_BL, real_BL, query_BL
        )
        return total


class _MapKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        query_BHLd: Tensor,
        key_BGLd: Tensor,
        student: QKV,
        teacher: QKV,
        document_BL: Tensor,
        real_BL: Tensor,
        query_BL: Tensor,
    ) -> Tensor:
        rows, heads, length, _ = query_BHLd.shape
        groups = key_BGLd.shape[1]
        real_B1L1 = real_BL[:, None, :, None]
        query, key = (states.detach().masked_fill(~real_B1L1, 0) for states in (query_BHLd, key_BGLd))
        theirs, their_key = (s.masked_fill(~real_B1L1, 0) for s in (teacher.query_BHLd, teacher.key_BGLd))
        needs_grad = any(ctx.needs_input_grad[:2])  # type: ignore[attr-defined]
        grad_query, grad_key = torch.zeros_like(query), torch.zeros_like(key)
        budget = CPU_BLOCK_BYTES if query.device.type == "cpu" else BLOCK_BYTES
        step = max(LEAST_ROWS, budget // (rows * max(heads, theirs.shape[1]) * length * query.element_size()))
        position_L = torch.arange(length, device=query.device)
        total = query.new_zeros(())
        for start in range(0, length, step):
            stop = min(start + step, length)
            block = slice(start, stop)
            key_BQK = (
                (position_L[block, None] >= position_L[:stop])
                & (document_BL[:, block, None] == document_BL[:, None, :stop])
                & real_BL[:, None, :stop]
            )
            key_B1QK = key_BQK[:, None]
            for side in (student, teacher):
                if side.mask is not None:
                    key_B1QK = key_B1QK & side.mask[:, :, block, :stop]
            weight_BQ = (query_BL[:, block] & key_B1QK[:, 0].any(-1)).to(query.dtype)
            hidden_B11QK = ~key_B1QK[:, :, None]
            log_p = _log_map(_log_heads(theirs, their_key, block, hidden_B11QK, teacher.scale))
            log_heads_BGRQK = _log_heads(query, key, block, hidden_B11QK, student.scale)
            log_q = _log_map(log_heads_BGRQK)
            p_BQK = log_p.exp()
            total += torch.einsum("bqk,bqk,bq->", p_BQK, log_p - log_q, weight_BQ)
            if not needs_grad:
                continue
            # The share p a_h / sum a stays within p where both underflow.
            share = (log_heads_BGRQK - (log_q[:, None, None] + math.log(heads))).exp()
            share *= (p_BQK * weight_BQ[..., None])[:, None, None]
            scores = log_heads_BGRQK.exp_().mul_(share.sum(-1, keepdim=True)).sub_(share).mul_(student.scale)
            grad_query[:, :, block] += (scores @ key[:, :, None, :stop]).flatten(1, 2)
            grad_key[:, :, :stop] += torch.einsum(
                "bgrqk,bgrqd->bgkd", scores, query[:, :, block].unflatten(1, (groups, -1))
            )
        if needs_grad:
            ctx.save_for_backward(grad_query.masked_fill_(~real_B1L1, 0), grad_key.masked_fill_(~real_B1L1, 0))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_query, grad_key = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad_query * grad, grad_key * grad, None, None, None, None, None


def _log_heads(query_BHLd: Tensor, key_BGLd: Tensor, block: slice, hidden_B11QK: Tensor, scale: float) -> Tensor:
    """Log attention [B, G, R, Q, K] of each head over the keys that are not hidden."""
    query_BGRQd = query_BHLd[:, :, block].unflatten(1, (key_BGLd.shape[1], -1)) * scale
    scores = query_BGRQd @ key_BGLd[:, :, None, : block.stop].transpose(-1, -2)
    # Finite, so that p * (log p - log q) of a hidden key is zero and not NaN.
    return scores.masked_fill_(hidden_B11QK, torch.finfo(scores.dtype).min / 4).log_softmax(-1)


def _log_map(log_heads_BGRQK: Tensor) -> Tensor:
    """Log of the mean [B, Q, K] of the heads' attention."""
    heads = log_heads_BGRQK.shape[1] * log_heads_BGRQK.shape[2]
    return log_heads_BGRQK.flatten(1, 2).logsumexp(1) - math.log(heads)
