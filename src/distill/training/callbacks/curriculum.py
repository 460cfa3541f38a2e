"""The curriculum lives in one callback, and the module is given its state: a validation cannot weigh otherwise.

Reads: `trainer.global_step`, `trainer.estimated_stepping_batches`, `pl_module.components`.
Writes: `pl_module.curriculum`. Logs: `curriculum/<key>`.
"""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from distill.batch import Batch
from distill.curriculum import CurriculumState, Schedule, Schedules, round_half_up
from distill.errors import UserError
from distill.training.horizon import horizon_of
from distill.training.module import DistillationModule, distilled


class Curriculum(Callback):
    """Sets loss weights, KD temperature and routed experts before each batch from the share of the training done.

    Args:
        args: those of `distill.curriculum.Schedules`, in its order.
        kwargs: those of `Schedules`, the keys of `curriculum:`.

    Raises:
        UserError: a value or its knots out of range.

    Example:
        >>> Curriculum(kd=1.0, lm=0.0).state_at(step=45, horizon=100).weights["feature"]
        0.05
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.schedules = Schedules(*args, **kwargs)
        self.step = 0
        self.horizon: int | None = None

    @property
    def weights(self) -> dict[str, Schedule]:
        """Weight key -> schedule."""
        return self.schedules.weights

    @property
    def temperature(self) -> Schedule:
        """Of the KD softmaxes."""
        return self.schedules.temperature

    @property
    def top_k_experts(self) -> Schedule | None:
        """Experts a token is routed to."""
        return self.schedules.top_k_experts

    def state_at(self, step: int, horizon: int | None) -> CurriculumState:
        """The state before optimizer step `step` of `horizon`."""
        return self.schedules.state_at(step, horizon)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses a weight that the user set for a loss that the module does not have."""
        module = distilled(pl_module)
        if (unheard := self.schedules.unheard(module.components)) is not None:
            key, schedule, losses = unheard
            raise UserError(
                f"curriculum.{key}: {schedule} weighs nothing here: configure {', '.join(losses)} on the model, or "
                "leave it out"
            )
        self._set(module)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module = distilled(pl_module)
        horizon = horizon_of(trainer)
        self._check_experts(module.num_experts)
        if self.horizon not in (None, horizon):
            rank_zero_warn(
                f"The curriculum's horizon was {self.horizon} steps in the checkpoint and is {horizon} now: "
                "its phases move with it."
            )
        self.horizon = horizon

    def _check_experts(self, num_experts: int | None) -> None:
        if self.top_k_experts is None:
            return
        knots = self.top_k_experts if isinstance(self.top_k_experts, list) else [[0.0, self.top_k_experts]]
        peak = round_half_up(max(value for _, value in knots))
        if num_experts is None:
            raise UserError(
                f"curriculum.top_k_experts: {peak} routes nothing here: configure model.routing, or leave it out"
            )
        if peak > num_experts:
            raise UserError(
                f"curriculum.top_k_experts: {peak} is above the teacher's {num_experts} experts: give at most those"
            )

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.step = trainer.global_step
        self._set(distilled(pl_module))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self.step = trainer.global_step
        self._set(distilled(pl_module))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._set(distilled(pl_module))

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._set(distilled(pl_module))

    def _set(self, module: DistillationModule) -> None:
        state = self.state_at(self.step, self.horizon)
        if module.curriculum != state:
            module.curriculum = state

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "horizon": self.horizon, "temperature": self.temperature}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where the checkpoint stands.

        Raises:
            UserError: it was made at another temperature, so that its losses would not compare.
        """
        if state_dict["temperature"] != self.temperature:
            raise UserError(
                f"curriculum.temperature: {self.temperature}, but the checkpoint was made with "
                f"{state_dict['temperature']}: use that, or start anew from the student's weights"
            )
        self.step, self.horizon = state_dict["step"], state_dict["horizon"]
