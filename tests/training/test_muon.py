"""Muon beside AdamW: one update against float64 arithmetic and torch's own, dropped steps, resume, ranks."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from distill.errors import UserError
from distill.models.fsdp2 import FSDP2
from distill.training.build import build
from distill.training.muon import MuonAdamW, flops, orthogonal
from distill.training.optim import matrices_of
from distill.training.options import ModelOptions
from helpers import tiny
from helpers.two_ranks import assert_same, fit


def reference(parameter, gradients, rate, decay):
    """Steps of Muon in float64, every product spelled out."""
    weight, moment = parameter.double(), torch.zeros_like(parameter, dtype=torch.float64)
    for gradient in gradients:
        moment = 0.95 * moment + 0.05 * gradient.double()
        x = 0.95 * moment + 0.05 * gradient.double()
        if tall := x.shape[0] > x.shape[1]:
            x = x.T
        x = x / torch.linalg.matrix_norm(x)
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x - 4.7750 * (a @ x) + 2.0315 * (a @ (a @ x))
        x = x.T if tall else x
        weight = weight - rate * decay * weight - rate * 0.2 * max(x.shape) ** 0.5 * x
    return weight


def optimizer_of(parameters, rate=0.02, decay=0.1, others=()):
    groups = [{"params": list(others), "lr": rate, "weight_decay": 0.0}] if others else []
    return MuonAdamW([{"params": parameters, "lr": rate, "weight_decay": decay}], groups, (0.9, 0.95), fused=True)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_updates_are_those_of_float64_arithmetic(shape, dtype):
    start, gradients = torch.randn(shape), [torch.randn(shape) for _ in range(3)]
    parameter = start.clone().to(dtype).requires_grad_()
    optimizer = optimizer_of([parameter])
    for gradient in gradients:
        parameter.grad = gradient.to(dtype)
        optimizer.step()
    expected = reference(start, gradients, 0.02, 0.1)
    moved = (expected - start.double()).norm()
    assert (parameter.detach().double() - expected).norm() <= 1e-4 * moved


def test_experts_in_one_tensor_are_matrices_of_their_own():
    stack = torch.randn(3, 8, 12)
    assert torch.allclose(orthogonal(stack, torch.float64)[1], orthogonal(stack[1], torch.float64), atol=1e-12)
    singular = torch.linalg.svdvals(orthogonal(stack, torch.float64))
    assert singular.min() > 0.5
    assert singular.max() < 1.3


def test_in_bf16_it_is_torchs_own(monkeypatch):
    monkeypatch.setattr("distill.training.muon.products_of", lambda _: torch.bfloat16)
    start, gradients = torch.randn(16, 24), [torch.randn(16, 24) for _ in range(3)]
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    one = optimizer_of([ours])
    other = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        one.step()
        other.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_a_step_that_is_not_finite_leaves_everything_as_it_is():
    matrix, vector = torch.randn(6, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    optimizer = optimizer_of([matrix], others=[vector])

    def step(found: float, value: float) -> None:
        matrix.grad, vector.grad = torch.full((6, 4), value), torch.full((4,), value)
        optimizer.found_inf = torch.tensor(found)
        optimizer.step()

    step(0.0, 1.0)
    before = [t.detach().clone() for t in (matrix, vector, optimizer.state[matrix]["momentum_buffer"])]
    step(1.0, float("nan"))
    after = [matrix, vector, optimizer.state[matrix]["momentum_buffer"]]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    step(0.0, 1.0)
    assert not torch.equal(before[0], matrix)
    assert not torch.equal(before[1], vector)


def test_a_loaded_state_goes_on_as_the_saved_one():
    def made():
        torch.manual_seed(0)
        return torch.randn(6, 4, requires_grad=True), torch.randn(4, requires_grad=True)

    def run(pair, optimizer, steps):
        for step in steps:
            for tensor in pair:
                tensor.grad = torch.full_like(tensor, 1.0) * tensor.detach().cos() * (step + 1)
            optimizer.step()

    whole, broken = made(), made()
    optimizer = optimizer_of([whole[0]], others=[whole[1]])
    run(whole, optimizer, range(4))
    first = optimizer_of([broken[0]], others=[broken[1]])
    run(broken, first, range(2))
    second = optimizer_of([broken[0]], others=[broken[1]])
    second.load_state_dict(first.state_dict())
    run(broken, second, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(whole, broken, strict=True))


@pytest.mark.parametrize("make", [tiny.tiny_llama, tiny.tiny_qwen3_moe, tiny.tiny_gpt2])
def test_it_moves_the_decoders_matrices_alone(make):
    model = make()
    names = {id(p): name for name, p in model.named_parameters()}
    chosen = [names[id(p)] for p in matrices_of(model)]
    assert chosen
    assert not [name for name in chosen if "embed" in name or "wte" in name or "wpe" in name or "norm" in name]
    assert sum("down_proj" in name or "c_proj" in name for name in chosen) >= 2


def test_operations_are_those_of_its_products():
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        orthogonal(torch.randn(6, 10), torch.float32)
    # torch counts two operations for a multiplication with an addition, and every product whole.
    assert counter.get_total_flops() == pytest.approx(2 * 5 * (2 * 6 * 6 * 10 + 6**3))
    assert flops(torch.Size([6, 10])) == 5 * (4 * 6 * 6 * 10 + 2 * 6**3)


def test_a_run_resumes_to_the_bit(distill, config):
    config["model"] |= {"optimizer": "muon", "learning_rate": 3e-3}
    config["trainer"] |= {"max_steps": 6, "val_check_interval": 3, "gradient_clip_val": 1.0}
    saving = {"monitor": None, "save_top_k": -1, "filename": "step={step}", "auto_insert_metric_name": False}
    config["checkpoint"] = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saving}
    unbroken = distill("fit", config)
    path = Path(unbroken.trainer.log_dir, "checkpoints", "step=3.ckpt")
    resumed = distill("fit", config, "--ckpt_path", str(path))
    assert resumed.trainer.global_step == 6
    whole, again = (cli.model.state_dict() for cli in (unbroken, resumed))
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_muon_is_refused_where_matrices_are_sharded_and_where_the_moments_are_others(distill, config):
    config["trainer"] |= {"max_steps": 2}
    cli = distill("fit", config)
    config["model"]["optimizer"] = "muon"
    with pytest.raises(UserError, match=r"model.optimizer: 'muon', but the checkpoint was made with 'adamw'"):
        distill("fit", config, "--ckpt_path", str(Path(cli.trainer.log_dir, "checkpoints", "last.ckpt")))
    sharding = SimpleNamespace(strategy=FSDP2())
    with pytest.raises(UserError, match=r"model.optimizer: muon needs whole matrices"):
        build(ModelOptions("teacher", student_layers=2, optimizer="muon"), sharding)


def test_two_ranks_equal_one_process(config, tmp_path):
    config["model"] |= {"optimizer": "muon", "learning_rate": 3e-3, "routing": None}
    one = fit(config, tmp_path / "one")
    config["data"]["per_device_batch_size"] = 2
    two = fit(config, tmp_path / "two", "--trainer.devices", "2", "--trainer.strategy", "ddp")
    assert_same(one, two, same_blocks=False)
