"""The three blocks per optimizer step: CURRICULUM, KD LOSS and ROUTING LOSSES, in this order.

Dumps render what the module returned and compute nothing, so switching them on or off changes no bit of a run. A step
that is printed waits for one device-to-host copy.
"""

from abc import ABC, abstractmethod
from typing import Any, final

import lightning as L
from lightning.pytorch.callbacks import Callback

from distill.batch import Batch
from distill.breakdown import LossBreakdown
from distill.curriculum import WEIGHT_KEY, WEIGHT_KEYS
from distill.errors import UserError
from distill.training.callbacks.text import block, emit, run_directory
from distill.training.module import DistillationModule, distilled

ALWAYS = ("kd", "feature", "attention", "layerwise", "contrastive")  # rows of CURRICULUM, whatever is configured


class StepDump(Callback, ABC):
    """A block once per optimizer step, every `every_n_steps` steps and on the first ones.

    Reads: the `step` breakdown that `training_step` returns at the end of an accumulation window, and
    `pl_module.curriculum`. Writes: `pl_module.step_is_read`, and `pl_module.measure_inactive` with the components
    that it shows at weight zero too.

    Args:
        every_n_steps: distance in optimizer steps.
        first_steps: a block on each of the first steps, whatever the distance.
    """

    def __init__(self, every_n_steps: int = 500, first_steps: int = 10) -> None:
        if every_n_steps < 1 or first_steps < 0:
            raise UserError(
                f"{type(self).__name__}: every_n_steps {every_n_steps}, first_steps {first_steps}: give at least 1 and "
                "0 (null on the callback's own key switches it off)"
            )
        self.every_n_steps = every_n_steps
        self.first_steps = first_steps
        self.directory: str | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.directory = run_directory(trainer)

    def is_due(self, step: int) -> bool:
        """Whether optimizer step `step` has a block."""
        return step < self.first_steps or step % self.every_n_steps == 0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        module = distilled(pl_module)
        if self.is_due(trainer.global_step):
            module.step_is_read = True
            module.measure_inactive |= frozenset(filter(self.shows, module.components))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        module = distilled(pl_module)
        if outputs["step"] is not None and self.is_due(module.curriculum.step) and trainer.is_global_zero:
            text = self.render(module, outputs["step"])
            if text is not None:
                emit(trainer, self.directory, text)

    @abstractmethod
    def shows(self, component: str) -> bool:
        """Whether the block has a raw value of the component."""

    @abstractmethod
    def render(self, module: DistillationModule, breakdown: LossBreakdown) -> str | None:
        """The block of one optimizer step, None where there is nothing to show."""


@final
class CurriculumDump(StepDump):
    """Prints the curriculum's weights; `lm` follows where that component is configured."""

    def shows(self, component: str) -> bool:
        return False

    def render(self, module: DistillationModule, breakdown: LossBreakdown) -> str:
        state = module.curriculum
        present = {WEIGHT_KEY[name] for name in module.components}
        others = [key for key in WEIGHT_KEYS if key not in ALWAYS and key in present]
        keys = [*ALWAYS, *others]
        rows = [f"    {key}: {state.weights[key] if key in present else 0.0:.4f}" for key in keys]
        return block(f"[CURRICULUM] Step {state.step}, Progress {state.progress:.1%}", ["  Curriculum weights:", *rows])


@final
class KDLossDump(StepDump):
    """Prints raw value, weight and weighted value of `kd_loss`, nats per token."""

    def shows(self, component: str) -> bool:
        return component == "kd_loss"

    def render(self, module: DistillationModule, breakdown: LossBreakdown) -> str | None:
        if "kd_loss" not in breakdown.weights:
            return None
        raw, weight = float(breakdown.raw["kd_loss"]), breakdown.weights["kd_loss"]
        return block(
            f"[KD LOSS] Step {module.curriculum.step}",
            [
                f"  Raw KD loss: {raw:.4f}",
                f"  Curriculum weight: {weight:.4f}",
                f"  Weighted KD loss: {raw * weight:.4f}",
            ],
        )


@final
class RoutingLossesDump(StepDump):
    """Prints raw value, weight and scaled value of every configured routing loss."""

    def shows(self, component: str) -> bool:
        return component.startswith("routing_")

    def render(self, module: DistillationModule, breakdown: LossBreakdown) -> str | None:
        lines = []
        for name, weight in breakdown.weights.items():
            if name.startswith("routing_"):
                raw = float(breakdown.raw[name])
                lines += [
                    f"  {name.removeprefix('routing_')}:",
                    f"    Raw: {raw:.4f}",
                    f"    Weight: {weight:.4f}",
                    f"    Scaled: {raw * weight:.4f}",
                ]
        return block(f"[ROUTING LOSSES] Step {module.curriculum.step}", lines) if lines else None
