"""Which neurons of a block a narrower FFN keeps, and what they then write, in closed form.

Candidates are the neurons that contribute most under the teacher's own gates, twice as many as are kept. Of them one
after the other is chosen whose addition lowers the squared error of the best linear read-out most; this is Cholesky's
factorisation of the Gram matrix H'H with the pivot chosen by gain instead of by size [orthogonal matching pursuit for
many targets at once]. What the chosen ones write is the ridge least-squares fit, where the ridge pulls to what they
wrote in the teacher times their mean gate: whatever the calibration does not determine stays as it was, and a block
that the chosen ones can reproduce is reproduced.

In fp32; activations exist for a few tokens at a time, so memory is that of a Gram matrix of the candidates and of a
factor of the chosen, 4 (2 F)^2 + 8 F^2 bytes, whatever the number of experts.

Shapes: N tokens, D width, M neurons, C candidates, F chosen neurons, E experts.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from distill.models.start.ffn import Block, Neurons

RIDGE = 1e-4  # times the mean of the Gram matrix' diagonal; 1e-7 to 1e-2 differed by 6% in the pilot
CANDIDATES = 2  # times as many as are kept
BLOCK_BYTES = 64 * 2**20  # of activations at one time


@torch.no_grad()
def narrow_ffn(
    block: Block,
    states_ND: Tensor,
    target_ND: Tensor,
    gates_NE: Tensor | None,
    width: int,
    *,
    constant: bool = False,
    ridge: float = RIDGE,
    generator: torch.Generator | None = None,
) -> Neurons:
    """An FFN of `width` neurons of the block that comes nearest to a target on calibration tokens.

    Args:
        block: the candidates, in fp32.
        states_ND: what the FFN will read.
        target_ND: what it should write.
        gates_NE: the teacher's gates, zero where it did not route; None for a dense FFN.
        width: F. Where the block has fewer neurons, the rest are random and write nothing yet.
        constant: whether the FFN has a bias on its output.
        ridge: times the mean of the Gram matrix' diagonal.
        generator: of the random ones.
    """
    gate_M = mean_gates(block, gates_NE, states_ND)
    if len(block.neurons) > CANDIDATES * width:
        index_C = contributions(block, states_ND, gates_NE).topk(CANDIDATES * width).indices.sort().values
    else:
        index_C = torch.arange(len(block.neurons), device=states_ND.device)
    candidates = block.neurons[index_C]
    gram_CC, cross_CD = gram(candidates, states_ND, target_ND, constant)
    gram_CC.diagonal().add_(ridge * gram_CC.diagonal().mean() + 1e-12)  # a block may be silent
    kept = min(width, len(candidates))
    index_F = choose(gram_CC, cross_CD, kept, constant)
    chosen, among = candidates[index_F], index_F
    start_FD = chosen.outward_MD * gate_M[index_C][index_F, None]
    if constant:
        among = torch.cat([index_F, index_F.new_tensor([len(candidates)])])
        first_D = _mean_constant(block, gates_NE, states_ND)
        chosen = replace(chosen, constant_D=first_D)
    chosen = replace(chosen, outward_MD=start_FD)
    written_KD = _corrected(chosen, gram_CC[among][:, among], states_ND, target_ND, constant)
    fitted = replace(chosen, outward_MD=written_KD[:kept], constant_D=written_KD[kept] if constant else None)
    return _filled(fitted, width, generator)


def mean_gates(block: Block, gates_NE: Tensor | None, like: Tensor) -> Tensor:
    """The mean gate of each neuron's expert, over all tokens; 1 for those that are always on."""
    if gates_NE is None:
        return like.new_ones(len(block.neurons))
    return torch.cat([gates_NE.mean(0).to(like.dtype), like.new_ones(1)])[block.expert_M]  # -1 is the last


def contributions(block: Block, states_ND: Tensor, gates_NE: Tensor | None) -> Tensor:
    """E[(gate x activation)^2] x |what it writes|^2 of each neuron (M), each expert on the tokens routed to it."""
    total_M = states_ND.new_zeros(len(block.neurons))
    for expert in block.expert_M.unique().tolist():
        index_I = (block.expert_M == expert).nonzero()[:, 0]
        neurons = block.neurons[slice(int(index_I[0]), int(index_I[-1]) + 1)]
        routed_N = slice(None) if expert < 0 or gates_NE is None else gates_NE[:, expert].nonzero()[:, 0]
        for part in _parts(states_ND[routed_N], len(neurons)):
            activations = neurons.activations(states_ND[routed_N][part])
            if expert >= 0 and gates_NE is not None:
                activations = activations * gates_NE[routed_N][part, expert, None].to(activations.dtype)
            total_M[index_I] += activations.square().sum(0)
    return total_M * block.neurons.outward_MD.square().sum(1)


def gram(neurons: Neurons, states_ND: Tensor, target_ND: Tensor, constant: bool = False) -> tuple[Tensor, Tensor]:
    """H'H (C, C) and H'T (C, D) of the activations H; with `constant` a column of ones comes last, C = M + 1."""
    size = len(neurons) + constant
    gram_CC = states_ND.new_zeros(size, size)
    cross_CD = states_ND.new_zeros(size, target_ND.shape[1])
    for part in _parts(states_ND, size):
        activations_NC = _with_ones(neurons.activations(states_ND[part]), constant)
        gram_CC.addmm_(activations_NC.T, activations_NC)
        cross_CD.addmm_(activations_NC.T, target_ND[part].to(activations_NC.dtype))
    return gram_CC, cross_CD


def choose(gram_CC: Tensor, cross_CD: Tensor, count: int, constant: bool = False) -> Tensor:
    """Indices (count) of the columns that, added one after the other, lower the ridge least-squares error most.

    Adding column j lowers the error by |r_j|^2 / d_j, where r and d are what is left of H'T and of the Gram matrix'
    diagonal once the columns chosen before it are projected out.

    Args:
        gram_CC: H'H, with its ridge; left as it is.
        cross_CD: H'T.
        count: how many.
        constant: the last column is in from the start and does not count.
    """
    size = len(gram_CC)
    if count + constant >= size:
        return torch.arange(count, device=gram_CC.device)
    rest_CD, diagonal_C = cross_CD.clone(), gram_CC.diagonal().clone()
    least = 1e-9 * diagonal_C.mean()
    factor_CF = gram_CC.new_zeros(size, count + constant)
    taken_C = torch.zeros(size, dtype=torch.bool, device=gram_CC.device)
    order_F = torch.empty(count + constant, dtype=torch.long, device=gram_CC.device)
    for step in range(count + constant):
        if constant and step == 0:
            pick = order_F.new_tensor(size - 1)
        else:
            gain_C = rest_CD.square().sum(1) / diagonal_C.clamp(min=least)
            pick = gain_C.masked_fill_(taken_C, -1.0).argmax()
        pick = pick.view(1)
        column_C = gram_CC.index_select(0, pick)[0]
        column_C = torch.addmv(column_C, factor_CF[:, :step], factor_CF.index_select(0, pick)[0, :step], alpha=-1)
        root = diagonal_C.index_select(0, pick).clamp(min=least).sqrt()
        column_C.div_(root)
        factor_CF[:, step] = column_C
        rest_CD.addr_(column_C, rest_CD.index_select(0, pick)[0] / root, alpha=-1)
        diagonal_C.addcmul_(column_C, column_C, value=-1)
        taken_C.index_fill_(0, pick, True)
        order_F[step] = pick[0]
    return order_F[int(constant) :]


def _corrected(chosen: Neurons, gram_KK: Tensor, states_ND: Tensor, target_ND: Tensor, constant: bool) -> Tensor:
    """What the chosen neurons should write (K, D): what they write, plus the ridge fit of what that leaves over."""
    start_KD = chosen.outward_MD
    if constant:
        assert chosen.constant_D is not None
        start_KD = torch.cat([start_KD, chosen.constant_D[None]])
    cross_KD = torch.zeros_like(start_KD)
    for part in _parts(states_ND, len(start_KD)):
        activations_NK = _with_ones(chosen.activations(states_ND[part]), constant)
        cross_KD.addmm_(activations_NK.T, target_ND[part].to(start_KD.dtype) - activations_NK @ start_KD)
    factor_KK, failed = torch.linalg.cholesky_ex(gram_KK)
    if int(failed):  # rounding has made it indefinite
        factor_KK = torch.linalg.cholesky(
            gram_KK + 1e-2 * gram_KK.diagonal().mean() * torch.eye(len(gram_KK)).to(gram_KK)
        )
    return start_KD + torch.cholesky_solve(cross_KD, factor_KK)


def _mean_constant(block: Block, gates_NE: Tensor | None, like: Tensor) -> Tensor:
    """What the block adds to every token on average, by its biases alone."""
    if block.constants_ED is not None and gates_NE is not None:
        return gates_NE.mean(0).to(like.dtype) @ block.constants_ED.to(like)
    constant_D = block.neurons.constant_D
    return like.new_zeros(block.neurons.outward_MD.shape[1]) if constant_D is None else constant_D


def _with_ones(activations_NM: Tensor, constant: bool) -> Tensor:
    return (
        torch.cat([activations_NM, activations_NM.new_ones(len(activations_NM), 1)], 1) if constant else activations_NM
    )


def _parts(states_ND: Tensor, width: int) -> Iterator[slice]:
    """Slices of tokens whose activations stay within BLOCK_BYTES."""
    step = max(1, BLOCK_BYTES // (4 * max(1, width)))
    return (slice(start, start + step) for start in range(0, len(states_ND), step))


def _filled(neurons: Neurons, width: int, generator: torch.Generator | None) -> Neurons:
    """Padded to `width` with random neurons as large as the others, which write nothing yet."""
    more = width - len(neurons)
    if more <= 0:
        return neurons

    def drawn(like: Tensor) -> Tensor:
        shape = (like.shape[0], more, *like.shape[2:])
        return torch.cat([like, torch.randn(shape, generator=generator).to(like) * like.std()], 1)

    return replace(
        neurons,
        inward_PMD=drawn(neurons.inward_PMD),
        outward_MD=torch.cat([neurons.outward_MD, neurons.outward_MD.new_zeros(more, neurons.outward_MD.shape[1])]),
        bias_PM=None if neurons.bias_PM is None else drawn(neurons.bias_PM),
    )
