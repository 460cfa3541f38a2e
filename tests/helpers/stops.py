"""Callbacks that ask a run to stop, or write a checkpoint, at a place that does not depend on the clock."""

from pathlib import Path

from lightning.pytorch.callbacks import Callback, Checkpoint


class Stop(Callback):
    """Sets `trainer.should_stop` in one hook at a micro-batch, counted over epochs.

    Args:
        hook: its name.
        batch: from 0.
        rank: on which alone it asks; None = on all.
    """

    def __init__(self, hook: str = "on_train_batch_end", batch: int = 0, rank: int | None = None):
        def ask(trainer, pl_module, *args):
            if trainer.fit_loop.epoch_loop.total_batch_idx >= batch - 1 and rank in (None, trainer.global_rank):
                trainer.should_stop = True

        def ask_at(trainer, pl_module, *args):
            if trainer.fit_loop.epoch_loop.total_batch_idx == batch:
                ask(trainer, pl_module)

        setattr(self, hook, ask_at if "batch" in hook else ask)


class LateStop(Checkpoint):
    """The same at the end of micro-batch `batch`, as the last of all callbacks."""

    def __init__(self, batch: int):
        self.batch = batch

    def on_train_batch_end(self, trainer, *args):
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.batch:
            trainer.should_stop = True


class SaveEverywhere(Callback):
    """Writes a checkpoint at the end of every micro-batch."""

    def __init__(self, folder: str):
        self.folder = folder

    def on_train_batch_end(self, trainer, *args):
        number = trainer.fit_loop.epoch_loop.total_batch_idx
        trainer.save_checkpoint(Path(self.folder, f"{number:02d}.ckpt"), weights_only=False)


class AtStart(Callback):
    """Asks for the end in a hook before the first step."""

    def __init__(self, hook: str):
        setattr(self, hook, lambda trainer, *args: setattr(trainer, "should_stop", True))


class Accumulates(Callback):
    """Changes from the second epoch on how many micro-batches make a step, as GradientAccumulationScheduler does."""

    def on_train_epoch_start(self, trainer, pl_module):
        trainer.accumulate_grad_batches += trainer.current_epoch


class Logs(Callback):
    """Logs as callbacks of users do: a value of each step, and the mean of micro-batches' numbers over the epoch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.log("own/mean", float(batch_idx), on_step=False, on_epoch=True, batch_size=1)
        pl_module.log("own/each_step", float(trainer.global_step))
