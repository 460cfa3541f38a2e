"""A head sharded over two ranks with uneven tokens gives the gradients of one process with all of them."""

import subprocess
import sys

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from distill.losses.engine.divergence import KDLoss
from distill.losses.engine.loss import distillation_loss
from distill.models.head import LMHead
from distill.teachers.targets import DenseTargets

N, V = 7, 9


def loss_of(rows: slice, shard: bool, factor: float) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Loss of some of the tokens, scaled by `factor`, and its leaves: hidden states, head weight, head bias."""
    generator = torch.Generator().manual_seed(0)
    hidden, teacher_hidden, weight, teacher_weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((N, 4), (N, 5), (V, 4), (V, 5), (V,))
    )
    if shard:
        mesh = init_device_mesh("cpu", (2,))
        weight, teacher_weight, bias = (distribute_tensor(x, mesh, [Shard(0)]) for x in (weight, teacher_weight, bias))
    leaves = [x.detach().requires_grad_() for x in (hidden[rows], weight, bias)]
    out = distillation_loss(
        leaves[0],
        LMHead(leaves[1], leaves[2], softcap=5.0),
        (torch.arange(N) % V)[rows],
        DenseTargets(teacher_hidden[rows], LMHead(teacher_weight)),
        kd=KDLoss(),
        temperature=2.0,
        kd_weight=0.7 / N * factor,
        lm_weight=0.3 / N * factor,
        chunk_size=2,
    )
    return out.loss, leaves


def run_rank(rank: int, folder: str) -> list[torch.Tensor]:
    """One rank of two, rank 0 with 5 tokens and rank 1 with 2: gradients, the head's gathered."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        loss, leaves = loss_of(slice(0, 5) if rank == 0 else slice(5, N), shard=True, factor=2)  # of W / N
        loss.backward()
        assert all(isinstance(x.grad, DTensor) and x.grad.placements == (Shard(0),) for x in leaves[1:])
        return [x.grad.full_tensor() if isinstance(x.grad, DTensor) else x.grad for x in leaves]
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_gradients_are_those_of_one_process(tmp_path):
    other = subprocess.Popen([sys.executable, __file__, str(tmp_path)])
    hidden, weight, bias = run_rank(0, str(tmp_path))
    assert other.wait(120) == 0
    loss, leaves = loss_of(slice(0, N), shard=False, factor=1)
    loss.backward()
    torch.testing.assert_close(weight, leaves[1].grad, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(bias, leaves[2].grad, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(hidden / 2, leaves[0].grad[:5], rtol=1e-12, atol=1e-14)  # averaging is the strategy's


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_rank(1, sys.argv[1])
