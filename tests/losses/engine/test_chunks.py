"""Chunks: the memory of one, their size, and that nothing waits for a value."""

import pytest
import torch

from distill.losses.engine.divergence import KDLoss
from distill.losses.engine.loss import distillation_loss
from distill.teachers.targets import DenseTargets
from helpers.naive_loss import N, V, make_case, make_head, sparse


def test_memory_is_that_of_one_chunk(monkeypatch):
    """No tensor as large as [N, V] is made; the largest are the logits of a chunk and the head's gradient."""
    from torch.utils._python_dispatch import TorchDispatchMode

    tokens, vocab, chunk = 64, 500, 8
    hidden = torch.randn(tokens, 4, requires_grad=True)
    head, teacher = make_head(4, vocab, dtype=torch.float32), make_head(5, vocab, dtype=torch.float32)
    targets = DenseTargets(torch.randn(tokens, 5), teacher)

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.untyped_storage().nbytes() // 4)
            return result

    with Largest() as largest:
        loss = distillation_loss(
            hidden, head, torch.zeros(tokens, dtype=torch.long), targets, kd=KDLoss("jsd"), temperature=2.0,
            kd_weight=1.0, lm_weight=1.0, chunk_size=chunk, metrics=True,
        ).loss  # fmt: skip
        loss.backward()
    assert largest.elements <= chunk * vocab


@pytest.mark.parametrize("kind", ["dense", "top-k", "sampled"])
def test_nothing_waits_for_a_value(kind):
    """Fake tensors have no values: anything that read one, as a host sync would, raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        hidden, head, labels, dense = make_case("all", dtype=torch.bfloat16)
        targets = sparse(kind, dense, 2.0)
        got = distillation_loss(
            hidden, head, labels, targets, kd=KDLoss(), temperature=2.0, kd_weight=0.7, lm_weight=0.3, metrics=True
        )
        got.loss.backward()
        assert head.weight.grad.shape == head.weight.shape
        assert got.stats.student_nll.dtype == torch.float64


def test_default_chunk_follows_the_memory_budget(monkeypatch):
    seen = []
    from distill.losses.engine import walk

    original = walk._Side.allocate
    monkeypatch.setattr(walk._Side, "allocate", lambda self, tokens: (seen.append(tokens), original(self, tokens)))
    hidden, head, labels, targets = make_case()
    options = {"kd": KDLoss(), "temperature": 2.0, "kd_weight": 0.7, "lm_weight": 0.3}
    monkeypatch.setattr(walk, "_BLOCK_BYTES_CPU", V * 8)
    monkeypatch.setattr(walk, "_CHUNK_BYTES_CPU", (4 * 2 + walk.BUFFERS) * V * 8)
    distillation_loss(hidden, head, labels, targets, **options)
    assert seen == [4, 4]
    monkeypatch.setattr(walk, "_CHUNK_BYTES_CPU", 1)
    distillation_loss(hidden, head, labels, targets, **options)
    assert seen[2:] == [1, 1]


def test_nothing_wanted_costs_nothing():
    """Not even the head is read, which a run on hidden states alone may have sharded."""
    hidden = torch.randn(N, 4, requires_grad=True)
    nothing = distillation_loss(hidden, None, torch.zeros(N, dtype=torch.long), None)
    assert (nothing.loss.item(), nothing.kd_sum, nothing.lm_sum, nothing.stats) == (0.0, None, None, None)


@pytest.mark.parametrize("vocab", [32_000, 151_936, 262_144])
@pytest.mark.parametrize(
    ("device", "threads", "budget", "share"),
    [("cpu", 1, 256 << 20, 0.95), ("cpu", 64, 256 << 20, 0.7), ("meta", 1, 2 << 30, 0.75)],
)
def test_a_budget_goes_to_the_chunk_on_any_device(device, threads, budget, share, vocab, monkeypatch):
    """Buffers of the blocks take a few per cent on a CPU of few threads, and about a quarter elsewhere."""
    from distill.losses.engine import walk

    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    chunk, block = walk.sizes([vocab, vocab], torch.empty(100_000, 0, device=device), torch.float32, None)
    logits, buffers = 2 * chunk * vocab * 4, walk.BUFFERS * block * vocab * 4
    assert share * budget <= logits <= logits + buffers <= budget
    assert device != "cpu" or block >= min(threads, 8)  # each thread has a row, or at least eight of them
