"""The Lightning module: one function computes the losses of training and validation alike, everybody else reads them.

Each loss is a sum over its units divided by their number in the whole optimizer step, which the batch carries; so any
split of a step over micro-batches and ranks has the same gradient, without communication. It needs batches of a
datamodule that counts ahead.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.batch import Batch
from distill.breakdown import LossBreakdown
from distill.checkpoints import contents
from distill.curriculum import WEIGHT_KEY, WEIGHT_KEYS, CurriculumState
from distill.errors import UserError
from distill.losses.component import Component
from distill.models.fsdp2 import check_sharded
from distill.teachers.source import TargetSource
from distill.training.build import build, max_context
from distill.training.callbacks.refused import check_callbacks
from distill.training.entry import entry, settings
from distill.training.horizon import horizon_of
from distill.training.idle import IdleParameters
from distill.training.lightning_internals import (
    averaged,
    callbacks_of,
    cast_as_loading_does,
    leave_batches_as_they_are,
    load_loader_states,
    log_each_step_alone,
    stop_between_steps,
    validate_between_steps,
)
from distill.training.objective import Losses, objective
from distill.training.optim import CONFIGURED, clip_gradients, configuration_wins, configure
from distill.training.options import ModelOptions
from distill.training.start import write_record
from distill.training.step_sums import StepSums, on_host, step_figures
from distill.training.validation_sums import ValidationSums, names_of


class DistillationModule(L.LightningModule):
    """Distils a frozen teacher into a student with the losses and weights that the curriculum says.

    Weights and temperature are constant, 1, in a trainer without a `Curriculum()`. The command has that, `LossAudit()`,
    `LastCheckpoint()` and the dumps, and its trainer is `DistillTrainer`; `ExactResume()` comes with the module.

    Args:
        args: those of `ModelOptions`, in its order.
        kwargs: those of `ModelOptions`, the keys of `model:`.

    Raises:
        UserError: options that cannot be meant, or not together.

    Example:
        >>> from distill import KDLoss
        >>> DistillationModule("Qwen/Qwen3-0.6B", student_layers=14, kd_loss=KDLoss("reverse_kl")).components
        ['kd_loss', 'lm_loss']
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.options = ModelOptions(*args, **kwargs)
        self.components: list[str] = self.options.losses
        self.features: list[Component] = list(self.options.components.values())
        for key, component in self.options.components.items():
            setattr(self, key, component)  # registers those that have parameters
        self.curriculum = CurriculumState(0, 0.0, dict.fromkeys(WEIGHT_KEYS, 1.0), 1.0, None)
        self.step_is_read = False
        self.drop_nonfinite = False
        self.skipped_steps: int | None = None
        self.measure_inactive: frozenset[str] = frozenset()
        self.student: PreTrainedModel | None = None
        self.teacher: TargetSource | None = None
        self.made: dict[str, Any] | None = None  # how the student was, where it was cut and fitted
        self.grad_norm: Tensor | None = None
        self._validation_sums = ValidationSums(self.options.units)
        self._sums = StepSums()
        self._horizon = 0
        self._configured: list[dict[str, Any]] = []
        self._idle: IdleParameters | None = None

    # Set-up

    def configure_callbacks(self) -> list[Callback]:
        """`ExactResume()` and `SomethingTrained()`, where the trainer has none; refuses what would bend the run."""
        from distill.training.callbacks.resume import ExactResume  # which knows this module
        from distill.training.callbacks.trained import SomethingTrained

        check_callbacks(callbacks_of(self.trainer, Callback))
        return [kind() for kind in (ExactResume, SomethingTrained) if not callbacks_of(self.trainer, kind)]

    def setup(self, stage: str) -> None:
        leave_batches_as_they_are(self.trainer)
        cast_as_loading_does(self.trainer)

    @property
    def teacher_source(self) -> str:
        """Where the teacher comes from, whose tokenizer the data is read with."""
        return self.options.teacher

    @property
    def load_options(self) -> dict[str, bool]:
        """What may come with weights."""
        return self.options.load_options

    @cached_property
    def max_context(self) -> int | None:
        """The shorter of the two models' contexts, in tokens; None = unlimited."""
        return max_context(self.options)

    @property
    def auxiliaries(self) -> list[nn.Module]:
        """The modules that are trained beside the student and thrown away after."""
        return [component for component in self.features if isinstance(component, nn.Module)]

    @property
    def num_experts(self) -> int | None:
        """Experts (or slices) of the teacher's routed layers, None without routing."""
        return next((n for component in self.features if (n := component.routed_experts) is not None), None)

    def configure_model(self) -> None:
        """Loads both models, once; the student is built here so that a strategy can place it."""
        if self.student is not None:
            return
        with torch.device("cpu"):  # Lightning's is the GPU, where transformers would ask for accelerate
            self.student, self.teacher, self.made = build(self.options, self.trainer)
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            check_sharded(self)
        # All ranks hold the same in the components' buffers: DDP need not send them around before each forward pass.
        self._ddp_params_and_buffers_to_ignore = [
            f"{key}.{name}"
            for key, component in self.options.components.items()
            if isinstance(component, nn.Module)
            for name, _ in component.named_buffers()
        ]
        self._idle = IdleParameters(self.student, self.features)

    def on_fit_start(self) -> None:
        from distill.training.callbacks.curriculum import Curriculum  # which knows this module

        if not callbacks_of(self.trainer, Curriculum):
            rank_zero_info("No Curriculum among the callbacks: every loss weighs 1 throughout, at temperature 1.")
        self._place_teacher()
        folder = self.trainer.log_dir  # which all ranks must ask for
        if self.made is not None and folder is not None and self.trainer.is_global_zero:
            write_record(Path(folder), self.made)

    def on_validation_start(self) -> None:
        self._place_teacher()
        self._sums.throughput.pause()

    def on_validation_end(self) -> None:
        self._sums.throughput.resume()

    def on_test_start(self) -> None:
        self._place_teacher()

    def _place_teacher(self) -> None:
        assert self.teacher is not None
        self.teacher.to(self.device)

    # Losses

    def component_weights(self) -> dict[str, float]:
        """Configured loss -> the curriculum's weight now, in listing order."""
        return {name: self.curriculum.weights[WEIGHT_KEY[name]] for name in self.components}

    def losses(self, batch: Batch, share: float, metrics: bool = False, components: list[str] | None = None) -> Losses:
        """The objective of a batch with the curriculum's state now, of some losses or all; see `objective`."""
        assert self.student is not None
        assert self.teacher is not None
        return objective(
            batch,
            self.student,
            self.teacher,
            self.components if components is None else components,
            self.curriculum,
            share,
            kd=self.options.kd_loss,
            components=self.features,
            chunk_size=self.options.chunk_size,
            measure_inactive=self.measure_inactive,
            metrics=metrics,
        )

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Loss and breakdown of a micro-batch, and of its whole optimizer step where somebody reads that.

        Returns:
            `loss` for Lightning, which divides it by the accumulation; `total`, the same before that; `breakdown` of
            this micro-batch; `step`, the breakdown of the whole optimizer step over all ranks, on a window's last
            micro-batch where a logger or a dump reads it, else None.
        """
        assert self._idle is not None
        accumulation = self.trainer.accumulate_grad_batches
        result = self.losses(batch, share=accumulation * self.trainer.world_size)
        total, breakdown = result.total, result.breakdown
        due = self.step_is_read or self._logs_this_step()
        self.step_is_read, self.measure_inactive = False, frozenset()
        needed = isinstance(self.trainer.strategy, DDPStrategy) or not total.requires_grad
        total = self._idle.anchored(total, self.component_weights() if needed else None)
        total = total * (1 + 0 * total.detach())  # where it is not finite, neither is any of its gradient
        window = batch_idx % accumulation == 0, (batch_idx + 1) % accumulation == 0 or self.trainer.is_last_batch
        whole = self._sums.step(result, batch, accumulation, window, due)
        if whole is not None and self._logs_this_step():
            self._log_step(*whole)
        step = None if whole is None else whole[0]
        return {"loss": total, "total": total.detach(), "breakdown": breakdown, "step": step}

    def _logs_this_step(self) -> bool:
        """Whether loggers take what this optimizer step logs: every so many, and the last, which Lightning always does.

        The others do without: `log` costs most of a millisecond an entry.
        """
        every, step = self.trainer.log_every_n_steps, self.trainer.global_step + 1  # type: ignore[attr-defined]
        return step == self._horizon or (every > 0 and step % every == 0)

    def _log_step(self, step: LossBreakdown, stats: dict[str, Tensor]) -> None:
        """Logs the optimizer step under the names of the metrics table."""
        figures: dict[str, Any] = step_figures(step, self.curriculum)
        for component in self.features:
            figures |= component.figures(self.curriculum)
        figures["train/lr"] = self.trainer.optimizers[0].param_groups[0]["lr"]  # the student's, of this step
        figures |= self._sums.throughput.figures(self.device) | stats
        if self.skipped_steps is not None:
            figures["train/skipped_steps"] = float(self.skipped_steps)
        logged = on_host(figures)
        self.log_dict(logged)
        self.log("loss", logged["train/loss"], prog_bar=True, logger=False)

    # Validation

    def on_validation_epoch_start(self) -> None:
        loaders = self.trainer.test_dataloaders if self.trainer.testing else self.trainer.val_dataloaders
        self._validation_sums.reset(self.device, names_of(loaders))

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Loss and breakdown of a batch with the weights, temperature and masks of the training step before it.

        Returns:
            `total` and `breakdown`, as the training step does.
        """
        result = self.losses(batch, share=1.0, metrics=True)
        assert result.token_stats is not None
        self._validation_sums.add(dataloader_idx, result.breakdown, result.token_stats, batch)
        return {"total": result.total.detach(), "breakdown": result.breakdown}

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self._validation_sums.figures(self.trainer.strategy, self.component_weights()))

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    # Optimisation

    def configure_optimizers(self) -> Any:
        """AdamW or Muon with warm-up and cosine over optimizer steps."""
        assert self.student is not None
        self._horizon = horizon_of(self.trainer)
        fused = self.trainer.precision != "16-mixed"  # whose scaler drops steps itself
        optimizer, schedule = configure(self.options, self.student, self.auxiliaries, self._horizon, fused)
        self._configured = [{key: group[key] for key in CONFIGURED} for group in optimizer.param_groups]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """Puts right what Lightning restores otherwise than one should expect of a resumed run."""
        trainer = self.trainer
        load_loader_states(trainer)
        for optimizer, scheduler in zip(trainer.optimizers, trainer.lr_scheduler_configs, strict=True):
            configuration_wins(optimizer, scheduler.scheduler, self._configured)
        stop_between_steps(trainer)
        validate_between_steps(trainer, self._horizon)
        log_each_step_alone(trainer)
        self._sums = StepSums()

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Asks for a validation after the last step, which Lightning omits where the run ends between two of them."""
        if self.trainer.global_step >= self._horizon:
            self.trainer.should_stop = True

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        assert self._idle is not None
        self._idle.forget()

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Lets go of gradients once they are used, or they would lie beside the next step's activations."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by norm or value; the norm before clipping is logged as `train/grad_norm` and read by the audit."""
        norm = clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        self.grad_norm = norm.to(self.device)  # that of no gradients is on the CPU
        if self.drop_nonfinite:
            optimizer.found_inf = (~self.grad_norm.isfinite()).float()  # type: ignore[attr-defined]  # of fused AdamW and Muon
        if self._logs_this_step():
            self.log("train/grad_norm", self.grad_norm)

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert self.student is not None
        teacher = self.teacher.model if self.teacher is not None else None
        saved: Any = averaged(self.trainer) or self
        checkpoint["distill"] = entry(self.options, saved.student, teacher, self.trainer, self.made)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        contents.check(checkpoint, settings(self.options, self.trainer), self.state_dict())
        contents.check_goes_on(checkpoint, self.trainer)
        self.made = checkpoint["distill"].get("run", {}).get("student_fit")

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Not offered: a checkpoint has no teacher.

        Raises:
            UserError: says what loads the student, and what goes on with a run.
        """
        raise UserError(
            f"load_from_checkpoint: {checkpoint_path} has no teacher to go on with; distill.load_student(path).model "
            "is its student, and trainer.fit(module, data, ckpt_path=path) goes on with its run"
        )


def distilled(module: L.LightningModule) -> DistillationModule:
    """A module that callbacks of ours were given, known to be the one that they work with.

    Raises:
        UserError: it is another.
    """
    if not isinstance(module, DistillationModule):
        raise UserError(f"callbacks: those of distill read a DistillationModule, not a {type(module).__name__}")
    return module
