"""Each private part of Lightning that the program touches, as one named function with its reason.

Lightning may change these without notice: `tests/training/test_lightning_internals.py` fails when it does, and
pyproject.toml allows the minor versions that were run.
"""

from typing import Any, TypeVar

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import HalfPrecision
from torch import nn

from distill.models.precision import cast, student_dtype

Kind = TypeVar("Kind", bound=Callback)


def validate_between_steps(trainer: L.Trainer) -> None:
    """From now on a validation that falls due within an accumulation window waits for the window's end.

    Lightning counts micro-batches, whatever an optimizer step is, and a checkpoint written within a window would lose
    the gradients of its micro-batches. What is due is a function of the place alone, so a resumed run finds the same.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    due = type(loop)._should_check_val_fx.__get__(loop)

    def due_by_now(fetcher: Any) -> bool:
        if loop._should_accumulate() and not trainer.should_stop:
            return False
        if due(fetcher):
            return True
        every = trainer.val_check_batch
        if every is None or not loop._should_check_val_epoch():  # None: by the clock, whose time stays up
            return False
        count = 1 + (loop.total_batch_idx if trainer.check_val_every_n_epoch is None else loop.batch_idx)
        return count >= every and count % every <= loop.batch_idx % trainer.accumulate_grad_batches

    loop._should_check_val_fx = due_by_now


def load_loader_states(trainer: L.Trainer) -> None:
    """Hands the checkpoint's state to the loaders.

    Asking for the horizon, as schedules must, makes the loaders before Lightning has restored their state.
    """
    trainer.fit_loop._load_combined_loader_states()


def cast_as_loading_does(trainer: L.Trainer) -> None:
    """Has true 16-bit precisions cast the student as `from_pretrained` would, see `models.precision.cast`."""
    plugin = trainer.precision_plugin
    if isinstance(plugin, HalfPrecision):
        dtype = student_dtype(str(plugin.precision))

        def convert(module: nn.Module) -> nn.Module:
            cast(module, dtype)
            return module

        plugin.convert_module = convert  # type: ignore[method-assign]


def leave_batches_as_they_are(trainer: L.Trainer) -> None:
    """Switches off what precision plugins do to a batch before a step.

    They cast its floating-point tensors, of which a `Batch` has none, and refuse frozen dataclasses.
    """
    trainer.precision_plugin.convert_input = lambda data: data  # type: ignore[method-assign]


def callbacks_of(trainer: L.Trainer, kind: type[Kind]) -> list[Kind]:
    """A trainer's callbacks of one class; Lightning sets the attribute that its class does not declare."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, kind)]
