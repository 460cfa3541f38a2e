"""One breakdown of one loss: whoever prints, logs or audits a loss reads it here and computes nothing again.

The values stay on the device as detached tensors: reading one on the host makes the host wait.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossBreakdown:
    """What a loss is made of: raw x weight = scaled, and the scaled values add up to the total.

    Args:
        raw: component -> value before the curriculum, detached scalar, nats per token unless the component says
            otherwise. Components of weight zero appear only where they were measured.
        weights: component -> the curriculum's weight now, for every configured component.
    """

    raw: dict[str, Tensor]
    weights: dict[str, float]

    @cached_property
    def scaled(self) -> dict[str, Tensor]:
        """Component -> raw x weight, for the components with a weight above zero."""
        return {name: value * self.weights[name] for name, value in self.raw.items() if self.weights[name] > 0}

    @cached_property
    def total(self) -> Tensor:
        """Sum of the scaled values."""
        if not self.scaled:
            return next((value.new_zeros(()) for value in self.raw.values()), torch.zeros(()))
        return torch.stack([value.double() for value in self.scaled.values()]).sum()

    @property
    def active(self) -> list[str]:
        """Components with a weight above zero, in listing order."""
        return [name for name, weight in self.weights.items() if weight > 0]
