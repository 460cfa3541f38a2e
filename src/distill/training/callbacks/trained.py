"""A fit that has trained nothing does not end as if it had: no step, no success.

Reads: `trainer.global_step` and the horizon. Writes nothing.
"""

from typing import Any, final

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from distill.batch import Batch
from distill.errors import UserError
from distill.training.horizon import horizon_of


@final
class SomethingTrained(Callback):
    """Refuses a fit that ended before its first step, but for a run that was finished when it was resumed."""

    def __init__(self) -> None:
        self.trained = False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.trained = True

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Judges.

        Raises:
            UserError: nothing was trained, and there was something to train.
        """
        step, horizon = trainer.global_step, horizon_of(trainer)
        if step >= horizon:
            if not self.trained:
                rank_zero_info(f"Nothing left to train: the run was finished, at step {step} of {horizon}.")
        elif not self.trained:
            raise UserError(
                f"trainer: nothing was trained, at step {step} of {horizon}: trainer.max_time was used up, a callback "
                "stopped the run before its first step, or there were no rows; give more time or data"
            )
