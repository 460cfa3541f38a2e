"""A resumed run goes on as if it had never been broken off: random numbers, a validation that was cut short, the best.

Whatever wrote the checkpoint, and wherever, the run goes on from the end of the last whole step before.

The sampler's place, the curriculum and the optimizer have their own state. A checkpoint grows by a few kilobytes for
each rank, which are gathered when it is written.

Reads: the generators of torch, Python and numpy, the progress of the validation loop. Writes both when a run resumes.
"""

import random
from pathlib import Path
from typing import Any, final

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from distill.batch import Batch
from distill.errors import UserError
from distill.training.callbacks.measured_on import forget_others, measured_on
from distill.training.lightning_internals import (
    begin_next_epoch,
    begin_validation_again,
    log_under_the_step,
    place_between_steps,
    within_a_step,
)


def random_state() -> dict[str, Any]:
    """The state of every global generator of this process, as tensors and plain values."""
    algorithm, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "python": random.getstate(),
        "numpy": (algorithm, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Puts `random_state` back."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    algorithm, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((algorithm, keys.cpu().numpy().astype(np.uint32), position, has_gauss, gauss))


@final
class ExactResume(Callback):
    """Continues the random numbers of each rank, and begins a validation again that a checkpoint cut short."""

    def __init__(self) -> None:
        self.before_validation: dict[str, Any] | None = None
        self.before_step: dict[str, Any] | None = None  # of the last that has begun
        self.trainer: L.Trainer | None = None
        self.accumulate = 0
        self.loaded: dict[str, Any] | None = None
        self.others: dict[str, Any] = {}  # states of all callbacks in the checkpoint
        self.measured_on: dict[str, str] = {}  # monitored metric -> digest of its rows

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses nodes that would go on from different places, since each one looks for the checkpoint by itself.

        Raises:
            UserError: this process has not found the first one's checkpoint.
        """
        self.trainer = trainer
        mine = None if trainer.ckpt_path is None else str(trainer.ckpt_path)
        first = trainer.strategy.broadcast(mine)
        if mine != first:
            raise UserError(
                f"ckpt_path: {mine} in process {trainer.global_rank}, {first} in the first one: give a path that all "
                "nodes see"
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Notes random numbers before each step, and refuses steps of another size than the first.

        Raises:
            UserError: a callback has changed how many micro-batches make a step.
        """
        if trainer.accumulate_grad_batches != self.accumulate:
            raise UserError(
                f"trainer.accumulate_grad_batches: {trainer.accumulate_grad_batches}, and {self.accumulate} when the "
                "run began, which its schedules and counts take for constant; leave the callback out that changes it"
            )
        log_under_the_step(trainer)
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.before_step = random_state()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.before_validation = random_state()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.before_validation = None

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.others = checkpoint.get("callbacks", {})
        ran = checkpoint.get("distill", {}).get("run", {}).get("trainer", {})
        place_between_steps(checkpoint, ran.get("accumulate_grad_batches", trainer.accumulate_grad_batches))

    def _remember_best(self, trainer: L.Trainer, forgotten: set[Callback]) -> None:
        """The earlier run's best checkpoints stay the ones to beat; Lightning forgets those of another directory."""
        for callback in (one for one in trainer.checkpoint_callbacks if one not in forgotten):
            state = self.others.get(callback.state_key, {})
            kept = state.get("best_k_models")
            if not isinstance(callback, ModelCheckpoint) or callback.best_k_models or not kept:
                continue
            if all(Path(path).exists() for path in kept):
                for name in ("best_model_score", "kth_best_model_path", "kth_value", "best_k_models"):
                    setattr(callback, name, state[name])
                score = f"{callback.monitor} {float(state['best_model_score']):.4f}"
                rank_zero_info(f"Best checkpoint so far, with {score}: {state['best_model_path']}")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.measured_on = measured_on(trainer)
        self.accumulate = trainer.accumulate_grad_batches
        if self.loaded is None:
            return
        self._remember_best(trainer, forget_others(trainer, self.loaded.get("measured_on", {}), self.measured_on))
        if self.loaded["in_validation"]:
            begin_validation_again(trainer)
        begin_next_epoch(trainer)
        ranks = self.loaded["random"]
        if len(ranks) != trainer.world_size:
            rank_zero_warn(
                f"The checkpoint has random states of {len(ranks)} ranks, this run has {trainer.world_size}: "
                "what is drawn, dropout first, differs from the unbroken run."
            )
        set_random_state(ranks[trainer.global_rank % len(ranks)])
        self.loaded = None

    def state_dict(self) -> dict[str, Any]:
        """Collective: every rank's state, before the validation or the step that the checkpoint falls into."""
        within = self.trainer is not None and within_a_step(self.trainer)
        mine = self.before_validation or (self.before_step if within else None) or random_state()
        ranks: list[Any] = [mine]
        if dist.is_initialized():
            ranks = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, mine)
        return {"random": ranks, "in_validation": self.before_validation is not None, "measured_on": self.measured_on}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loaded = state_dict
