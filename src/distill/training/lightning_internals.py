"""Each private part of Lightning that the program touches, as one named function with its reason.

Lightning may change these without notice: `tests/training/test_lightning_internals.py` fails when it does, and
pyproject.toml allows the minor versions that were run.
"""

from typing import Any, TypeVar

import lightning as L
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.loops.evaluation_loop import RestartStage
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins.precision import HalfPrecision
from torch import nn

from distill.models.precision import cast, student_dtype

Kind = TypeVar("Kind", bound=Callback)


def validate_between_steps(trainer: L.Trainer, horizon: float = float("inf")) -> None:
    """From now on a validation that falls due within an accumulation window waits for the window's end.

    Lightning counts micro-batches, whatever an optimizer step is, and a checkpoint written within a window would lose
    the gradients of its micro-batches. What is due is a function of the place alone, so a resumed run finds the same.

    Args:
        trainer: that has begun.
        horizon: the step after which the run ends, with a validation, as it does where it is stopped early. Lightning
            omits that in epochs that have none, and where `min_steps` or `min_epochs` are still to come.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    due = type(loop)._should_check_val_fx.__get__(loop)

    def due_by_now(fetcher: Any) -> bool:
        if loop._should_accumulate():
            return False
        last = trainer.global_step >= horizon or stops_here(trainer)
        if due(fetcher) or (last and trainer.enable_validation):
            return True
        every = trainer.val_check_batch
        if every is None or not loop._should_check_val_epoch():  # None: by the clock, whose time stays up
            return False
        count = 1 + (loop.total_batch_idx if trainer.check_val_every_n_epoch is None else loop.batch_idx)
        return count >= every and count % every <= loop.batch_idx % trainer.accumulate_grad_batches

    loop._should_check_val_fx = due_by_now


class _WholeSteps(_TrainingEpochLoop):
    """Lightning's loop over an epoch, which is left at the end of an accumulation window alone."""

    @property
    def done(self) -> bool:
        return not self._should_accumulate() and super().done


def stop_between_steps(trainer: L.Trainer) -> None:
    """From now on whatever asks the run to stop is heard at the end of an accumulation window.

    `max_time`, `EarlyStopping` and every other callback set `trainer.should_stop`, and Lightning leaves the epoch after
    that micro-batch: the gradients of its window would be lost, and the place would be that of no step.
    """
    trainer.fit_loop.epoch_loop.__class__ = _WholeSteps


def step_is_whole(trainer: L.Trainer) -> bool:
    """Whether the micro-batch that was just trained on was the last of its optimizer step."""
    return not trainer.fit_loop.epoch_loop._should_accumulate()


def within_a_step(trainer: L.Trainer) -> bool:
    """Whether an optimizer step has begun and is not whole, be it by an error in its first micro-batch."""
    loop = trainer.fit_loop.epoch_loop
    counts: Any = loop.batch_progress.current
    return counts.processed < counts.ready or loop._should_accumulate()


def more_follows(trainer: L.Trainer) -> bool:
    """Whether a validation or the end of the epoch comes next, of which a checkpoint here would know nothing."""
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    assert fetcher is not None
    return loop._is_training_done or loop._should_check_val_fx(fetcher)


def epoch_ends(trainer: L.Trainer) -> bool:
    """Whether the end of the epoch comes next, after a validation if one is due."""
    return trainer.fit_loop.epoch_loop._is_training_done


def stops_here(trainer: L.Trainer) -> bool:
    """Whether the run ends with this step, since something asked for it and `min_steps` and `min_epochs` allow it."""
    return trainer.should_stop and trainer.fit_loop._can_stop_early


def take_sigterm(trainer: L.Trainer) -> bool:
    """Whether SIGTERM came before our handlers were there; Lightning, which would stop without saving, forgets it."""
    received, trainer._signal_connector.received_sigterm = trainer.received_sigterm, False
    return received


def place_between_steps(checkpoint: dict[str, Any], accumulate: int) -> None:
    """Puts the place in a checkpoint that is about to be loaded at the end of its last whole step.

    Lightning's callbacks write wherever they stand: within an accumulation window, whose gradients no checkpoint holds,
    and after a stop in mid-epoch, or before its first batch, where the epoch counts as done and the rest of its rows
    would be skipped.

    Args:
        checkpoint: of a run; changed in place.
        accumulate: micro-batches of its optimizer steps.
    """
    loop = checkpoint["loops"]["fit_loop"]
    batches, epochs = loop["epoch_loop.batch_progress"], loop["epoch_progress"]
    done: int = batches["current"]["processed"]
    if batches["is_last_batch"] or not epochs["current"]["started"]:
        return
    if beyond := done % accumulate:
        for counts in (batches["total"], batches["current"]):
            counts |= dict.fromkeys(counts, counts["processed"] - beyond)
        for loader in loop["state_dict"].get("combined_loader", []):
            loader["processed"] -= beyond
    if epochs["current"]["processed"] == epochs["current"]["started"]:
        for counts in (epochs["total"], epochs["current"]):
            counts |= {"processed": counts["started"] - 1, "completed": counts["started"] - 1}


def begin_validation_again(trainer: L.Trainer) -> None:
    """Makes a resumed run do the whole of a validation that its checkpoint cut short.

    Lightning would take it for done, or do the rest of it alone.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.batch_progress.reset_on_run()
    loop._restart_stage = RestartStage.RESTARTED_MID_EVALUATION


def begin_next_epoch(trainer: L.Trainer) -> None:
    """Makes a run that is resumed from the end of an epoch begin the next one.

    Under `max_steps` Lightning takes it for broken off in mid-epoch.
    """
    fit: Any = trainer.fit_loop
    epochs = fit.epoch_progress
    if epochs.current.processed == epochs.current.started:
        epochs.current.completed, epochs.total.completed = epochs.current.processed, epochs.total.processed
        _Loop.restarting.fset(fit, False)  # type: ignore[attr-defined]
        fit.reset_restart_stage()


def log_under_the_step(trainer: L.Trainer) -> None:
    """Keeps the loggers' step equal to the optimizer's.

    Lightning loses one where a checkpoint lies at a validation that the resumed run would not make there.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


def loggers_step(trainer: L.Trainer) -> int:
    """The step under which loggers are given what is logged now."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def log_each_step_alone(trainer: L.Trainer) -> None:
    """From now on a row of the loggers holds what was logged in its own optimizer step, and nothing else.

    Lightning keeps the last value of each entry until the epoch ends, so that a component whose weight has gone to zero
    would stay in every later row. What is averaged over an epoch stays, and so does what only bars show.
    """
    connector: Any = trainer._logger_connector
    update = type(connector).update_train_step_metrics.__get__(connector)

    def update_and_forget() -> None:
        update()
        results: Any = trainer._results
        if step_is_whole(trainer) and results is not None:
            alone = [key for key, item in results.items() if item.meta.logger and not item.meta.on_epoch]
            for key in alone:
                del results[key]

    connector.update_train_step_metrics = update_and_forget


def averaged(trainer: L.Trainer) -> Any:
    """The module whose weights a `WeightAveraging` callback puts into checkpoints in place of the trained ones.

    It keeps them to itself. None where there is no such callback.
    """
    found = [callback._average_model for callback in callbacks_of(trainer, WeightAveraging)]
    return next((model.module for model in found if model is not None), None)


def make_known(trainer: L.Trainer, module: L.LightningModule, data: L.LightningDataModule) -> None:
    """Makes trainer, module and datamodule known to each other, which Lightning does within `fit` alone."""
    trainer.strategy.connect(module)
    trainer._data_connector.attach_data(module, datamodule=data)


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


def print_same_results_once(trainer: L.Trainer) -> None:
    """Lets `validate` and `test` print one column where each loader's would be the same.

    What is logged at the end of an epoch is of all loaders, and Lightning repeats it in a column for each, so that the
    figures of one validation set stand under the number of another.
    """
    for loop in (trainer.validate_loop, trainer.test_loop):
        printed = type(loop)._print_results

        def once(results: list[Any], stage: str, printed: Any = printed) -> None:
            printed(results[:1] if all(result == results[0] for result in results) else results, stage)

        loop._print_results = once  # type: ignore[method-assign]


def callbacks_of(trainer: L.Trainer, kind: type[Kind]) -> list[Kind]:
    """A trainer's callbacks of one class; Lightning sets the attribute that its class does not declare."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, kind)]
