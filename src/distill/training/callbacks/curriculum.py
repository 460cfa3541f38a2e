"""The curriculum lives in one callback, and the module is given its state: a validation cannot weigh otherwise.

Reads: `trainer.global_step`, `trainer.estimated_stepping_batches`, `pl_module.components`.
Writes: `pl_module.curriculum`. Logs: `curriculum/<key>`.
"""

import inspect
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from distill.batch import Batch
from distill.curriculum import (
    WEIGHT_KEY,
    WEIGHT_KEYS,
    CurriculumState,
    Schedule,
    check_schedule,
    round_half_up,
    value_at,
)
from distill.errors import UserError
from distill.training.horizon import horizon_of
from distill.training.module import DistillationModule, distilled


class Curriculum(Callback):
    """Sets loss weights, KD temperature and routed experts before each batch from the share of the training done.

    The default is the three-phase curriculum; no published result supports exactly these phases.

    Args:
        kd: weight of `kd_loss`. Each entry is a number or a list of `[progress, value]` knots, linear between them.
        lm: weight of `lm_loss`.
        feature: weight of routing feature matching, expert importance and load balancing.
        attention: weight of routing attention alignment and attention transfer.
        layerwise: weight of `layerwise_loss`.
        contrastive: weight of `contrastive_loss`.
        temperature: of the KD softmaxes.
        top_k_experts: experts a token is routed to, rounded half up; null = the teacher's native number.

    Raises:
        UserError: a value or its knots out of range.

    Example:
        >>> Curriculum(kd=1.0, lm=0.0).state_at(step=45, horizon=100).weights["feature"]
        0.05
    """

    def __init__(
        self,
        kd: Schedule = 0.7,
        lm: Schedule = 0.3,
        feature: Schedule = [[0.3, 0.0], [0.6, 0.1]],  # noqa: B006  (never changed, and --print_config shows it)
        attention: Schedule = [[0.3, 0.0], [0.6, 0.1]],  # noqa: B006
        layerwise: Schedule = [[0.6, 0.0], [1.0, 0.05]],  # noqa: B006
        contrastive: Schedule = [[0.6, 0.0], [1.0, 0.05]],  # noqa: B006
        temperature: Schedule = 2.0,
        top_k_experts: Schedule | None = None,
    ) -> None:
        self.weights = dict(zip(WEIGHT_KEYS, (kd, lm, feature, attention, layerwise, contrastive), strict=True))
        self.temperature = temperature
        self.top_k_experts = top_k_experts
        for key, schedule in self.weights.items():
            check_schedule(key, schedule)
        check_schedule("temperature", temperature, exclusive=True)
        if top_k_experts is not None:
            check_schedule("top_k_experts", top_k_experts, minimum=1.0)
        self.step = 0
        self.horizon: int | None = None

    def state_at(self, step: int, horizon: int | None) -> CurriculumState:
        """The state before optimizer step `step` of `horizon`."""
        progress = min(max(step / horizon, 0.0), 1.0) if horizon else 0.0
        experts = self.top_k_experts
        return CurriculumState(
            step=step,
            progress=progress,
            weights={key: value_at(schedule, progress) for key, schedule in self.weights.items()},
            temperature=value_at(self.temperature, progress),
            top_k_experts=None if experts is None else round_half_up(value_at(experts, progress)),
        )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses a weight that the user set for a component that the module does not have."""
        module = distilled(pl_module)
        present = {WEIGHT_KEY[name] for name in module.components}
        for key, schedule in self.weights.items():
            default = inspect.signature(type(self)).parameters[key].default
            peak = max(knot[1] for knot in schedule) if isinstance(schedule, list) else schedule
            if key not in present and schedule != default and peak > 0:
                names = ", ".join(name for name, weight_key in WEIGHT_KEY.items() if weight_key == key)
                raise UserError(
                    f"curriculum.{key}: {schedule} weighs nothing here: configure {names} on the model, or leave it out"
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
