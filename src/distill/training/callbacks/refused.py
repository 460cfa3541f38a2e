"""Callbacks of Lightning's own list that cannot go with how a run is scheduled, stepped and saved here."""

from collections.abc import Iterable

from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
)

from distill.errors import UserError

# Class, also of subclasses -> why not, and what to do instead.
REFUSED: dict[type[Callback], str] = {
    GradientAccumulationScheduler: (
        "changes how many micro-batches make a step, which all schedules and counts of a run take for constant, so "
        "that it would end before they do; set trainer.accumulate_grad_batches"
    ),
    StochasticWeightAveraging: (
        "puts a schedule of its own in the learning rate's place, and no checkpoint holds its average; take "
        "EMAWeightAveraging"
    ),
    LearningRateFinder: (
        "sets a rate that the configuration's replaces; set model.learning_rate, and compare a few by distill report"
    ),
    BatchSizeFinder: (
        "does not know micro-batches that are counted ahead; set data.per_device_batch_size by what distill check says"
    ),
    ModelPruning: "puts masked weights in the student's place, which no checkpoint could return; leave it out",
    BaseFinetuning: "moves parameters between groups that the schedule does not know; leave it out, or use model.lora",
}


def check_callbacks(callbacks: Iterable[Callback]) -> None:
    """Refuses callbacks that would bend a run without a word.

    Raises:
        UserError: names the callback, why, and what to do instead.
    """
    for callback in callbacks:
        for kind, why in REFUSED.items():
            if isinstance(callback, kind):
                raise UserError(f"trainer.callbacks: {type(callback).__name__} {why}")
