"""The progress bar: total loss, active components and the learning rate, which is never rounded to zero.

Its figures are read from the device at most once a second, so that a bar does not make every step wait for a copy; the
price is that between two readings it shows figures that are up to a second old.
"""

import time
from typing import Any, final

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar


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

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.outputs = outputs
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def figures(self) -> dict[str, float]:
        """Total and active components of the last micro-batch on this rank."""
        if self.outputs is None:
            return {}
        values = {"loss": self.outputs["total"], **self.outputs["breakdown"].scaled}
        return {name: float(value) for name, value in values.items()}

    def get_metrics(self, trainer: L.Trainer, pl_module: Any) -> dict[str, Any]:
        if trainer.training and time.monotonic() > self.read_at + 1.0:
            self.shown = {name: f"{value:.4f}" for name, value in self.figures().items()}
            if trainer.optimizers:
                self.shown["lr"] = f"{trainer.optimizers[0].param_groups[0]['lr']:.3e}"
            self.read_at = time.monotonic()
        return self.shown
