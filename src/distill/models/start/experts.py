"""A MoE block that a student keeps, made to stand for the layers dropped behind it: what its experts write is refitted.

Each expert in turn, on the tokens that the student routes to it, gets the ridge least-squares fit to what the others
leave over, twice round; so no Gram matrix is larger than one expert's, whatever their number.

Shapes: N tokens, n tokens of an expert, D width, E experts.
"""

import torch
from torch import Tensor

from distill.models.start.ffn import Block, write_expert
from distill.models.start.neurons import Task, fitted

SWEEPS = 2
FEWEST = 16  # tokens, below which an expert stays as it is


@torch.no_grad()
def refit_experts(block: Block, task: Task, gates_NE: Tensor) -> None:
    """Overwrites what the experts of a block write.

    Args:
        block: of the student, as views of its weights.
        task: what the block reads and should write.
        gates_NE: of the student's own routing on these tokens, zero where it did not route.
    """
    sets = block.expert_M.unique().tolist()
    output_ND = torch.zeros_like(task.target_ND)
    for expert in sets:
        rows_n, gate_n1 = _routed(expert, gates_NE)
        output_ND[rows_n] += gate_n1 * block.of(expert).output(task.states_ND[rows_n])
    for _ in range(SWEEPS):
        for expert in sets:
            rows_n, gate_n1 = _routed(expert, gates_NE)
            if len(rows_n) < FEWEST:
                continue
            neurons = block.of(expert)
            output_ND[rows_n] -= gate_n1 * neurons.output(task.states_ND[rows_n])
            left_nD = (task.target_ND[rows_n] - output_ND[rows_n]) / gate_n1
            own = Task(task.states_ND[rows_n], left_nD, task.weight_N[rows_n] * gate_n1[:, 0] ** 2)
            refitted = fitted(neurons, own, neurons.constant_D is not None)
            write_expert(block, expert, refitted)
            output_ND[rows_n] += gate_n1 * refitted.output(task.states_ND[rows_n])


def _routed(expert: int, gates_NE: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens of an expert and their gates (n, 1); shared ones, -1, see all."""
    if expert < 0:
        return torch.arange(len(gates_NE), device=gates_NE.device), gates_NE.new_ones(len(gates_NE), 1)
    rows_n = gates_NE[:, expert].nonzero()[:, 0]
    return rows_n, gates_NE[rows_n, expert, None]
