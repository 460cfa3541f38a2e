"""TRAIN DEBUG: four figures of one loss from four different places. They agree, or something is wrong.

Reads: the bar's figure, the breakdown and the total that `training_step` returned, and the tensor that Lightning hands
to `backward`. Writes nothing. A batch that is printed waits for a few device-to-host copies.
"""

from typing import Any, final

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from distill.batch import Batch
from distill.errors import UserError
from distill.training.callbacks.progress import ProgressBar
from distill.training.callbacks.text import block, emit, run_directory
from distill.training.module import distilled


def unscaled(trainer: L.Trainer, loss: Tensor) -> Tensor:
    """The loss handed to `backward`, times the accumulation and without the fp16 scaler's factor."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    factor = 1.0 if scaler is None else scaler.scale(torch.ones_like(loss))
    return loss.detach() * trainer.accumulate_grad_batches / factor


@final
class TrainDebug(Callback):
    """Prints the parts of a micro-batch's loss on rank zero, with components of weight above zero only.

    Args:
        every_n_batches: distance in batches of the epoch.
    """

    def __init__(self, every_n_batches: int = 100) -> None:
        if every_n_batches < 1:
            raise UserError(f"train_debug.every_n_batches: {every_n_batches}: give at least 1 (train_debug null = off)")
        self.every_n_batches = every_n_batches
        self.directory: str | None = None
        self.back_propagated: Tensor | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.directory = run_directory(trainer)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        self.back_propagated = unscaled(trainer, loss)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        module = distilled(pl_module)
        if batch_idx % self.every_n_batches != 0 or not trainer.is_global_zero:
            return
        assert self.back_propagated is not None
        bar = trainer.progress_bar_callback
        if isinstance(bar, ProgressBar):
            bar.read_at = 0.0  # this batch's figures, however recent the last reading
            shown = float(bar.get_metrics(trainer, module)["loss"])
        else:
            shown = float(outputs["total"])
        scaled = {name: float(value) for name, value in outputs["breakdown"].scaled.items()}
        lines = [
            f"  Progress bar loss: {shown:.4f}",
            "",
            "  Raw loss components:",
            *(f"    {name}: {value:.4f}" for name, value in scaled.items()),
            "",
            f"  Sum of components: {sum(scaled.values()):.4f}",
            f"  Total loss (outputs['loss']): {float(outputs['total']):.4f}",
            f"  Scaled for grad accum: {float(self.back_propagated):.4f}",
        ]
        heading = f"[TRAIN DEBUG] Step {module.curriculum.step}, Batch {batch_idx}"
        emit(trainer, self.directory, block(heading, lines))
