"""A whole fit on a fake CUDA device in each precision: Lightning's loop, our callbacks, optimizer and validation.

Stubbed are what cannot run without a device: the backward pass (gradients appear, of zeros), Lightning's own log and
the reading of the audit's figures, which wait for a copy made long before, and the peak of memory.
"""

from dataclasses import replace

import lightning as L
import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import _disable_current_modes

from distill.commands.quiet import quieten
from distill.losses.attention import AttentionTransfer
from distill.losses.contrastive import Contrastive
from distill.losses.engine import fused
from distill.losses.engine.metrics import DistillationMetrics
from distill.losses.layerwise import Layerwise
from distill.losses.routing import Routing
from distill.models.head import widens
from distill.teachers.online import OnlineTeacher
from distill.training import module as training_module
from distill.training.build import build
from distill.training.callbacks.audit import LossAudit
from distill.training.callbacks.curriculum import Curriculum
from distill.training.module import DistillationModule
from distill.training.trainer import DistillTrainer
from helpers.fake_cuda import fake_cuda, onto
from helpers.packed import make_batch

STEPS = 4
OTHERS = ("32-true", "16-mixed", "bf16-true")
# Kernels of a training step with all nine losses, forward passes and the engine's gradients, of two and four layers.
KERNELS = {"32-true": 990, "bf16-mixed": 1115, "16-mixed": 1115, "bf16-true": 1095}
# What reads the device: lengths of loaders once, sums at a validation's end, and the fp16 scaler, once a step.
ALLOWED = {"_maybe_opt_step": 0.0, "has_len_all_ranks": False, "compute": False}


class AnyAccelerator(CPUAccelerator):
    def setup_device(self, device):
        pass


class OnCuda(SingleDeviceStrategy):
    """Runs on the fake device with an accelerator that asks no driver."""

    def model_to_device(self):
        pass  # they are there

    def teardown(self):
        pass  # and stay


def plugin(precision):
    if precision.endswith("mixed"):
        scaler = torch.amp.GradScaler("cuda") if precision == "16-mixed" else None
        return MixedPrecision(precision, "cuda", scaler)
    return HalfPrecision(precision) if precision == "bf16-true" else Precision()


class Loader:
    """Hands out batches; torch's own loader draws seeds, which fakes do not have."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


class Batches(L.LightningDataModule):
    """The same packed rows again and again, with counts for a step of one micro-batch."""

    def __init__(self):
        super().__init__()
        batch = make_batch([[5, 9, 3], [12, 4]], 20)
        documents = batch.student.documents
        tokens = replace(batch.student, starts=documents.starts, longest=documents.longest)
        self.batch = replace(batch, student=tokens, teacher=tokens, bytes=40)

    def train_dataloader(self):
        return Loader([self.batch] * STEPS)

    def val_dataloader(self):
        return Loader([self.batch])


@pytest.fixture
def run(assets, tmp_path, monkeypatch):
    """Fits with all nine losses; returns what each micro-batch launched."""
    quieten()
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)  # for the scaler
    monkeypatch.setattr(fused, "_has_triton", lambda: True)
    monkeypatch.setattr(LossAudit, "_read", lambda self: self.pending.clear())
    monkeypatch.setattr("distill.training.step_sums.peak_memory", lambda device: 0)
    monkeypatch.setattr(OnlineTeacher, "to", lambda self, device: None)  # it is there, and fakes cannot be swapped
    monkeypatch.setattr(DistillationModule, "log", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(DistillationModule, "log_dict", lambda self, *args, **kwargs: None)

    def metrics():  # torchmetrics copies its states, which fakes do not have
        with _disable_current_modes():
            return DistillationMetrics()

    monkeypatch.setattr("distill.training.validation_sums.DistillationMetrics", metrics)

    def backward(self, loss):
        for parameter in self.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)

    monkeypatch.setattr(DistillationModule, "backward", backward)

    def fit(precision):
        module = DistillationModule(
            str(assets / "llama"),
            student_layers=2,
            student_fit=None,
            routing=Routing(teacher_layers=2, tau=1.0, num_experts=4),
            attention=AttentionTransfer(),
            layerwise=Layerwise(),
            contrastive=Contrastive(queue_size=8),
        )
        ramp = dict.fromkeys(("kd", "feature", "attention", "layerwise", "contrastive", "lm"), 0.5)
        strategy = OnCuda(torch.device("cuda:0"), accelerator=AnyAccelerator(), precision_plugin=plugin(precision))
        trainer = DistillTrainer(
            strategy=strategy, logger=False, callbacks=[Curriculum(**ramp), LossAudit()], max_steps=STEPS,
            log_every_n_steps=2, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            num_sanity_val_steps=0, gradient_clip_val=1.0, barebones=False, default_root_dir=tmp_path,
        )  # fmt: skip
        student, source, made = build(module.options, trainer)
        data = Batches()
        widens.cache_clear()
        with fake_cuda(ALLOWED) as (mode, launches):
            widens("cuda")
            for part in (student, source.model, *(a for a in module.auxiliaries)):
                onto(part, mode)
            module.training_step = counting(module.training_step, launches, steps := [])
            monkeypatch.setattr(training_module, "build", lambda options, trainer: (student, source, made))
            trainer.fit(module, data)
        widens.cache_clear()
        assert trainer.global_step == STEPS
        return steps, launches, len(data.batch.student.tensors())

    return fit


def counting(step, launches, steps):
    """Notes what each training step starts with, and launches, its logging included: copies, kernels."""

    def counted(*args):
        before = len(launches.copies), launches.blocking, launches.kernels.total()
        out = step(*args)
        steps.append((*before[:2], len(launches.copies) - before[0], launches.kernels.total() - before[2]))
        return out

    return counted


@pytest.mark.parametrize(
    "precision",
    ["bf16-mixed", *(pytest.param(other, marks=pytest.mark.slow) for other in OTHERS)],
)
def test_a_fit_copies_batches_and_figures_alone_and_waits_for_nothing_of_ours(run, precision):
    steps, launches, of_a_batch = run(precision)
    starts, waited, logged, kernels = zip(*steps, strict=True)
    assert logged == (0, 1, 0, 1)
    assert max(kernels) <= KERNELS[precision]
    audited = 1  # a copy that nobody waits for
    assert starts[-1] - starts[0] == (STEPS - 1) * (of_a_batch + audited) + sum(logged[:-1])
    assert waited[-1] - waited[0] == sum(logged[:-1])  # batches are on their way while the host goes on
    lengths = {"has_len_all_ranks": 6}  # before the first step
    overflow = {"_maybe_opt_step": STEPS} if precision == "16-mixed" else {}
    assert dict(launches.waits) == lengths | overflow | {"compute": launches.waits["compute"]}
    assert launches.waits["compute"] <= 4  # counts of a validation, which a device hands over at once


def test_a_planted_wait_is_caught(run, monkeypatch):
    def waiting(self):
        if self.trainer.global_step == 2 and self.student.get_output_embeddings().weight.grad.norm() > 1:
            raise AssertionError

    monkeypatch.setattr(DistillationModule, "on_after_backward", waiting)
    with pytest.raises(DataDependentOutputException):
        run("bf16-mixed")
