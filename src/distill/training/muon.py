"""Muon for the decoder's matrices and AdamW for everything else, as one optimizer.

Lightning steps one optimizer without manual optimisation, checkpoints hold one state, and a schedule scales one list of
groups; so both live here. A Muon update has the size of AdamW's (0.2 per entry before the learning rate), and one
learning rate serves both. It keeps one moment for a matrix where AdamW keeps two, and costs
5 (4 m^2 n + 2 m^3) operations for an m x n matrix with m <= n, whatever the number of tokens.

`torch.optim.Muon` is not used itself: its products are in bf16, many times slower than fp32 on CPUs without units for
it and too coarse for ranks to agree, and it knows no `found_inf`, by which a step that is not finite is dropped without
the host's waiting for it. In bf16, as on GPUs, the updates here equal torch's.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration: the steepest at zero that stays near one
ITERATIONS = 5
UPDATE_RMS = 0.2  # of AdamW's updates


def orthogonal(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix with all singular values near one, by five Newton-Schulz iterations, (..., M, N) -> (..., M, N).

    Args:
        matrix: one, or several of one shape.
        dtype: of the products, and of the result.

    Source:
        Keller Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024.
    """
    a, b, c = COEFFICIENTS
    x = matrix.to(dtype).flatten(0, -3) if matrix.ndim > 3 else matrix.to(dtype)
    product = torch.addmm if x.ndim == 2 else torch.baddbmm
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        gram = product(gram, gram, gram, beta=b, alpha=c)
        x = product(x, gram, x, beta=a)
    return (x.mT if tall else x).reshape(matrix.shape)


def products_of(gradient: Tensor) -> torch.dtype:
    """The dtype in which a gradient's iterations are made: at least fp32 on a CPU, where ranks then agree to rounding;
    bf16 elsewhere, as torch's own Muon has it."""
    if gradient.device.type == "cpu" or gradient.dtype == torch.float64:
        return torch.promote_types(gradient.dtype, torch.float32)
    return torch.bfloat16


class MuonAdamW(torch.optim.Optimizer):
    """Muon over some groups of matrices, AdamW over the other groups.

    Args:
        matrices: groups with `params` (two axes or more: the last two make a matrix), `lr` and `weight_decay`.
        others: groups with `params`, `lr` and `weight_decay`.
        betas: of AdamW.
        fused: AdamW in one kernel for all tensors of a group, which drops steps by `found_inf`.

    Source:
        Learning rates matched by root mean square: Muon is Scalable for LLM Training, arXiv 2502.16982.
    """

    found_inf: Tensor | None = None  # scalar, set before a step: above zero, that step leaves everything as it is

    def __init__(
        self,
        matrices: list[dict[str, Any]],
        others: list[dict[str, Any]],
        betas: tuple[float, float],
        fused: bool,
    ) -> None:
        self._adamw = AdamW(others, betas=betas, fused=fused) if others else None
        groups = [{**group, "betas": betas, "matrices": True} for group in matrices]
        groups += [group | {"matrices": False} for group in (self._adamw.param_groups if self._adamw else [])]
        super().__init__(groups, {})
        self._share()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        """Lets AdamW work on its groups and moments here, after they were made or loaded."""
        if self._adamw is not None:
            self._adamw.param_groups = [group for group in self.param_groups if not group["matrices"]]
            self._adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both, on the gradients that are there.

        Returns:
            What the closure does.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["matrices"]:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._step_matrix(parameter, parameter.grad, group)
        if self._adamw is not None:
            if self.found_inf is not None:
                self._adamw.found_inf = self.found_inf  # type: ignore[attr-defined]
            self._adamw.step()
        return loss

    def _step_matrix(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """B <- mu B + (1 - mu) g;  W <- (1 - lr wd) W - 0.2 lr sqrt(max(M, N)) NS(mu B + (1 - mu) g)"""
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        before, rate = state["momentum_buffer"], float(group["lr"])
        moment = before.lerp(gradient, 1 - MOMENTUM)
        dtype = products_of(gradient)
        update = orthogonal(gradient.lerp(moment, MOMENTUM), dtype).to(parameter.dtype)
        size = UPDATE_RMS * max(parameter.shape[-2:]) ** 0.5
        after = (parameter * (1 - rate * group["weight_decay"])).add_(update, alpha=-rate * size)
        if self.found_inf is not None:
            dropped = self.found_inf > 0
            moment, after = torch.where(dropped, before, moment), torch.where(dropped, parameter, after)
        before.copy_(moment)
        parameter.copy_(after)


def flops(shape: torch.Size) -> float:
    """Operations of one update of a parameter: its matrices' products.

    Example:
        >>> flops(torch.Size([2, 4]))
        400.0
    """
    m, n = sorted(shape[-2:])
    return float(shape[:-2].numel() * ITERATIONS * (4 * m * m * n + 2 * m**3))
