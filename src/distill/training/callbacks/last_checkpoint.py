"""The checkpoint to go on from: `checkpoints/last.ckpt`, never far behind, with the one before it as `previous.ckpt`.

It is written after every validation, every ten minutes between two of them, at the end, and when a signal, `max_time`
or a callback asks the run to stop; always where a step is complete, so that the resumed run equals the unbroken one.
That is two files of full state on disk, beside the best one that `checkpoint` keeps.

Reads: the trainer's progress, signals. Writes: the two files; flushes the loggers.
"""

import signal
import sys
import time
from pathlib import Path
from typing import Any, final

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from distill.batch import Batch
from distill.checkpoints.files import remove, sync
from distill.errors import UserError
from distill.stop_signals import Agreement, StopSignals
from distill.training.callbacks.text import run_directory
from distill.training.horizon import horizon_of
from distill.training.lightning_internals import (
    averaged,
    epoch_ends,
    more_follows,
    step_is_whole,
    stops_here,
    take_sigterm,
)


@final
class LastCheckpoint(Checkpoint):
    """Keeps the newest state of a run on disk.

    Args:
        every_minutes: between two validations; null = only after validations and by steps.
        every_n_steps: in optimizer steps, on top; null = by the clock alone.

    Raises:
        UserError: an interval that is not above zero.
    """

    def __init__(self, every_minutes: float | None = 10.0, every_n_steps: int | None = None) -> None:
        for key, value in (("every_minutes", every_minutes), ("every_n_steps", every_n_steps)):
            if value is not None and value <= 0:
                raise UserError(f"last_checkpoint.{key}: {value} must be above 0 (null = not at all)")
        self.every_minutes, self.every_n_steps = every_minutes, every_n_steps
        self.directory = Path()
        self.signals = StopSignals()
        self.agreement: Agreement | None = None
        self.horizon = self.saved_step = 0
        self.saved_at = 0.0
        self.stop = self.due = self.end = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.directory = Path(run_directory(trainer) or trainer.default_root_dir, "checkpoints")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.agreement, self.horizon = Agreement(), horizon_of(trainer)
        self.saved_step, self.saved_at = trainer.global_step, time.monotonic()
        if take_sigterm(trainer):
            self.signals.received = signal.SIGTERM
        self.signals.install()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if not step_is_whole(trainer):
            return
        self._agree(trainer)
        trainer.should_stop = bool(self.end)
        if self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0:
            self.due = 1
        if more_follows(trainer):
            return
        if self.stop or self.due or stops_here(trainer):
            self._save(trainer)
        self._stop(trainer)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Does not wait for the end of a long validation, which a resumed run begins again."""
        if averaged(trainer) is not None:
            return  # which validates other weights, so that a checkpoint here would hold the wrong ones
        if self._is_fitting(trainer) and trainer.global_step < self.horizon:  # a finished run won't validate again
            self._agree(trainer)
            if self.stop:
                self._save(trainer)
            self._stop(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._is_fitting(trainer) or trainer.global_step >= self.horizon:  # the last one: at the epoch's end
            return
        trainer.should_stop = trainer.strategy.reduce_boolean_decision(trainer.should_stop, all=False)
        if epoch_ends(trainer) or stops_here(trainer):
            self.due = 1  # at the epoch's end, when the other callbacks have made of this validation what they do
            return
        self._save(trainer)
        self._stop(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.stop or self.due or stops_here(trainer) or trainer.global_step >= self.horizon:
            self._save(trainer)
        self._stop(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.agreement is not None:
            self.agreement.finish()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.signals.restore()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.signals.restore()

    def _is_fitting(self, trainer: L.Trainer) -> bool:
        return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking

    def _agree(self, trainer: L.Trainer) -> None:
        """Takes over what the ranks have agreed on: a signal to stop, whether a checkpoint is due by the clock, and
        whether a callback of any rank has asked for the end, which no rank may follow before all of them know.
        """
        assert self.agreement is not None
        late = self.every_minutes is not None and time.monotonic() - self.saved_at > 60 * self.every_minutes
        stop, due, end = self.agreement(self.signals.received, int(late), int(trainer.should_stop))
        self.stop, self.due, self.end = max(self.stop, stop), max(self.due, due), max(self.end, end)

    def _save(self, trainer: L.Trainer) -> None:
        """Writes `last.ckpt` and keeps the one before, each moved to its name when it is complete."""
        if trainer.global_step != self.saved_step and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            new, last, previous = (self.directory / f"{name}.ckpt" for name in ("new", "last", "previous"))
            trainer.save_checkpoint(new, weights_only=False)
            if trainer.is_global_zero:
                if last.exists():
                    remove(previous)
                    last.rename(previous)
                new.rename(last)
                sync(self.directory)
                for logger in trainer.loggers:
                    logger.save()
            trainer.strategy.barrier("last_checkpoint")
        self.saved_step, self.saved_at, self.due = trainer.global_step, time.monotonic(), 0

    def _stop(self, trainer: L.Trainer) -> None:
        if not self.stop or trainer.global_step >= self.horizon:
            return
        number = signal.Signals(self.stop)
        if self.agreement is not None:
            self.agreement.finish()
        if trainer.is_global_zero:
            print(
                f"Stopped by {number.name} at step {trainer.global_step}; --ckpt_path last goes on from there.",
                file=sys.stderr,
            )
        raise SystemExit(128 + number if trainer.is_global_zero else 0)
