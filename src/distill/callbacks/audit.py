"""The audit keeps the promise that every number reconciles: a run in which one does not is stopped.

It compares on the device and copies one small vector of flags to the host, which is read one batch late, so that no
step waits for it. The price of being late: the step that broke a rule has already been applied when the run stops.

Reads: the breakdown and total that the steps return, the tensor handed to `backward`, the Curriculum callback's state.
Writes: `nonfinite_batch.pt` in the run directory where a loss is not finite.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from distill.breakdown import WEIGHT_KEY, LossBreakdown
from distill.callbacks.curriculum import Curriculum
from distill.callbacks.text import run_directory
from distill.callbacks.train_debug import unscaled
from distill.errors import AuditError


@dataclass
class Entry:
    """What one batch left to be read: `[gap, tolerance, difference, values...]` on its way to the host."""

    where: str
    figures: Tensor
    names: list[str]
    weights: dict[str, float]
    batch: Any
    copied: torch.cuda.Event | None = None


@final
class LossAudit(Callback):
    """Stops a run in which a loss bypasses its weight, validation weighs otherwise, or a number is not finite.

    Args:
        tolerance: relative to the sum of the components' sizes.

    Raises:
        AuditError: names the component, the step and the rule.
    """

    def __init__(self, tolerance: float = 1e-6) -> None:
        self.tolerance = tolerance
        self.pending: list[Entry] = []
        self.back_propagated: Tensor | None = None
        self.directory: str | None = None

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        self.directory = run_directory(trainer)

    def on_before_backward(self, trainer: L.Trainer, pl_module: Any, loss: Tensor) -> None:
        self.back_propagated = unscaled(trainer, loss)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert self.back_propagated is not None
        self._read()
        self._enter(trainer, pl_module, outputs, "training", self.back_propagated, batch)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._read()
        self._enter(trainer, pl_module, outputs, "validation", outputs["total"], batch)

    on_test_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._read()

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._read()

    def _enter(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        outputs: Any,
        phase: str,
        back_propagated: Tensor,
        batch: Any,
    ) -> None:
        """Checks the weights at once, on the host, and queues the values, on the device."""
        breakdown: LossBreakdown = outputs["breakdown"]
        where = f"{phase} at step {pl_module.curriculum.step}"
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        curriculum = next((c for c in callbacks if isinstance(c, Curriculum)), None)
        state = curriculum.state_at(curriculum.step, curriculum.horizon) if curriculum else pl_module.curriculum
        for name, weight in breakdown.weights.items():
            expected = state.weights[WEIGHT_KEY[name]]
            if weight != expected:
                bypass = "eval bypass" if phase == "validation" else "routing bypass" if expected == 0 else "bypass"
                raise AuditError(
                    f"{bypass}: {name} has weight {weight:g} in {where}, the curriculum says {expected:g}: "
                    "take the weights from pl_module.curriculum"
                )
        if pl_module.curriculum != state:
            bypass = "eval bypass" if phase == "validation" else "bypass"
            raise AuditError(f"{bypass}: {where} used {pl_module.curriculum}, the curriculum says {state}")
        scaled, none = breakdown.scaled, torch.zeros((), dtype=torch.float64, device=outputs["total"].device)
        total = breakdown.total if scaled else none
        size = torch.stack([value.abs().double() for value in scaled.values()]).sum() if scaled else none
        gaps = torch.stack([(value.double() - total).abs() for value in (outputs["total"], back_propagated)])
        signed = outputs["total"].double() - total
        finite = dict(breakdown.raw)
        if phase == "training" and pl_module.grad_norm is not None:
            finite["gradient"], pl_module.grad_norm = pl_module.grad_norm, None
        figures = torch.stack([gaps.max(), self.tolerance * size, signed, *(v.double() for v in finite.values())])
        entry = Entry(where, figures, list(finite), breakdown.weights, batch)
        if figures.is_cuda:
            entry.figures = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
            entry.figures.copy_(figures, non_blocking=True)
            entry.copied = torch.cuda.Event()
            entry.copied.record()
        self.pending.append(entry)

    def _read(self) -> None:
        """Reads what the batches before left."""
        entries, self.pending = self.pending, []
        for entry in entries:
            if entry.copied is not None:
                entry.copied.synchronize()
            gap, tolerance, signed, *raw = entry.figures.tolist()
            values = dict(zip(entry.names, raw, strict=True))
            broken = [name for name, value in values.items() if not abs(value) < float("inf")]
            if broken:
                raise AuditError(f"{', '.join(broken)}: not finite in {entry.where}; {self._save(entry.batch)}")
            if not gap <= tolerance:
                raise AuditError(self._explain(entry, gap, signed, values))

    def _explain(self, entry: Entry, gap: float, signed: float, values: dict[str, float]) -> str:
        """Names the component of weight zero whose raw value is the difference, or those that could be."""
        inactive = [name for name, weight in entry.weights.items() if weight == 0]
        exact = [name for name in inactive if name in values and abs(values[name] - signed) <= 1e-3 * abs(signed)]
        rule = f"the total of {entry.where} differs by {gap:.6g} from the sum of its scaled components"
        if exact:
            return f"routing bypass: {exact[0]} has weight 0 but contributes {signed:.6g}: {rule}"
        suspects = ", ".join(inactive) or "none"
        return f"bypass: {rule}; components of weight 0 that may contribute: {suspects}"

    def _save(self, batch: Any) -> str:
        if self.directory is None:
            return "no run directory to save the batch in"
        Path(self.directory).mkdir(parents=True, exist_ok=True)
        path = Path(self.directory, "nonfinite_batch.pt")
        torch.save({key: value.cpu() if isinstance(value, Tensor) else value for key, value in batch.items()}, path)
        return f"the batch was saved to {path}"
