"""Parameters that no component of weight above zero trains now.

DDP wants to find every parameter in the graph, so these are tied to the loss with a factor of zero, and lose their
gradient before the optimizer's step: AdamW must neither move nor decay what nothing trains. Of the student these can
only be found by asking autograd, which takes one more backward pass for each set of active components that has neither
`kd_loss` nor `lm_loss`.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from distill.losses.component import Component
from distill.models.fsdp2 import local_sum


class IdleParameters:
    """Finds the parameters that no active component trains.

    Args:
        student: trained.
        components: whose projections and probes are trained beside it.
    """

    def __init__(self, student: nn.Module, components: Iterable[Component]) -> None:
        self.student, self.components = student, list(components)
        self._anchored: list[nn.Parameter] = []
        self._of_student: dict[tuple[str, ...], list[nn.Parameter]] = {}

    def __call__(self, weights: dict[str, float], total: Tensor) -> list[nn.Parameter]:
        """The idle ones under these component weights; `total` is the loss that they gave."""
        active = tuple(name for name, weight in weights.items() if weight > 0)
        idle: list[nn.Parameter] = []
        for component in self.components:
            if isinstance(component, nn.Module):
                used = {id(p) for name in active for p in component.trained_by(name)}
                idle += [parameter for parameter in component.parameters() if id(parameter) not in used]
        if "kd_loss" in active or "lm_loss" in active:
            return idle
        if active not in self._of_student:
            trained = [p for p in self.student.parameters() if p.requires_grad]
            if total.requires_grad:
                found = torch.autograd.grad(total, trained, retain_graph=True, allow_unused=True)
                trained = [p for p, gradient in zip(trained, found, strict=True) if gradient is None]
            self._of_student = {active: trained}
        return idle + self._of_student[active]

    def anchored(self, total: Tensor, weights: dict[str, float] | None) -> Tensor:
        """The loss with the idle parameters tied to it by a factor of zero; as it is where `weights` is None."""
        self._anchored = self(weights, total) if weights is not None else []
        if not self._anchored:
            return total
        return total + sum((local_sum(p) for p in self._anchored), torch.zeros((), device=total.device)) * 0.0

    def forget(self) -> None:
        """Takes the gradient from those that were tied: the optimizer must neither move nor decay them."""
        for parameter in self._anchored:
            parameter.grad = None
