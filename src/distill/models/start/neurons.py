"""Which neurons of a block a narrower FFN keeps, and what they then write, in closed form.

Candidates are the neurons that contribute most under the teacher's own gates, twice as many as are kept. Of them one
after the other is chosen whose addition lowers the squared error of the best linear read-out most; this is Cholesky's
factorisation of the Gram matrix H'H with the pivot chosen by gain instead of by size [orthogonal matching pursuit for
many targets at once]. What the chosen ones write is the ridge least-squares fit, where the ridge pulls to what they
wrote in the teacher times their mean gate: whatever the calibration does not determine stays as it was, and a block
that the chosen ones can reproduce is reproduced. How strongly it pulls is decided on tokens that are held out: at ten
tokens a neuron 0.1 gave a ten-layer SmolLM2 a KL of 2.19 where 1e-4 gave 2.84, at forty 1e-2 was as good.

In fp32; activations exist for a few tokens at a time, so memory is that of a Gram matrix of the candidates and of a
factor of the chosen, 4 (2 F)^2 + 8 F^2 bytes, whatever the number of experts, whose weights are made fp32 one by one.

Shapes: N tokens, D width, M neurons, C candidates, F chosen neurons, E experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distill.models.start.ffn import Block, Neurons

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # times the mean of the Gram matrix' diagonal
CANDIDATES = 2  # times as many as are kept
HELD_OUT = 8  # one in so many tokens decides between the ridges
BLOCK_BYTES = 64 * 2**20  # of activations at one time


@dataclass(frozen=True, eq=False)
class Task:
    """What an FFN is to do on calibration tokens.

    Args:
        states_ND: what it reads.
        target_ND: what it should write.
        weight_N: of each token's squared error.
    """

    states_ND: Tensor
    target_ND: Tensor
    weight_N: Tensor

    def split(self) -> tuple["Task", "Task"]:
        """Tokens to fit on and those, the last, that are held out."""
        first = len(self.states_ND) - len(self.states_ND) // HELD_OUT
        parts = [slice(0, first), slice(first, len(self.states_ND))]
        fitted, held = (Task(self.states_ND[p], self.target_ND[p], self.weight_N[p]) for p in parts)
        return fitted, held


@torch.no_grad()
def narrow_ffn(
    block: Block,
    task: Task,
    gates_NE: Tensor | None,
    width: int,
    *,
    constant: bool = False,
    ridges: tuple[float, ...] = RIDGES,
    generator: torch.Generator | None = None,
) -> Neurons:
    """An FFN of `width` neurons of the block that comes nearest to a target on calibration tokens.

    Args:
        block: the candidates; of half precision no more than an expert or the chosen ones are in fp32 at a time.
        task: calibration tokens.
        gates_NE: the teacher's gates, zero where it did not route; None for a dense FFN.
        width: F. Where the block has fewer neurons, the rest are random and write nothing yet.
        constant: whether the FFN has a bias on its output.
        ridges: to choose from; the choice of neurons goes by the first.
        generator: of the random ones.
    """
    states_ND = task.states_ND
    gate_M = mean_gates(block, gates_NE, states_ND)
    candidates, chosen_F = block.neurons, torch.arange(min(width, len(block.neurons)), device=states_ND.device)
    if len(candidates) > width:
        index_C = torch.arange(len(candidates), device=states_ND.device)
        if len(candidates) > CANDIDATES * width:
            index_C = contributions(block, task, gates_NE).topk(CANDIDATES * width).indices.sort().values
            candidates, gate_M = candidates[index_C], gate_M[index_C]
        candidates = candidates.to(states_ND.device)
        gram_CC, cross_CD = gram(candidates, task, constant)
        _add_ridge(gram_CC, ridges[0])
        chosen_F = choose(gram_CC, cross_CD, width, constant)
        del gram_CC, cross_CD
    chosen = candidates[chosen_F].to(states_ND.device)
    chosen = replace(
        chosen,
        outward_MD=chosen.outward_MD * gate_M[chosen_F, None],
        constant_D=_mean_constant(block, gates_NE, states_ND) if constant else None,
    )
    return _filled(fitted(chosen, task, constant, ridges), width, generator)


def mean_gates(block: Block, gates_NE: Tensor | None, like: Tensor) -> Tensor:
    """The mean gate of each neuron's expert, over all tokens; 1 for those that are always on."""
    if gates_NE is None:
        return like.new_ones(len(block.neurons))
    return torch.cat([gates_NE.mean(0).to(like.dtype), like.new_ones(1)])[block.expert_M]  # -1 is the last


def contributions(block: Block, task: Task, gates_NE: Tensor | None) -> Tensor:
    """E[(gate x activation)^2] x |what it writes|^2 of each neuron (M), each expert on the tokens routed to it."""
    states_ND, root_N = task.states_ND, task.weight_N.sqrt()
    total_M = states_ND.new_zeros(len(block.neurons))
    for expert in block.expert_M.unique().tolist():
        index_I = (block.expert_M == expert).nonzero()[:, 0]
        neurons = block.neurons[slice(int(index_I[0]), int(index_I[-1]) + 1)].to(states_ND.device)
        routed_N = slice(None) if expert < 0 or gates_NE is None else gates_NE[:, expert].nonzero()[:, 0]
        read_ND, scale_N = states_ND[routed_N], root_N[routed_N]
        if expert >= 0 and gates_NE is not None:
            scale_N = scale_N * gates_NE[routed_N, expert].to(scale_N.dtype)
        for part in _parts(read_ND, len(neurons)):
            activations = neurons.activations(read_ND[part]) * scale_N[part, None]
            total_M[index_I] += activations.square().sum(0)
        total_M[index_I] *= neurons.outward_MD.square().sum(1)
    return total_M


def gram(neurons: Neurons, task: Task, constant: bool = False, start_CD: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """H'H (C, C) and H'(T - H start) (C, D) of weighted activations H; with `constant` a column of ones comes last."""
    size = len(neurons) + constant
    gram_CC = task.states_ND.new_zeros(size, size)
    cross_CD = task.states_ND.new_zeros(size, task.target_ND.shape[1])
    for part in _parts(task.states_ND, size):
        activations_NC = neurons.activations(task.states_ND[part])
        if constant:
            activations_NC = torch.cat([activations_NC, activations_NC.new_ones(len(activations_NC), 1)], 1)
        wanted_ND = task.target_ND[part].to(activations_NC.dtype)
        if start_CD is not None:
            wanted_ND = wanted_ND - activations_NC @ start_CD
        root_N1 = task.weight_N[part, None].sqrt()
        activations_NC = activations_NC * root_N1
        gram_CC.addmm_(activations_NC.T, activations_NC)
        cross_CD.addmm_(activations_NC.T, wanted_ND * root_N1)
    return gram_CC, cross_CD


def fitted(neurons: Neurons, task: Task, constant: bool, ridges: tuple[float, ...] = RIDGES) -> Neurons:
    """The same neurons with what they write corrected by ridge least squares, the ridge decided on held-out tokens."""
    start_KD = neurons.outward_MD
    if constant:
        assert neurons.constant_D is not None
        start_KD = torch.cat([start_KD, neurons.constant_D[None]])
    (gram_KK, cross_KD), (held_KK, held_KD) = (gram(neurons, part, constant, start_KD) for part in task.split())
    best, least = ridges[0], None
    for ridge in ridges if len(ridges) > 1 else ():
        change_KD = _solved(gram_KK, cross_KD, ridge)
        # the held-out error, but for what does not depend on the change
        error = float((change_KD * (held_KK @ change_KD - 2 * held_KD)).sum(dtype=torch.float64))
        if least is None or error < least:
            best, least = ridge, error
    written_KD = start_KD + _solved(gram_KK + held_KK, cross_KD + held_KD, best)
    kept = len(neurons)
    return replace(neurons, outward_MD=written_KD[:kept], constant_D=written_KD[kept] if constant else None)


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
            gain_C = torch.linalg.vector_norm(rest_CD, dim=1).square_() / diagonal_C.clamp(min=least)
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


def _solved(gram_KK: Tensor, cross_KD: Tensor, ridge: float) -> Tensor:
    """(H'H + ridge)^-1 H'T."""
    ridged_KK = _add_ridge(gram_KK.clone(), ridge)
    factor_KK, failed = torch.linalg.cholesky_ex(ridged_KK)
    if int(failed):  # rounding has made it indefinite
        factor_KK = torch.linalg.cholesky(_add_ridge(ridged_KK, 1e-2))
    return torch.cholesky_solve(cross_KD, factor_KK)


def _add_ridge(gram_CC: Tensor, ridge: float) -> Tensor:
    """In place; a block that is silent must not make it singular."""
    gram_CC.diagonal().add_(ridge * gram_CC.diagonal().mean() + 1e-12)
    return gram_CC


def _mean_constant(block: Block, gates_NE: Tensor | None, like: Tensor) -> Tensor:
    """What the block adds to every token on average, by its biases alone."""
    if block.constants_ED is not None and gates_NE is not None:
        return gates_NE.mean(0).to(like.dtype) @ block.constants_ED.to(like)
    constant_D = block.neurons.constant_D
    return like.new_zeros(block.neurons.outward_MD.shape[1]) if constant_D is None else constant_D


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
