"""Fused AdamW in parameter groups, and warm-up then cosine counted in optimizer steps."""

import math
from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from distill.errors import UserError

CONFIGURED = ("lr", "weight_decay", "betas")  # of a parameter group: what the configuration says


def horizon_of(trainer: L.Trainer) -> int:
    """Optimizer steps of the whole run.

    Raises:
        UserError: a run without an end has no progress to schedule by.
    """
    steps = trainer.estimated_stepping_batches
    if not math.isfinite(steps) or steps <= 0:
        raise UserError(f"trainer.max_steps: a horizon of {steps} steps leaves nothing to schedule by: set max_steps")
    return int(steps)


def check_validation_interval(interval: float, batches: float) -> None:
    """Refuses a run that would never validate within an epoch.

    Args:
        interval: `val_check_interval`; a share of an epoch, or an int, micro-batches.
        batches: micro-batches of an epoch on one rank.

    Raises:
        UserError: the interval is longer than the epoch.
    """
    if isinstance(interval, int) and interval > batches:
        raise UserError(
            f"trainer.val_check_interval: {interval} micro-batches are more than an epoch's {batches}; set "
            "trainer.check_val_every_n_epoch: null, or a smaller one"
        )


def validate_between_steps(trainer: L.Trainer) -> None:
    """From now on a validation that falls due within an accumulation window waits for the window's end.

    Lightning counts micro-batches, whatever an optimizer step is, and a checkpoint written within a window would lose
    the gradients of its micro-batches. What is due is a function of the place alone, so a resumed run finds the same.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    due = type(loop)._should_check_val_fx.__get__(loop)

    def due_by_now(fetcher: Any) -> bool:
        if loop._should_accumulate() and not trainer.should_stop:
            return False
        if due(fetcher):
            return True
        every = trainer.val_check_batch
        if every is None or not loop._should_check_val_epoch():  # None: by the clock, whose time stays up
            return False
        count = 1 + (loop.total_batch_idx if trainer.check_val_every_n_epoch is None else loop.batch_idx)
        return count >= every and count % every <= loop.batch_idx % trainer.accumulate_grad_batches

    loop._should_check_val_fx = due_by_now


def adamw(
    modules: Iterable[tuple[nn.Module | None, float]],
    weight_decay: float,
    betas: tuple[float, float],
    fused: bool,
) -> AdamW:
    """AdamW over `(module, learning rate)` pairs, without decay on norms and biases (all parameters of one axis)."""
    groups = []
    for module, rate in modules:
        trainable = [p for p in module.parameters() if p.requires_grad] if module is not None else []
        for decay, parameters in (
            (weight_decay, [p for p in trainable if p.ndim > 1]),
            (0.0, [p for p in trainable if p.ndim <= 1]),
        ):
            if parameters:
                groups.append({"params": parameters, "lr": rate, "weight_decay": decay})
    return AdamW(groups, betas=betas, fused=fused)


def warmup_cosine(optimizer: torch.optim.Optimizer, warmup: int, horizon: int, floor: float) -> LambdaLR:
    """Linear warm-up over `warmup` optimizer steps, then a cosine to `floor` x the peak at step `horizon`.

    The first step already has 1 / (warmup + 1) of the peak: a rate of zero trains nothing.
    """

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        share = min((step - warmup) / max(horizon - warmup, 1), 1.0)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share))

    return LambdaLR(optimizer, factor)


def configuration_wins(optimizer: torch.optim.Optimizer, schedule: Any, configured: list[dict[str, Any]]) -> None:
    """Puts rates, decay and betas back to the configuration's after a checkpoint's state was loaded over them."""
    if not isinstance(schedule, LambdaLR):
        return
    schedule.base_lrs = [group["lr"] for group in configured]
    for group, options, factor in zip(optimizer.param_groups, configured, schedule.lr_lambdas, strict=True):
        group |= options
        group["initial_lr"] = options["lr"]
        group["lr"] = options["lr"] * factor(schedule.last_epoch)


def step_back(schedule: Any) -> None:
    """Takes one step of the schedule back, for an optimizer step that was dropped."""
    if not isinstance(schedule, LambdaLR):
        return
    schedule.last_epoch -= 1
    rates = zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
    for group, base, factor in rates:
        group["lr"] = base * factor(schedule.last_epoch)
    schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]
