"""A line every so often where no terminal is there for the bar: a pipe, a file, a CI job.

Reads: the total that `training_step` returned and the batch's counts, on the host but for one copy a line. Writes
nothing: the line goes to stdout alone, as the bar does.
"""

import time
from datetime import timedelta
from typing import Any, final

import lightning as L
from lightning.pytorch.callbacks import Callback
from rich import get_console

from distill.batch import Batch
from distill.errors import UserError
from distill.training.callbacks.text import emit
from distill.training.horizon import horizon_of


@final
class ProgressLines(Callback):
    """Prints step, loss, tokens per second and time left on rank zero, outside terminals.

    Tokens per second are those of all ranks since the line before, without validations; the time left is what the steps
    since the start, with all that lay between them, let expect.

    Args:
        every_seconds: between two lines.

    Raises:
        UserError: an interval that is not above zero.
    """

    def __init__(self, every_seconds: float = 30.0) -> None:
        if not every_seconds > 0:
            raise UserError(f"progress_lines.every_seconds: {every_seconds} must be above 0 (progress_lines null: off)")
        self.every_seconds = every_seconds
        self.horizon = 0
        self.began = self.printed = self.measured = time.monotonic()
        self.steps = self.tokens = 0.0
        self.away = 0.0  # when the validation under way began

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.horizon = horizon_of(trainer)
        self.printed = time.monotonic()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.began = self.measured = time.monotonic()
        self.steps = self.tokens = 0.0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        share = trainer.world_size / batch.units["micro_batches"]  # of the step, on every rank at one time
        self.steps += share
        self.tokens += share * batch.units["tokens"]
        if not self._is_due(trainer):
            return
        now = time.monotonic()
        rate = self.tokens / max(now - self.measured, 1e-9)
        left = (self.horizon - trainer.global_step) * (now - self.began) / self.steps
        self._print(
            trainer,
            f"loss {float(outputs['total']):.4f}, {rate:,.0f} tokens per second, {timedelta(seconds=round(left))} left",
        )
        self.measured, self.tokens = now, 0.0

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.away = time.monotonic()

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.state.fn == "fit":
            batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
            self.tell(trainer, f"validating: batch {batch_idx + 1} of {batches[dataloader_idx]}")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.measured += time.monotonic() - self.away

    def tell(self, trainer: L.Trainer, what: str) -> None:
        """Prints what the run does between two steps, where a line is due."""
        if self._is_due(trainer):
            self._print(trainer, what)

    def _is_due(self, trainer: L.Trainer) -> bool:
        late = time.monotonic() - self.printed >= self.every_seconds
        return late and trainer.is_global_zero and not get_console().is_terminal

    def _print(self, trainer: L.Trainer, what: str) -> None:
        emit(trainer, None, f"Step {trainer.global_step} of {self.horizon}, {what}")
        self.printed = time.monotonic()
