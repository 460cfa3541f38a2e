"""The progress bar: total loss, active components and the learning rate, which is never rounded to zero.

It lives in terminals alone, and only while there is something to wait for: what stays on the screen are blocks, [Eval]
lines and the closing table, the same as in a pipe or a file. Component names lose their prefix `routing_` and `_loss`
so that a line holds more of them. Its figures are read from the device at most once a second, so that a bar does not
make every step wait for a copy; between two readings they are up to a second old.
"""

import time
from typing import Any, final

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from rich import get_console

from distill.batch import Batch


@final
class ProgressBar(RichProgressBar):
    """Lightning's rich bar with the loss that is optimised, its parts, and `lr` as `.3e`.

    Reads: the breakdown and total that `training_step` returned, the optimizer's learning rate.
    """

    def __init__(self, refresh_rate: int = 1, leave: bool = False) -> None:
        super().__init__(refresh_rate=refresh_rate, leave=leave)
        self.outputs: Any = None
        self.shown: dict[str, Any] = {}
        self.read_at = 0.0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if not get_console().is_terminal:
            self.disable()

    def _init_progress(self, trainer: L.Trainer) -> None:
        super()._init_progress(trainer)
        if self.progress is not None:
            self.progress.live.transient = True  # wiped when it stops

    @property
    def total_train_batches(self) -> int | float:
        """Micro-batches of this epoch up to the run's last step; Lightning's forgets what a resumed run has done."""
        trainer = self.trainer
        epoch: int | float = trainer.num_training_batches
        if trainer.max_steps < 0:
            return epoch
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready % max(1, epoch)
        return min(epoch, done + (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop_progress()  # before the closing table, not after it

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == "validate":
            self._stop_progress()

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_test_end(trainer, pl_module)
        self._stop_progress()

    def _get_train_description(self, current_epoch: int) -> str:
        epochs = self.trainer.max_epochs
        return f"Epoch {current_epoch + 1}" + (f"/{epochs}" if epochs is not None and epochs > 0 else "")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.outputs = outputs
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def figures(self) -> dict[str, float]:
        """Total and active components of the last micro-batch on this rank."""
        if self.outputs is None:
            return {}
        values = {"loss": self.outputs["total"], **self.outputs["breakdown"].scaled}
        return {name: float(value) for name, value in values.items()}

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        if trainer.training and time.monotonic() > self.read_at + 1.0:
            figures = self.figures().items()
            self.shown = {
                name.removeprefix("routing_").removesuffix("_loss"): f"{value:.4f}" for name, value in figures
            }
            if trainer.optimizers:
                self.shown["lr"] = f"{trainer.optimizers[0].param_groups[0]['lr']:.3e}"
            self.read_at = time.monotonic()
        return self.shown
