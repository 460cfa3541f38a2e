"""The terms of the routing losses as plain functions: states and experts' outputs in, sums over tokens out.

Everything of the teacher's arrives detached. Sums, not means: whoever knows how many units the whole optimizer step has
divides by them. A value by itself means nothing without its count.

Shapes: B rows, L positions, N valid tokens, D width, E experts, K experts per token, S layers.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from distill.batch import Tokens
from distill.losses.relation_kl import relation_kl
from distill.losses.states import normalise
from distill.models.precision import full_precision
from distill.teachers.experts import Capture, Routed, View, chunks, mix


def entropy(gates_NE: Tensor) -> Tensor:
    """Entropy [N] in nats; a zero gate adds nothing."""
    return torch.special.entr(gates_NE).sum(-1)


def feature_matching(projected_ND: Tensor, mixture_ND: Tensor) -> Tensor:
    """Sum over tokens of mean_D (projected - normalise(mixture))^2, scalar; 1 a token = predicting nothing."""
    return (full_precision(projected_ND) - normalise(mixture_ND)).square().mean(-1).sum()


def expert_importance(probe_logits_NE: Tensor, gates_NE: Tensor) -> Tensor:
    """Sum over tokens of KL(teacher gate || softmax of the probe's logits), scalar, nats."""
    log_q_NE = full_precision(probe_logits_NE).log_softmax(-1)
    return -(gates_NE * log_q_NE).sum() - entropy(gates_NE).sum()


def constant_gate_kl(gates_NE: Tensor) -> Tensor:
    """Mean KL of the best constant gate, which is the mean gate: H(mean) - mean H, scalar, nats per token."""
    count = max(1, len(gates_NE))
    return entropy(gates_NE.sum(0) / count) - entropy(gates_NE).sum() / count


def load_balance(probe_logits_ME: Tensor, k: int, layers: int) -> Tensor:
    """Switch balance E / k sum_i f_i P_i - 1 of the probe, averaged over layers, over the tokens of all ranks, scalar.

    f_i is the share of tokens whose k largest logits include i, P_i the mean probability of i. The value is global; the
    gradient is this rank's part times the number of ranks, which DDP's averaging turns into the whole.

    Args:
        probe_logits_ME: logits of `layers` layers one after the other, M = layers * N.
        k: experts per token.
        layers: number of layers.

    Returns:
        0 for a balanced probe, E - 1 for a collapsed one at k = 1; 0 where there are no tokens.

    Source:
        Switch Transformers, arXiv 2101.03961.
    """
    probs_ME = full_precision(probe_logits_ME).softmax(-1)
    num_experts = probs_ME.shape[-1]
    chosen_ME = torch.zeros_like(probs_ME).scatter_(-1, probs_ME.topk(k).indices, 1.0)
    probs_SE = probs_ME.unflatten(0, (layers, -1)).sum(1)
    chosen_SE = chosen_ME.unflatten(0, (layers, -1)).sum(1)
    tokens = probs_SE.new_full((1,), len(probs_ME) // layers)
    world = 1
    shared = torch.cat([chosen_SE.flatten(), probs_SE.detach().flatten(), tokens])
    if dist.is_initialized():
        world = dist.get_world_size()
        dist.all_reduce(shared)
    all_chosen_SE, all_probs_SE = shared[:-1].view(2, layers, num_experts)
    tokens = shared[-1]
    scale = num_experts / (k * layers * tokens.clamp(min=1).square())
    value = scale * (all_chosen_SE * all_probs_SE).sum() - (tokens > 0).to(scale.dtype)
    local = scale * (all_chosen_SE * probs_SE).sum()
    return value + world * (local - local.detach())


def student_aware_weights(
    gates_NE: Tensor, log_share_NE: Tensor, gap_NE: Tensor, k: int, tau: float
) -> tuple[Tensor, Tensor]:
    """Weights and indices [N, K] of the experts chosen by w_i ~ g_i exp(gap_i / tau), renormalised over the chosen.

    Args:
        gates_NE: the teacher's gate, which chooses.
        log_share_NE: log of an expert's weight in the teacher's own mixture: log g for a MoE, 0 for the slices of a
            dense FFN, whose mixture is a plain sum (the outputs carry their gate in their size).
        gap_NE: the student's error on each expert, detached.
        k: experts per token.
        tau: temperature of the gap; a larger one listens less to the student.
    """
    index_NK = (gates_NE.log() + gap_NE / tau).topk(k).indices
    return (log_share_NE + gap_NE / tau).gather(-1, index_NK).softmax(-1), index_NK


def student_aware_route(
    view: View, capture: Capture, rows_N: Tensor, projected_ND: Tensor, k: int, tau: float
) -> Routed:
    """Routing [N, K] of the rows with the student in view, all experts evaluated on them block by block."""
    view = view.whole()  # once, not in every chunk: ranks may have different numbers of rows
    gates_NE, experts = view.gates(capture, rows_N), view.num_experts
    log_share_NE, projected_ND = view.log_share(gates_NE), full_precision(projected_ND.detach())
    indices, mixtures, gaps = [], [], []
    for part in chunks(len(rows_N), experts * view.width * projected_ND.element_size(), rows_N.device):
        outputs_END = view.outputs(capture, rows_N[part])
        gap_NE = (projected_ND[part] - normalise(outputs_END)).square().mean(-1).T
        weights_NK, index_NK = student_aware_weights(gates_NE[part], log_share_NE[part], gap_NE, k, tau)
        indices.append(index_NK)
        mixtures.append(mix(outputs_END, index_NK, weights_NK))
        gaps.append(gap_NE.gather(-1, index_NK))
    if not indices:
        return Routed(gates_NE, rows_N.new_zeros(0, k), projected_ND[:0], projected_ND.new_zeros(0, k))
    return Routed(gates_NE, torch.cat(indices), torch.cat(mixtures), torch.cat(gaps))


def attention_alignment(states_BLD: Tensor, mixture_BLD: Tensor, tokens: Tokens) -> Tensor:
    """Sum over queries of the relation KL between routed mixture and student states, both normalised, scalar, nats.

    Queries are the valid tokens that have a strictly earlier token in their document.
    """
    return relation_kl(states_BLD, mixture_BLD, tokens.document_BL, tokens.real_BL, tokens.query_BL)


def usage_stats(routed: Routed, gates_NE: Tensor, valid_N: Tensor) -> dict[str, Tensor]:
    """Mean gate entropy (nats), the largest share of an expert among the choices, mean gap where it was looked at."""
    choices = routed.index_NK.index_select(0, valid_N).flatten()
    counts_E = gates_NE.new_zeros(gates_NE.shape[-1]).scatter_add_(0, choices, gates_NE.new_ones(len(choices)))
    stats = {
        "gate_entropy": entropy(gates_NE).sum() / max(1, len(gates_NE)),
        "expert_usage_max": counts_E.max() / max(1, len(choices)),
    }
    if routed.gap_NK is not None:
        stats["mean_gap"] = routed.gap_NK.sum() / max(1, routed.gap_NK.numel())
    return stats
