"""The audit keeps the promise that every number reconciles: a run in which one does not is stopped.

It compares on the device and copies one small vector of flags to the host, which is read when the next step's backward
pass is on its way, so that no step waits for it. What is not finite is dropped on the device: a loss that is not makes
its whole gradient nan, and fused AdamW leaves out a step whose gradient is (on all ranks, since they share the
gradient), so neither weights nor moments ever hold it. A run in which another rule is broken has applied that step when
it stops, and a dropped step still counts as a step for the curriculum and `max_steps`.

Reads: the breakdown and total that the steps return, the tensor handed to `backward`, the Curriculum callback's state.
Writes: `pl_module.drop_nonfinite` and `pl_module.skipped_steps`, which it logs; the first batch that is not finite, to
`nonfinite_batch.pt` in the run directory; the scheduler's place, which a dropped step does not move.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from distill.batch import Batch
from distill.breakdown import LossBreakdown
from distill.curriculum import WEIGHT_KEY
from distill.errors import AuditError
from distill.training.callbacks.curriculum import Curriculum
from distill.training.callbacks.text import run_directory
from distill.training.callbacks.train_debug import unscaled
from distill.training.lightning_internals import callbacks_of
from distill.training.module import DistillationModule, distilled
from distill.training.optim import step_back

PATIENCE = 10  # steps dropped one after the other before even `skip` gives up


@dataclass
class Entry:
    """What one batch left to be read: `[gap, tolerance, difference, values...]` on its way to the host."""

    where: str
    training: bool
    figures: Tensor
    names: list[str]
    weights: dict[str, float]
    batch: Batch
    copied: torch.cuda.Event | None = None

    @property
    def ends_step(self) -> bool:
        """Whether it is of an accumulation window's last micro-batch, which knows the gradient."""
        return "gradient" in self.names


@final
class LossAudit(Callback):
    """Stops a run in which a loss bypasses its weight, validation weighs otherwise, or a number is not finite.

    Args:
        tolerance: relative to the sum of the components' sizes.
        on_nonfinite: what follows a loss or gradient that is not finite: stop, with the batch saved and the last
            checkpoint from before it; or skip, which drops the step on all ranks and counts it.

    Raises:
        AuditError: names the component, the step and the rule.
    """

    def __init__(self, tolerance: float = 1e-6, on_nonfinite: Literal["stop", "skip"] = "stop") -> None:
        self.tolerance = tolerance
        self.on_nonfinite = on_nonfinite
        self.skipped = self.in_a_row = 0
        self.blamed: tuple[list[str], Entry] | None = None
        self.pending: list[Entry] = []
        self.back_propagated: Tensor | None = None
        self.directory: str | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        module = distilled(pl_module)
        self.directory = run_directory(trainer)
        self.trainer, self.module = trainer, module
        self.scaler = getattr(trainer.precision_plugin, "scaler", None)
        module.drop_nonfinite = self.scaler is None  # fp16's scaler drops steps itself, and looks for them
        module.skipped_steps = self.skipped if self.on_nonfinite == "skip" else None

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        self.back_propagated = unscaled(trainer, loss)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self._read()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert self.back_propagated is not None
        self._read()
        self._enter(trainer, distilled(pl_module), outputs, "training", self.back_propagated, batch)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._read()
        self._enter(trainer, distilled(pl_module), outputs, "validation", outputs["total"], batch)

    on_test_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._read()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._read()

    def _enter(
        self,
        trainer: L.Trainer,
        module: DistillationModule,
        outputs: Any,
        phase: str,
        back_propagated: Tensor,
        batch: Batch,
    ) -> None:
        """Checks the weights at once, on the host, and queues the values, on the device."""
        breakdown: LossBreakdown = outputs["breakdown"]
        where = f"{phase} at step {module.curriculum.step}"
        curriculum = next(iter(callbacks_of(trainer, Curriculum)), None)
        state = curriculum.state_at(curriculum.step, curriculum.horizon) if curriculum else module.curriculum
        for name, weight in breakdown.weights.items():
            expected = state.weights[WEIGHT_KEY[name]]
            if weight != expected:
                bypass = "eval bypass" if phase == "validation" else "routing bypass" if expected == 0 else "bypass"
                raise AuditError(
                    f"{bypass}: {name} has weight {weight:g} in {where}, the curriculum says {expected:g}: "
                    "take the weights from pl_module.curriculum"
                )
        if module.curriculum != state:
            bypass = "eval bypass" if phase == "validation" else "bypass"
            raise AuditError(f"{bypass}: {where} used {module.curriculum}, the curriculum says {state}")
        scaled, none = breakdown.scaled, torch.zeros((), dtype=torch.float64, device=outputs["total"].device)
        total = breakdown.total if scaled else none
        size = torch.stack([value.abs().double() for value in scaled.values()]).sum() if scaled else none
        gaps = torch.stack([(value.double() - total).abs() for value in (outputs["total"], back_propagated)])
        signed = outputs["total"].double() - total
        finite = dict(breakdown.raw)
        if phase == "training" and module.grad_norm is not None:
            finite["gradient"], module.grad_norm = module.grad_norm, None
        figures = torch.stack([gaps.max(), self.tolerance * size, signed, *(v.double() for v in finite.values())])
        entry = Entry(where, phase == "training", figures, list(finite), breakdown.weights, batch)
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
            if not broken and not gap <= tolerance:
                raise AuditError(self._explain(entry, gap, signed, values))
            if entry.training:
                self._judge(entry, broken)
            elif broken:
                raise AuditError(f"{', '.join(broken)}: not finite in {entry.where}; {self._save(entry.batch)}")

    def _judge(self, entry: Entry, broken: list[str]) -> None:
        """Decides on a step when its gradient is known, which all ranks share: none stops or skips alone."""
        if broken and self.blamed is None:
            self.blamed = broken, entry
        if not entry.ends_step:
            return
        blamed, self.blamed = self.blamed, None
        if blamed is None:
            self.in_a_row = 0
            return
        names, first = blamed
        names = list(dict.fromkeys([*names, *broken]))
        if "gradient" not in broken:
            rank_zero_warn(f"{', '.join(names)}: not finite in {entry.where}, at weight 0: no part of the step")
            return
        overflow = self.scaler is not None and names == ["gradient"]
        if not overflow and self.on_nonfinite == "stop":
            raise AuditError(f"{', '.join(names)}: not finite in {entry.where}; {self._save(first.batch)}")
        self.skipped += 1
        self.in_a_row += 1
        for config in self.trainer.lr_scheduler_configs:
            step_back(config.scheduler)
        told = f"{', '.join(names)}: not finite in {entry.where}"
        if self.in_a_row >= PATIENCE and not overflow:
            raise AuditError(f"{told}, as in the {PATIENCE - 1} steps before it; {self._save(first.batch)}")
        if self.on_nonfinite == "skip":
            self.module.skipped_steps = self.skipped
            saved = f"; {self._save(first.batch)}" if self.skipped == 1 else ""
            rank_zero_warn(f"{told}: step skipped, the {self.skipped}. of this run{saved}")

    def state_dict(self) -> dict[str, Any]:
        """Judges what is pending first: a checkpoint never holds a step that was not looked at."""
        self._read()
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]

    def _explain(self, entry: Entry, gap: float, signed: float, values: dict[str, float]) -> str:
        """Names the component of weight zero whose raw value is the difference, or those that could be."""
        inactive = [name for name, weight in entry.weights.items() if weight == 0]
        exact = [name for name in inactive if name in values and abs(values[name] - signed) <= 1e-3 * abs(signed)]
        rule = f"the total of {entry.where} differs by {gap:.6g} from the sum of its scaled components"
        if exact:
            return f"routing bypass: {exact[0]} has weight 0 but contributes {signed:.6g}: {rule}"
        suspects = ", ".join(inactive) or "none"
        return f"bypass: {rule}; components of weight 0 that may contribute: {suspects}"

    def _save(self, batch: Batch) -> str:
        if self.directory is None:
            return "no run directory to save the batch in"
        Path(self.directory).mkdir(parents=True, exist_ok=True)
        rank = self.trainer.global_rank
        path = Path(self.directory, f"nonfinite_batch_rank{rank}.pt" if rank else "nonfinite_batch.pt")
        torch.save(batch.to("cpu").plain(), path)
        return f"the batch was saved to {path}"
