"""AdamW or Muon in parameter groups, and warm-up then cosine counted in optimizer steps."""

import math
from collections.abc import Collection, Iterable
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from distill.models.fsdp2 import whole_norm
from distill.training.muon import MuonAdamW
from distill.training.options import ModelOptions

CONFIGURED = ("initial_lr", "weight_decay", "betas")  # of a parameter group: what the configuration says


def configure(
    options: ModelOptions, student: PreTrainedModel, auxiliaries: Iterable[nn.Module], horizon: int, fused: bool
) -> tuple[Optimizer, LambdaLR]:
    """Optimizer and schedule of a run.

    Args:
        options: of the run.
        student: trained at `learning_rate`.
        auxiliaries: trained at `router_learning_rate`, by AdamW.
        horizon: optimizer steps of the run.
        fused: AdamW in one kernel for all tensors of a group.
    """
    if options.warmup_steps >= horizon:
        rank_zero_warn(f"model.warmup_steps: {options.warmup_steps} outlasts the run of {horizon} steps.")
    decay, betas = options.weight_decay, options.betas
    rates = [(student, options.learning_rate), *((module, options.router_rate) for module in auxiliaries)]
    if options.optimizer == "muon":
        matrices = {id(parameter): parameter for parameter in matrices_of(student)}
        groups = decay_groups(rates, decay, leave_out=matrices)
        own = {"params": list(matrices.values()), "lr": options.learning_rate, "weight_decay": decay}
        optimizer: Optimizer = MuonAdamW([own] if matrices else [], groups, betas, fused)
    else:
        optimizer = AdamW(decay_groups(rates, decay), betas=betas, fused=fused)
    return optimizer, warmup_cosine(optimizer, options.warmup_steps, horizon, options.min_learning_rate_ratio)


def matrices_of(student: PreTrainedModel) -> list[nn.Parameter]:
    """The decoder's trainable matrices, stacks of experts too; neither embeddings nor what a head shares with them."""
    tables = [student.get_input_embeddings(), student.get_output_embeddings()]
    others = {id(p) for table in tables if isinstance(table, nn.Module) for p in table.parameters()}
    others |= {id(p) for module in student.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    learning = (p for p in student.get_decoder().parameters() if p.requires_grad and p.ndim > 1)
    return [parameter for parameter in learning if id(parameter) not in others]


def decay_groups(
    modules: Iterable[tuple[nn.Module, float]], weight_decay: float, leave_out: Collection[int] = ()
) -> list[dict[str, Any]]:
    """Parameter groups of `(module, learning rate)` pairs, without decay on norms and biases (those of one axis).

    Args:
        modules: what learns, and how fast.
        weight_decay: of the others.
        leave_out: `id` of parameters that another optimizer moves.
    """
    groups = []
    for module, rate in modules:
        trainable = [p for p in module.parameters() if p.requires_grad and id(p) not in leave_out]
        for decay, parameters in (
            (weight_decay, [p for p in trainable if p.ndim > 1]),
            (0.0, [p for p in trainable if p.ndim <= 1]),
        ):
            if parameters:
                groups.append({"params": parameters, "lr": rate, "weight_decay": decay})
    return groups


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
