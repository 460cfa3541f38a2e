"""What the engine launches on a CUDA device, counted on fake tensors: no wait, no copy, few kernels."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from distill.losses.engine import fused
from distill.losses.engine.divergence import KDLoss
from distill.losses.engine.loss import distillation_loss
from distill.models.head import LMHead, widens
from distill.teachers.targets import DenseTargets, top_k_targets
from helpers.fake_cuda import fake_cuda

N, V = 8192, 128_256


@pytest.fixture
def device(monkeypatch):
    """The fake device, with triton or without."""
    widens.cache_clear()
    monkeypatch.setattr(fused, "_has_triton", lambda: True)
    with fake_cuda() as (_, launches):
        assert widens("cuda")  # asked once, and that is a product too
        yield launches
    widens.cache_clear()


def case(student_vocab=V, dtype=torch.bfloat16):
    hidden, weight, teacher_hidden, teacher_weight = (
        torch.empty(*shape, device="cuda", dtype=dtype)
        for shape in ((N, 256), (student_vocab, 256), (N, 512), (V, 512))
    )
    labels = torch.zeros(N, dtype=torch.long, device="cuda")
    targets = DenseTargets(teacher_hidden, LMHead(teacher_weight))
    return hidden.requires_grad_(), LMHead(weight.requires_grad_()), labels, targets


OPTIONS = {"temperature": 2.0, "kd_weight": 0.7, "lm_weight": 0.3}


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "total_variation"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_chunk_is_one_kernel_beside_its_products(device, name, dtype):
    arguments = case(dtype=dtype)
    device.kernels.clear()
    distillation_loss(*arguments, kd=KDLoss(name), **OPTIONS, chunk_size=N)
    assert device.kernels["distill::fused_rows"] == 1
    assert sum(device.kernels[product] for product in ("mm", "addmm", "addmm_")) == 4
    assert sum(device.kernels.values()) <= 24
    assert not device.copies


def test_a_torch_that_widens_no_products_rounds_them(device, monkeypatch):
    """Sums stay in fp32 all the same; the kernel, which reads fp32 logits, is left out."""
    arguments, plain = case(), torch.addmm

    def addmm(*tensors, out_dtype=None, **options):
        if out_dtype is not None:
            raise TypeError("addmm() got an unexpected keyword argument 'out_dtype'")
        return plain(*tensors, **options)

    monkeypatch.setattr(torch, "addmm", addmm)
    widens.cache_clear()
    assert not widens("cuda")
    device.kernels.clear()
    loss = distillation_loss(*arguments, kd=KDLoss(), **OPTIONS, chunk_size=N).loss
    assert "distill::fused_rows" not in device.kernels
    assert loss.dtype == torch.float32


def test_a_budget_of_memory_keeps_the_kernels_few(device):
    arguments = case()
    device.kernels.clear()
    distillation_loss(*arguments, kd=KDLoss(), **OPTIONS)
    chunks = device.kernels["distill::fused_rows"]
    assert chunks == 5  # as often the head's gradient is read and written
    assert sum(device.kernels.values()) <= 64


def test_an_odd_vocabulary_is_an_even_product_and_a_small_one(device):
    arguments = case(student_vocab=50_257)
    device.kernels.clear()
    distillation_loss(*arguments, kd=KDLoss(), **OPTIONS, chunk_size=N)
    assert sum(device.kernels[product] for product in ("mm", "addmm", "addmm_")) == 7


def test_metrics_and_sparse_targets_take_the_plain_rows(device):
    hidden, head, labels, targets = case(student_vocab=V)
    few = (hidden[:64], head, labels[:64])
    dense = DenseTargets(targets.hidden_ND[:64], targets.head)
    device.kernels.clear()
    distillation_loss(*few, dense, kd=KDLoss(), **OPTIONS, metrics=True)
    distillation_loss(*few, top_k_targets(dense, 8, 2.0), kd=KDLoss(), **OPTIONS)
    assert device.kernels["distill::fused_rows"] == 0
    assert not device.copies


def test_without_triton_the_plain_rows_serve(device, monkeypatch):
    monkeypatch.setattr(fused, "_has_triton", lambda: False)
    hidden, head, labels, targets = case()
    dense = DenseTargets(targets.hidden_ND[:64], targets.head)
    distillation_loss(hidden[:64], head, labels[:64], dense, kd=KDLoss(), **OPTIONS)
    assert device.kernels["distill::fused_rows"] == 0


def test_a_planted_wait_is_caught(device):
    with pytest.raises(DataDependentOutputException):
        torch.ones(3, device="cuda").sum().item()


def test_a_planted_copy_is_seen(device):
    torch.zeros(3).to("cuda:0")
    assert device.copies == [(3,)]
