"""What a whole validation was: each loss added up over batches and ranks in float64, and divided once."""

from collections.abc import Mapping

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from distill.breakdown import LossBreakdown


class ValidationSums:
    """Adds up the losses of a validation's batches.

    Args:
        units: loss -> the kind of unit that it is a mean over.
    """

    def __init__(self, units: Mapping[str, str]) -> None:
        self.units = dict(units)
        self._sums = torch.zeros(0)

    def reset(self, device: torch.device) -> None:
        """Begins a validation."""
        self._sums = torch.zeros(2, len(self.units), dtype=torch.float64, device=device)

    def add(self, breakdown: LossBreakdown, units: Mapping[str, int]) -> None:
        """Adds a batch, whose raw values are means over the counts of `units`."""
        for index, (name, unit) in enumerate(self.units.items()):
            if name in breakdown.raw:
                self._sums[0, index] += breakdown.raw[name].double() * units[unit]
                self._sums[1, index] += units[unit]

    def whole(self, strategy: Strategy, weights: dict[str, float]) -> LossBreakdown:
        """The breakdown of the whole validation over all ranks."""
        sums, counts = strategy.reduce(self._sums, reduce_op="sum")
        means: tuple[Tensor, ...] = (sums / counts.clamp(min=1)).unbind()
        raw = {name: mean for name, mean in zip(self.units, means, strict=True) if weights[name] > 0}
        return LossBreakdown(raw, weights)
