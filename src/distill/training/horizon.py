"""How many optimizer steps a run has, and whether it validates within them."""

import math

import lightning as L

from distill.errors import UserError


def horizon_of(trainer: L.Trainer) -> int:
    """Optimizer steps of the whole run.

    Raises:
        UserError: a run without an end has no progress to schedule by, and one without a step trains nothing.
    """
    for key in ("max_epochs", "max_steps", "limit_train_batches"):
        if getattr(trainer, key) == 0:
            raise UserError(f"trainer.{key}: 0 leaves nothing to train; give at least 1, or leave it out")
    steps = trainer.estimated_stepping_batches
    if trainer.num_training_batches == 0:
        raise UserError("data.dataset: no training rows for this rank, so nothing would be trained; give more data")
    if not math.isfinite(steps) or steps <= 0:
        raise UserError(f"trainer.max_steps: a horizon of {steps} steps leaves nothing to schedule by: set max_steps")
    return int(steps)


def check_validation_interval(interval: float, batches: float) -> None:
    """Refuses a run that would never validate within an epoch.

    Args:
        interval: `val_check_interval`; a share of an epoch, or an int, micro-batches.
        batches: micro-batches of an epoch on one rank.

    Raises:
        UserError: the interval is longer than the epoch.
    """
    if isinstance(interval, int) and interval > batches:
        raise UserError(
            f"trainer.val_check_interval: {interval} micro-batches are more than an epoch's {batches}; set "
            "trainer.check_val_every_n_epoch: null, or a smaller one"
        )
