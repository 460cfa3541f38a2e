"""A run broken off at any point that a checkpoint is written at goes on to the unbroken run's bits."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from distill.commands.quiet import quieten
from distill.data.datamodule import DistillationDataModule
from distill.data.order.loader import ResumableLoader
from distill.data.order.sampler import StepSampler
from distill.errors import UserError
from distill.losses.routing import Routing
from distill.training.callbacks.curriculum import Curriculum
from distill.training.callbacks.last_checkpoint import LastCheckpoint
from distill.training.callbacks.resume import ExactResume
from distill.training.module import DistillationModule
from distill.training.trainer import DistillTrainer

STUDENT = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_dropout": 0.3,  # so that a run depends on random numbers
}


@pytest.fixture
def fit(assets, tmp_path):
    """Fits without the command line; a module whose buffer counts batches, and what each validation measured."""

    def call(folder: str, ckpt_path: Path | None = None, workers: int = 0, **options):
        quieten()
        torch.manual_seed(3)
        np.random.seed(3)
        module = DistillationModule(
            str(assets / "llama"),
            student_config=STUDENT,
            routing=Routing(teacher_layers=1, num_experts=4),
            learning_rate=1e-2,
        )
        module.register_buffer("queue", torch.zeros(3))
        data = DistillationDataModule(
            str(assets / "text.txt"),
            sequence_length=32,
            per_device_batch_size=2,
            max_sequences=14,  # seven micro-batches
            max_validation_sequences=4,
            num_workers=workers,
        )
        Path(tmp_path, folder).mkdir(exist_ok=True)
        trainer = DistillTrainer(
            default_root_dir=str(tmp_path / folder),
            logger=False,
            callbacks=[Curriculum(), Watch(), ExactResume(), LastCheckpoint(every_minutes=None)],
            accelerator="cpu",
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=1,
            **({"max_epochs": 2} | options),
        )
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
        return module

    return call


class Watch(Callback):
    """Feeds the buffer, draws from every generator as a loss might, and notes what validations measured."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.queue = pl_module.queue * 0.9 + torch.rand(3) + float(np.random.rand())

    def on_fit_start(self, trainer, pl_module):
        pl_module.seen = []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            pl_module.seen.append((trainer.global_step, float(trainer.callback_metrics["val/kl_div_T1"])))


@pytest.fixture
def everywhere(monkeypatch):
    """Makes a run write a checkpoint wherever it could stop, without stopping; their paths, in order."""
    points: list[Path] = []

    def save(self, trainer):
        if not self.recording:
            return
        where = sys._getframe(1).f_code.co_name  # the hook that would have stopped
        path = self.directory / f"{len(points):02d}_step{trainer.global_step}_{where}.ckpt"
        trainer.save_checkpoint(path)
        points.append(path)

    monkeypatch.setattr(LastCheckpoint, "recording", True, raising=False)
    monkeypatch.setattr(LastCheckpoint, "_agree", lambda self, trainer: setattr(self, "stop", 15))
    monkeypatch.setattr(LastCheckpoint, "_stop", lambda self, trainer: None)
    monkeypatch.setattr(LastCheckpoint, "_save", save)
    return points


LAST = {"accumulate_grad_batches": 3}  # validation at the epoch's end, after a window of one micro-batch
WITHIN = {"accumulate_grad_batches": 2, "val_check_interval": 4}  # none at the epoch's end
ACROSS = {"accumulate_grad_batches": 3, "val_check_interval": 5, "check_val_every_n_epoch": None}  # windows and epochs
EPOCHS, STEPS = {"max_epochs": 2}, {"max_epochs": None, "max_steps": 5}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(LAST | EPOCHS, id="validation last, epochs", marks=pytest.mark.slow),
        pytest.param(WITHIN | EPOCHS, id="validation within, epochs", marks=pytest.mark.slow),
        pytest.param(LAST | STEPS, id="validation last, steps"),
        pytest.param(WITHIN | STEPS, id="validation within, steps", marks=pytest.mark.slow),
        pytest.param(ACROSS | {"max_epochs": None, "max_steps": 8}, id="validation across epochs"),
        pytest.param(WITHIN | STEPS | {"workers": 2}, id="with workers", marks=pytest.mark.slow),
    ],
)
def test_from_every_point(fit, everywhere, monkeypatch, options):
    unbroken = fit("unbroken", **options)
    monkeypatch.setattr(LastCheckpoint, "recording", False)
    assert len(everywhere) >= 7
    hooks = {path.stem.split("_", 2)[2] for path in everywhere}
    within = {"on_validation_end"} if "val_check_interval" in options else set()  # else the epoch's end comes next
    assert hooks == {f"on_{hook}_end" for hook in ("train_batch", "validation_batch", "train_epoch")} | within
    for path in everywhere[:-1]:
        resumed = fit("resumed", ckpt_path=path, **options)
        for name, value in unbroken.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], value), (path.name, name)
        _, step, hook = path.stem.split("_", 2)
        again = hook == "on_validation_batch_end"  # that validation begins anew
        rest = [note for note in unbroken.seen if note[0] >= int(step[4:]) + (not again)]
        assert resumed.seen == rest, path.name


def test_a_validation_waits_for_the_end_of_its_window(fit):
    """Seven micro-batches an epoch in windows of 3, 3 and 1, a validation every five micro-batches, counted on."""
    seen = fit("run", **ACROSS, max_epochs=None, max_steps=9).seen
    due_after = {5: 2, 10: 4, 15: 7, 20: 8}  # micro-batches: optimizer steps at the end of that window
    assert [step for step, _ in seen] == [*due_after.values(), 9]


@pytest.mark.parametrize("mine", [None, "version_1/checkpoints/last.ckpt"])
def test_nodes_that_have_found_different_checkpoints_are_refused(mine):
    strategy = SimpleNamespace(broadcast=lambda path: "version_0/checkpoints/last.ckpt")
    trainer = SimpleNamespace(ckpt_path=mine, strategy=strategy, global_rank=3)
    with pytest.raises(
        UserError, match=f"ckpt_path: {mine} in process 3, version_0/checkpoints/last.ckpt in the first"
    ):
        ExactResume().setup(trainer, None, "fit")


@pytest.mark.parametrize(("devices", "batch", "exact"), [(1, 4, True), (4, 1, True), (2, 4, False), (1, 2, False)])
def test_another_number_of_devices_deals_out_the_same_rows_or_is_refused(devices, batch, exact):
    """A place within an epoch of two ranks with two rows each; rows of a micro-batch are what must stay the same."""

    def loader(devices: int, batch: int) -> ResumableLoader:
        progress = SimpleNamespace(processed=3)
        loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(current=progress)))
        trainer = SimpleNamespace(fit_loop=loop, num_training_batches=8, accumulate_grad_batches=1)
        sampler = StepSampler({"tokens": np.arange(32)}, batch, world_size=devices)
        layout = {"data.per_device_batch_size": batch, "trainer.devices": devices}
        return ResumableLoader(range(32), sampler, trainer, layout)

    state = loader(2, 2).state_dict()
    now = loader(devices, batch)
    if not exact:
        with pytest.raises(UserError, match=r"but the checkpoint stands within an epoch with 2; resume with the same"):
            now.load_state_dict(state)
        return
    now.load_state_dict(state)
    assert now._start == 3
    dealt = {}
    for world_size, rows in ((2, 2), (devices, batch)):
        ranks = [StepSampler({"tokens": np.arange(32)}, rows, 0, rank, world_size) for rank in range(world_size)]
        for sampler in ranks:
            sampler.start = 3
        dealt[world_size] = [[row for micro in batch for row in micro.indices] for batch in zip(*ranks, strict=True)]
    assert dealt[2] == dealt[devices]
