"""What validation said: an `[Eval]` line after each one, and a table of before, after and teacher when fit ends.

Reads: `trainer.callback_metrics` and the weights that the module's validation returned. Writes and logs nothing.
"""

from typing import Any, final

import lightning as L
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table

from distill.callbacks.text import emit, run_directory

TABLE = (
    "val/loss",
    "val/kl_div_T1",
    "val/student_nll",
    "val/student_perplexity",
    "val/top1_agreement",
    "val/ece",
    "val/bits_per_byte",
)
TEACHER = {"val/student_perplexity": "val/teacher_perplexity", "val/student_nll": "val/teacher_nll"}


@final
class Evaluation(Callback):
    """Prints each validation's loss with raw value, weight and scaled value of its components, and a closing table.

    Components of weight zero are not measured in validation: their raw value is nan, their weight and scaled value 0.
    The closing table compares with the untrained student where `trainer.num_sanity_val_steps` is -1, which makes the
    check before training a whole validation, and with the first validation otherwise.
    """

    def __init__(self) -> None:
        self.directory: str | None = None
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        self.directory = run_directory(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.sanity_checking and trainer.num_sanity_val_steps != float("inf"):
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        weights = pl_module.component_weights()
        lines = [f"[Eval] Step {pl_module.curriculum.step}, loss: {metrics['val/loss']:.4f}"]
        for name, weight in weights.items():
            raw = metrics.get(f"val/{name}", float("nan"))
            scaled = raw * weight if weight > 0 else 0.0
            lines.append(f"    {name}: raw {raw:.4f}, weight {weight:.4f}, scaled {scaled:.4f}")
        emit(trainer, self.directory, "\n".join(["", *lines, ""]))
        self.first = self.first or metrics
        self.last = metrics

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not self.last or not trainer.is_global_zero:
            return
        table = Table(title="Validation", title_justify="left")
        for heading in ("metric", "before", "after", "teacher"):
            table.add_column(heading, justify="left" if heading == "metric" else "right")
        for name in TABLE:
            teacher = self.last.get(TEACHER.get(name, ""))
            values = (self.first.get(name), self.last.get(name), teacher)
            table.add_row(name, *("" if value is None else f"{value:.4f}" for value in values))
        Console().print(table)
        if self.directory is not None:
            Console().print(f"Run directory: {self.directory}", soft_wrap=True, highlight=False)
