"""What Lightning does by itself, which is the reason for each of these functions, and what it does after them.

A test of the first sort that fails says that a function is no longer needed, or no longer enough.
"""

from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, LambdaCallback
from lightning.pytorch.plugins.precision import DoublePrecision
from torch.utils.data import DataLoader

from distill.training import lightning_internals as internals
from helpers.recorder import Recorder
from helpers.stops import Stop

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.*:FutureWarning"),
]


class Line(L.LightningModule):
    """One weight, seven micro-batches an epoch; logs a value in the first of all alone."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def training_step(self, batch, batch_idx):
        self.log("always", batch.mean())
        self.log("mean", batch.mean(), on_step=False, on_epoch=True)
        if self.trainer.fit_loop.epoch_loop.total_batch_idx == 0:
            self.log("once", 1.0)
        return (self.weight * batch).sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self):
        return DataLoader(torch.arange(7.0), batch_size=1)

    def val_dataloader(self):
        return DataLoader(torch.arange(2.0), batch_size=1)


class AtTheStart(Callback):
    """Calls functions when training begins, as the module does, and notes what a question says after each batch."""

    def __init__(self, *functions, ask=None):
        self.functions, self.ask = functions, ask
        self.said: list[Any] = []

    def on_train_start(self, trainer, pl_module):
        for function in self.functions:
            function(trainer)

    def on_train_batch_end(self, trainer, *args):
        if self.ask is not None:
            self.said.append(self.ask(trainer))


@pytest.fixture
def fit(tmp_path):
    """A run of two epochs, in windows of 3, 3 and 1."""

    def call(*callbacks: Callback, **options) -> L.Trainer:
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        options = {"max_epochs": 2, "accumulate_grad_batches": 3, "log_every_n_steps": 1, "logger": False} | options
        trainer = L.Trainer(
            accelerator="cpu",
            default_root_dir=tmp_path,
            num_sanity_val_steps=0,
            callbacks=list(callbacks),
            **quiet,
            **options,
        )
        trainer.fit(Line())
        return trainer

    return call


@pytest.mark.parametrize(("functions", "batches"), [((), 2), ((internals.stop_between_steps,), 3)])
def test_a_stop_within_a_window(fit, functions, batches):
    trainer = fit(AtTheStart(*functions), Stop(batch=1))
    assert trainer.fit_loop.epoch_loop.batch_progress.total.processed == batches
    assert trainer.global_step == batches // 3


@pytest.mark.parametrize(("functions", "rows"), [((), 3), ((internals.log_each_step_alone,), 1)])
def test_a_value_that_was_logged_once(fit, functions, rows):
    recorder = Recorder()
    fit(AtTheStart(*functions), logger=recorder, accumulate_grad_batches=3)
    steps = [row for row in recorder.rows if "always" in row]
    assert [row["at"] for row in steps] == list(range(6))
    assert len([row for row in steps if "once" in row]) == rows
    assert [row["mean"] for row in recorder.rows if "mean" in row] == [3.0, 3.0]


@pytest.mark.parametrize(
    ("question", "answers"),
    [
        (internals.step_is_whole, [0, 0, 1, 0, 0, 1, 1]),
        (internals.within_a_step, [1, 1, 0, 1, 1, 0, 0]),
        (internals.epoch_ends, [0, 0, 0, 0, 0, 0, 1]),
        (internals.more_follows, [0, 0, 1, 0, 0, 1, 1]),
        (internals.loggers_step, [0, 0, 0, 1, 1, 1, 2]),
        (internals.stops_here, [0, 0, 0, 0, 0, 0, 0]),
    ],
)
def test_what_the_loop_says_of_the_first_epoch(fit, question, answers):
    notes = AtTheStart(ask=question)
    fit(notes, val_check_interval=3, max_epochs=1)
    assert [int(answer) for answer in notes.said] == answers


@pytest.mark.parametrize(("horizon", "validated"), [(float("inf"), []), (6, [6])])
def test_the_last_validation(fit, horizon, validated):
    at: list[int] = []
    noted = LambdaCallback(on_validation_end=lambda trainer, module: at.append(trainer.global_step))
    fit(AtTheStart(partial(internals.validate_between_steps, horizon=horizon)), noted, check_val_every_n_epoch=3)
    assert at == validated


def test_a_stop_that_is_not_allowed_yet_does_not_stop_here(fit):
    stop, notes = Stop(batch=0), AtTheStart(ask=internals.stops_here)
    fit(stop, notes, min_steps=2, min_epochs=0)
    assert notes.said == [False, False, False, False, False, True]


def test_places_of_a_checkpoint_have_the_names_that_are_put_right(fit):
    checkpoint = fit(max_epochs=1)._checkpoint_connector.dump_checkpoint(weights_only=False)
    loop = checkpoint["loops"]["fit_loop"]
    batches, epochs = loop["epoch_loop.batch_progress"], loop["epoch_progress"]
    assert batches["is_last_batch"]
    assert batches["current"] == dict.fromkeys(("ready", "started", "processed", "completed"), 7)
    assert epochs["current"]["processed"] == epochs["current"]["started"] == 1
    assert "state_dict" in loop


def place(processed: int, last: bool, epochs: int, started: int = 2) -> dict[str, Any]:
    """A checkpoint at the end of micro-batch `processed` of the second epoch."""
    names = ("ready", "started", "processed", "completed")
    batches = {"current": dict.fromkeys(names, processed), "total": dict.fromkeys(names, 7 + processed)}
    progress = {"ready": started, "started": started, "processed": epochs, "completed": epochs}
    return {
        "loops": {
            "fit_loop": {
                "epoch_loop.batch_progress": batches | {"is_last_batch": last},
                "epoch_progress": {"current": dict(progress), "total": dict(progress)},
                "state_dict": {"combined_loader": [{"processed": processed}]},
            }
        }
    }


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (place(3, False, 1), place(3, False, 1)),  # the end of a window
        (place(5, False, 1), place(3, False, 1)),  # within the second
        (place(2, False, 1), place(0, False, 1)),
        (place(6, False, 2), place(6, False, 1)),  # an epoch that was broken off and counts as done
        (place(4, False, 2), place(3, False, 1)),
        (place(7, True, 2), place(7, True, 2)),  # the end of an epoch, whose last window is short
        (place(0, False, 2), place(0, False, 1)),  # an epoch that was left before its first batch
        (place(0, False, 0, started=0), place(0, False, 0, started=0)),  # before the first epoch
    ],
)
def test_places_move_to_the_end_of_the_last_whole_step(before, after):
    internals.place_between_steps(before, accumulate=3)
    assert before == after


def test_sigterm_is_taken_once(tmp_path):
    trainer = L.Trainer(accelerator="cpu", default_root_dir=tmp_path, logger=False, enable_checkpointing=False)
    assert not internals.take_sigterm(trainer)
    trainer._signal_connector.received_sigterm = True
    assert internals.take_sigterm(trainer)
    assert not trainer.received_sigterm


def test_a_resumed_loop_is_set_to_an_epochs_or_a_validations_beginning(tmp_path):
    trainer = L.Trainer(
        accelerator="cpu", default_root_dir=tmp_path, logger=False, enable_checkpointing=False, max_steps=9
    )
    fit = trainer.fit_loop
    fit.restarting = True
    fit.epoch_progress.current.started = fit.epoch_progress.current.processed = 1
    internals.begin_next_epoch(trainer)
    assert not fit.restarting, "under max_steps Lightning would stay in the old epoch"
    assert fit.epoch_progress.current.completed == 1
    validation = fit.epoch_loop.val_loop
    validation.batch_progress.current.ready = 4
    internals.begin_validation_again(trainer)
    assert validation.restarted_mid_evaluation
    assert validation.batch_progress.current.ready == 0


def test_the_loggers_step_follows_the_optimizers(tmp_path):
    trainer = L.Trainer(accelerator="cpu", default_root_dir=tmp_path, logger=False, enable_checkpointing=False)
    trainer.fit_loop.epoch_loop._batches_that_stepped = 5
    internals.log_under_the_step(trainer)
    assert internals.loggers_step(trainer) == trainer.global_step == 0


def test_batches_are_cast_by_precisions_and_left_alone_after(tmp_path):
    trainer = L.Trainer(
        accelerator="cpu", default_root_dir=tmp_path, logger=False, enable_checkpointing=False, precision="64-true"
    )
    assert isinstance(trainer.precision_plugin, DoublePrecision)
    assert trainer.precision_plugin.convert_input(torch.ones(1)).dtype == torch.float64
    internals.leave_batches_as_they_are(trainer)
    assert trainer.precision_plugin.convert_input(torch.ones(1)).dtype == torch.float32


def test_an_average_of_weights_is_kept_where_it_is_looked_for(tmp_path):
    callback = EMAWeightAveraging()
    trainer = L.Trainer(
        accelerator="cpu", default_root_dir=tmp_path, logger=False, enable_checkpointing=False, callbacks=[callback]
    )
    assert internals.averaged(trainer) is None
    callback.setup(trainer, module := Line(), "fit")
    assert internals.averaged(trainer).weight is not module.weight
    assert internals.averaged(trainer).weight == module.weight


def test_trainer_module_and_data_know_each_other():
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, barebones=True)
    module, data = Line(), L.LightningDataModule.from_datasets(list(range(4)))
    with pytest.raises(RuntimeError, match="not attached"):
        _ = module.trainer
    internals.make_known(trainer, module, data)
    assert module.trainer is trainer
    assert trainer.datamodule is data
    assert data.trainer is trainer
    assert trainer.lightning_module is module
