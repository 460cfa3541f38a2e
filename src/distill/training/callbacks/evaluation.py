"""What validation said: an `[Eval]` line after each one, and a table of before, after and teacher when fit ends.

Reads: `trainer.callback_metrics` and the weights that the module's validation returned. Logs: the figures of a whole
validation before the first step, which Lightning keeps from the loggers, so that charts begin where the run began.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import final

import lightning as L
from lightning.pytorch.callbacks import Callback, EarlyStopping, Timer
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from rich.console import Console
from rich.table import Table

from distill.training.callbacks.best import BestLink
from distill.training.callbacks.last_checkpoint import LastCheckpoint
from distill.training.callbacks.text import emit, run_directory
from distill.training.horizon import horizon_of
from distill.training.lightning_internals import callbacks_of
from distill.training.module import distilled

TABLE = (
    "val/kl_div_T1",
    "val/student_nll",
    "val/student_perplexity",
    "val/top1_agreement",
    "val/top5_agreement",
    "val/acceptance",
    "val/ece",
    "val/bits_per_byte",
)
ON_EACH_SET = ("kl_div_T1", "student_perplexity", "top1_agreement", "acceptance", "bits_per_byte")  # after the first


@final
class Evaluation(Callback):
    """Prints each validation's loss with raw value, weight and scaled value of its components, and a closing table.

    Components of weight zero are not measured in validation: their raw value is nan, their weight and scaled value 0.
    The closing table has the weight-free metrics, since the total moves with its weights. It compares with the student
    before training where `trainer.num_sanity_val_steps` is -1, which makes the check before training a whole
    validation; otherwise with the first validation, and with none where there was only one.
    """

    def __init__(self) -> None:
        self.directory: str | None = None
        self.first: dict[str, float] = {}
        self.first_step = 0
        self.last: dict[str, float] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.directory = run_directory(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module = distilled(pl_module)
        if trainer.sanity_checking and trainer.num_sanity_val_steps != float("inf"):
            return
        found = trainer.callback_metrics.items()
        metrics = {name: float(value) for name, value in found if name.startswith(("val/", "tasks/"))}
        weights = module.component_weights()
        lines = [f"[Eval] Step {module.curriculum.step}, loss: {metrics['val/loss']:.4f}"]
        for name, weight in weights.items():
            raw = metrics.get(f"val/{name}", float("nan"))
            scaled = raw * weight if weight > 0 else 0.0
            lines.append(f"    {name}: raw {raw:.4f}, weight {weight:.4f}, scaled {scaled:.4f}")
        emit(trainer, self.directory, "\n".join(["", *lines, ""]))
        if trainer.sanity_checking:
            for logger in trainer.loggers:
                logger.log_metrics({"epoch": trainer.current_epoch, **metrics}, step=module.curriculum.step)
        if not self.first:
            self.first, self.first_step = metrics, trainer.global_step
        self.last = metrics

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if (stopped := stopped_early(trainer)) is not None:
            emit(trainer, self.directory, f"\n{stopped}\n")
        if not trainer.is_global_zero:
            return
        if self.last:
            self._print_table(trainer)
        for best in filter(None, (link.told(trainer) for link in callbacks_of(trainer, BestLink))):
            Console().print(best, soft_wrap=True, highlight=False, markup=False)
        if self.directory is not None:
            Console().print(f"Run directory: {Path(self.directory).absolute()}", soft_wrap=True, highlight=False)

    def _print_table(self, trainer: L.Trainer) -> None:
        """The last validation beside the first one and the teacher."""
        several = self.first is not self.last
        columns = {"after" if several else f"step {trainer.global_step:,}": self.last}
        if several:
            columns = {f"step {self.first_step:,}" if self.first_step else "before": self.first} | columns
        columns["teacher"] = {
            name: self.last[theirs]
            for name in self.last
            if (theirs := of_teacher(name)) != name and theirs in self.last
        }
        table = Table("validation")
        for heading in columns:
            table.add_column(heading, justify="right")
        for name in rows_of(self.last):
            if name in self.last:
                table.add_row(name, *(shown(values.get(name)) for values in columns.values()))
        Console().print(table)


def rows_of(metrics: Mapping[str, float]) -> list[str]:
    """The rows of the closing table: the first validation set's, then fewer of each other one, and tasks' scores."""
    sets = dict.fromkeys(name.split("/")[1] for name in metrics if name.count("/") == 2 and name.startswith("val/"))
    tasks = [
        name for name in metrics if name.startswith("tasks/") and "_stderr" not in name and "/teacher_" not in name
    ]
    return [*TABLE, *(f"val/{one}/{metric}" for one in list(sets)[1:] for metric in ON_EACH_SET), *tasks]


def of_teacher(name: str) -> str:
    """What the teacher's figure of a student's is called; the same name where there is none.

    Example:
        >>> of_teacher("val/wiki/student_nll"), of_teacher("tasks/arc_easy/acc")
        ('val/wiki/teacher_nll', 'tasks/arc_easy/teacher_acc')
    """
    if name.startswith("tasks/"):
        task, _, metric = name.rpartition("/")
        return f"{task}/teacher_{metric}"
    return re.sub(r"/student_(perplexity|nll)$", r"/teacher_\1", name)


def stopped_early(trainer: L.Trainer) -> str | None:
    """Why a run ended before its last step; None where it did not."""
    step, horizon = trainer.global_step, horizon_of(trainer)
    if step >= horizon:
        return None
    for callback in callbacks_of(trainer, EarlyStopping):
        if callback.stopping_reason != EarlyStoppingReason.NOT_STOPPED:
            why = str(callback.stopping_reason_message)
            if callback.stopping_reason == EarlyStoppingReason.PATIENCE_EXHAUSTED:
                why = f"{callback.monitor} has not improved for {callback.wait_count} validations"
            return f"Stopped early at step {step} of {horizon}: {why}"
    left = [timer.time_remaining() for timer in callbacks_of(trainer, Timer)]
    why = "a callback asked for it" if trainer.should_stop else "its epochs were shorter than they were counted"
    why = "its time is used up" if any(seconds is not None and seconds <= 0 for seconds in left) else why
    on = "; --ckpt_path last goes on from there" if callbacks_of(trainer, LastCheckpoint) else ""
    return f"Stopped early at step {step} of {horizon}: {why}{on}"


def shown(value: float | None) -> str:
    """Four decimals, none where they would say nothing."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4f}"
