"""The progress bar: total loss, active components and the learning rate, which is never rounded to zero."""

from typing import Any, final

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar


@final
class ProgressBar(RichProgressBar):
    """Lightning's rich bar with `lr` as `.3e` and without the run's version number."""

    def __init__(self, refresh_rate: int = 1, leave: bool = False) -> None:
        super().__init__(refresh_rate=refresh_rate, leave=leave)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        metrics: dict[str, Any] = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        if trainer.optimizers:
            metrics["lr"] = f"{trainer.optimizers[0].param_groups[0]['lr']:.3e}"
        return metrics
