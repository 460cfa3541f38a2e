"""Training a layer or an FFN alone, with nothing of the model around it, towards states that the teacher gives.

AdamW with a cosine from its peak to zero, on batches drawn by a seed. Its peak falls with the width, as the sizes of
weights and of steps that change them do [arXiv 2203.03466]. What does not come nearer to its target on the
calibration rows is put back as it was, so a rate that is too high costs time and harms nothing.

Shapes: R rows, L positions, D width, N counted positions.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

STEP_TOKENS = 512  # of a batch
RATE_TIMES_WIDTH = 0.2  # 3.5e-4 at a width of 576, 1.6e-3 at 128
Tell = Callable[[float], None]  # takes the share that is done


def unexplained(states_RLD: Tensor, target_RLD: Tensor, weight_RL: Tensor) -> float:
    """Weighted |states - target|^2 / |target - its mean|^2: 0 where they agree, 1 = no better than a constant.

    Row by row, so that no other state has to be held.

    Args:
        states_RLD: measured.
        target_RLD: what they should be.
        weight_RL: of each position's squared error; those of 0 are not looked at.
    """

    def counted() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for states_LD, target_LD, weight_L in zip(states_RLD, target_RLD, weight_RL, strict=True):
            counts_L = weight_L > 0
            yield states_LD[counts_L].float(), target_LD[counts_L].float(), weight_L[counts_L, None].float()

    total = sum_D = spread = wrong = weight_RL.new_zeros((), dtype=torch.float64)
    for _, target_ND, weight_N1 in counted():
        total = total + weight_N1.sum(dtype=torch.float64)
        sum_D = sum_D + (target_ND * weight_N1).sum(0, dtype=torch.float64)
    mean_D = (sum_D / total).float()
    for states_ND, target_ND, weight_N1 in counted():
        spread = spread + ((target_ND - mean_D).square() * weight_N1).sum(dtype=torch.float64)
        wrong = wrong + ((states_ND - target_ND).square() * weight_N1).sum(dtype=torch.float64)
    return float(wrong / spread.clamp(min=1e-30))


def token_weights(states_RLD: Tensor, counted_RL: Tensor) -> Tensor:
    """1 / mean square of a state [R, L], 0 where it does not count.

    Whatever reads the stream divides by that first, so an error in a state of a thousand times the usual size, which
    many models have at a few tokens, is a thousandth of what it seems; without this it is all that is fitted.
    """
    size_RL = torch.linalg.vector_norm(states_RLD.float(), dim=-1).square() / states_RLD.shape[-1]
    least = 1e-6 * size_RL[counted_RL].mean()
    return counted_RL / size_RL.clamp(min=least)


@dataclass(frozen=True, eq=False)
class Goal:
    """What a layer is to reach.

    Args:
        raw_RLD: the state behind it, in the student's axes.
        raw_weight_RL: of each token's squared error there; 0 = does not count.
        shown_RLD: what its error is measured on: the same, or what the final norm makes of it where it is the last.
        weight_RL: of each token's squared error there.
        gain_D: how much the next layer makes of each channel; None = of all alike.
        last: whether it is the student's last.
    """

    raw_RLD: Tensor
    raw_weight_RL: Tensor
    shown_RLD: Tensor
    weight_RL: Tensor
    gain_D: Tensor | None
    last: bool

    def error(self, states_RLD: Tensor) -> float:
        """The share of the target that states leave unexplained."""
        return unexplained(states_RLD, self.shown_RLD, self.weight_RL)


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
