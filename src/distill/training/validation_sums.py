"""What a whole validation was: sums over batches and ranks in float64, divided once.

There may be several sets of rows, each with a loader of its own. Weight-free metrics are found on each of them; losses
and their total are the first one's, since the weights that they carry say nothing about other text.
"""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from distill.batch import Batch
from distill.breakdown import LossBreakdown
from distill.losses.engine.metrics import DistillationMetrics, TokenStats


class ValidationSums:
    """Adds up the losses and metrics of a validation's batches.

    Args:
        units: loss -> the kind of unit that it is a mean over.
    """

    def __init__(self, units: Mapping[str, str]) -> None:
        self.units = dict(units)
        self._sums = torch.zeros(0)
        self._names: list[str] = []
        self._metrics: list[DistillationMetrics] = []

    def reset(self, device: torch.device, names: list[str]) -> None:
        """Begins a validation on sets of these names."""
        self._sums = torch.zeros(2, len(self.units), dtype=torch.float64, device=device)
        self._names, self._metrics = names, [DistillationMetrics().to(device) for _ in names]

    def add(self, place: int, breakdown: LossBreakdown, stats: TokenStats, batch: Batch) -> None:
        """Adds a batch of the set at `place`, whose raw losses are means over the counts of the batch's units."""
        self._metrics[place].update(stats, batch.bytes)
        if place > 0:
            return
        for index, (name, unit) in enumerate(self.units.items()):
            if name in breakdown.raw:
                self._sums[0, index] += breakdown.raw[name].double() * batch.count(unit)
                self._sums[1, index] += batch.count(unit)

    def figures(self, strategy: Strategy, weights: dict[str, float]) -> dict[str, Tensor]:
        """The validation over all ranks by the names of the metrics table; collective."""
        sums, counts = strategy.reduce(self._sums, reduce_op="sum")
        means: tuple[Tensor, ...] = (sums / counts.clamp(min=1)).unbind()
        raw = {name: mean for name, mean in zip(self.units, means, strict=True) if weights[name] > 0}
        figures = {"val/loss": LossBreakdown(raw, weights).total}
        figures |= {f"val/{name}": value for name, value in raw.items()}
        for place, (name, metrics) in enumerate(zip(self._names, self._metrics, strict=True)):
            found = metrics.compute()
            if place == 0:
                figures |= {f"val/{metric}": value for metric, value in found.items()}
            if name:
                figures |= {f"val/{name}/{metric}": value for metric, value in found.items()}
        return figures


def names_of(loaders: Any) -> list[str]:
    """The names of validation sets, by the loaders that a trainer was given: keys, or numbers; one alone has none.

    Example:
        >>> names_of({"in_domain": [], "wiki": []}), names_of([[], []])
        (['in_domain', 'wiki'], ['0', '1'])
    """
    if isinstance(loaders, dict):
        return list(loaders)
    return [str(place) for place in range(len(loaders))] if isinstance(loaders, list) else [""]
