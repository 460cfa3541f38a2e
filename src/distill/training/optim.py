"""Fused AdamW in parameter groups, and warm-up then cosine counted in optimizer steps."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from distill.models.fsdp2 import whole_norm
from distill.training.options import ModelOptions

CONFIGURED = ("initial_lr", "weight_decay", "betas")  # of a parameter group: what the configuration says


def configure(
    options: ModelOptions, rates: list[tuple[nn.Module, float]], horizon: int, fused: bool
) -> tuple[AdamW, LambdaLR]:
    """Optimizer and schedule of a run.

    Args:
        options: of the run.
        rates: what learns, and its peak learning rate.
        horizon: optimizer steps of the run.
        fused: one kernel for all tensors of a group.
    """
    if options.warmup_steps >= horizon:
        rank_zero_warn(f"model.warmup_steps: {options.warmup_steps} outlasts the run of {horizon} steps.")
    optimizer = adamw(rates, weight_decay=options.weight_decay, betas=options.betas, fused=fused)
    return optimizer, warmup_cosine(optimizer, options.warmup_steps, horizon, options.min_learning_rate_ratio)


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
    schedule.base_lrs = [group["initial_lr"] for group in configured]
    for group, options, factor in zip(optimizer.param_groups, configured, schedule.lr_lambdas, strict=True):
        group |= options
        group["lr"] = options["initial_lr"] * factor(schedule.last_epoch)


def step_back(schedule: Any) -> None:
    """Takes one step of the schedule back, for an optimizer step that was dropped."""
    if not isinstance(schedule, LambdaLR):
        return
    schedule.last_epoch -= 1
    rates = zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
    for group, base, factor in rates:
        group["lr"] = base * factor(schedule.last_epoch)
    schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]


def clip_gradients(optimizer: torch.optim.Optimizer, value: float | None, algorithm: str | None) -> Tensor:
    """Clips the optimizer's gradients by norm or value, where a value is given; their norm before, scalar."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = whole_norm(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    if value and algorithm == "value":
        nn.utils.clip_grad_value_(parameters, value)
    elif value:
        nn.utils.clip_grads_with_norm_(parameters, value, norm)
    return norm
