"""Training a layer or an FFN alone, with nothing of the model around it, towards states that the teacher gives.

AdamW with a cosine from its peak to zero, on batches drawn by a seed. What does not come nearer to its target on the
calibration rows is put back as it was, so a rate that is too high costs time and harms nothing.

Shapes: R rows, L positions, D width, N counted positions.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

STEP_TOKENS = 512  # of a batch
Tell = Callable[[float], None]  # takes the share that is done


def unexplained(states_ND: Tensor, target_ND: Tensor) -> float:
    """|states - target|^2 / |target - its mean|^2: 0 where they agree, 1 = no better than a constant."""
    states_ND, target_ND = states_ND.float(), target_ND.float()
    spread = (target_ND - target_ND.mean(0)).square().sum(dtype=torch.float64)
    return float((states_ND - target_ND).square().sum(dtype=torch.float64) / spread.clamp(min=1e-30))


def train_alone(
    module: nn.Module,
    loss_of: Callable[[int], Tensor],
    steps: int,
    learning_rate: float,
    tell: Tell = lambda share: None,
) -> None:
    """Minimises a loss over a module's parameters.

    Args:
        module: its parameters are trained, in place.
        loss_of: loss of a step.
        steps: optimizer steps.
        learning_rate: peak.
        tell: told the share of the steps that is done.
    """
    parameters = list(module.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    with torch.enable_grad():
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            loss = loss_of(step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            tell((step + 1) / steps)
    optimizer.zero_grad(set_to_none=True)


def batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Indices in batches of `size` without end, every one once before any comes twice."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.long)
    while True:
        while len(left) < size:
            left = torch.cat([left, torch.randperm(count, generator=generator)])
        batch, left = left.split([size, len(left) - size])
        yield batch


class Kept:
    """A module's parameters as they were, to be put back."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._values = {name: value.detach().clone() for name, value in module.named_parameters()}

    @torch.no_grad()
    def put_back(self) -> None:
        """Undoes what was done since."""
        for name, value in self._module.named_parameters():
            value.copy_(self._values[name])
