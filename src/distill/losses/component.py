"""What a loss on layers must be so that the objective, checkpoints, checks and tables take it without knowing its name.

`kd_loss` and `lm_loss` stay outside: the loss engine computes both in one walk over the vocabulary. A component has
one named loss or several; `OneLoss` does most of it for those with one. To add a loss: its class in a file of its own,
an option in `training.options.ModelOptions`, and a row of `curriculum.WEIGHT_KEY`.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.batch import Batch
from distill.curriculum import CurriculumState
from distill.errors import UserError
from distill.models.trace import Needs, Trace


@dataclass(frozen=True)
class Measured:
    """What one micro-batch on one rank yields.

    Args:
        sums: loss -> differentiable sum over its units, times its coefficient, scalar.
        stats: name -> detached scalar for the log, a mean over tokens; in the log it stands as it is named here.
    """

    sums: dict[str, Tensor]
    stats: dict[str, Tensor] = field(default_factory=dict)


@runtime_checkable
class Component(Protocol):
    """One or several losses between states of teacher and student.

    `build` is called once, before anything else, when both models are there; parameters and buffers made there are
    registered with the module under the option's key, trained with `router_learning_rate`, and left out of exports.
    """

    @property
    def units(self) -> Mapping[str, str]:
        """Name of each loss that is on -> the kind of unit that it is a sum over, as `Batch.units` counts them."""

    @property
    def student_needs(self) -> Needs:
        """What is read of the student's forward pass."""

    @property
    def teacher_needs(self) -> Needs:
        """What is read of the teacher's."""

    @property
    def routed_experts(self) -> int | None:
        """Experts that the curriculum's `top_k_experts` chooses among; None where nothing is routed."""

    def build(self, teacher: PreTrainedModel, student: PreTrainedModel, rows: int | None = None) -> None:
        """Chooses layers and makes what is trained beside the student.

        Args:
            teacher: in eval mode.
            student: as it will be trained.
            rows: of a full micro-batch on one rank; None where all micro-batches are full.

        Raises:
            UserError: options that do not fit the models.
        """

    def measure(
        self, names: Collection[str], student: Trace, teacher: Trace, batch: Batch, state: CurriculumState
    ) -> Measured:
        """The losses of `names` on one micro-batch.

        Args:
            names: of `units`.
            student: with what `student_needs` says.
            teacher: the same, detached.
            batch: which both have read.
            state: of the curriculum.
        """

    def trained_by(self, name: str) -> Iterator[nn.Parameter]:
        """The parameters here that a loss sends gradient to."""

    def settings(self) -> dict[str, Any]:
        """What a checkpoint's tensors and targets depend on, as plain values."""

    def figures(self, state: CurriculumState) -> dict[str, float]:
        """What is logged beside the curriculum's values: name -> value."""

    def reads(self, name: str) -> str:
        """In words, for the table of `distill check`: what a loss looks at."""

    def heads(self, name: str) -> str:
        """In words: what it trains beside the student, where it does."""


class OneLoss:
    """What components with one loss have in common; they are called with two traces and a batch, and return its sum.

    A class names `component`, `unit` and, for the table of `distill check`, `looks_at`, and sets its needs in `build`.
    """

    component: str
    unit: str
    looks_at: str
    teacher_needs = Needs()
    student_needs = Needs()
    routed_experts: int | None = None

    @property
    def units(self) -> Mapping[str, str]:
        """The one loss and its unit."""
        return {self.component: self.unit}

    def measure(
        self, names: Collection[str], student: Trace, teacher: Trace, batch: Batch, state: CurriculumState
    ) -> Measured:
        """The loss; see `Component`."""
        return Measured({self.component: self(student, teacher, batch)})  # type: ignore[operator]

    def trained_by(self, name: str) -> Iterator[nn.Parameter]:
        """All parameters, where there are some."""
        if name == self.component and isinstance(self, nn.Module):
            yield from self.parameters()

    def figures(self, state: CurriculumState) -> dict[str, float]:
        """Nothing to log."""
        return {}

    def reads(self, name: str) -> str:
        """The same words whatever the options."""
        return self.looks_at

    def heads(self, name: str) -> str:
        """What their parameters are."""
        return "projections"


def check_coefficient(where: str, coefficient: float) -> None:
    """Refuses a constant factor that is negative or no number; `where` begins the sentence, with key and value's name.

    Raises:
        UserError: says what to give.
    """
    if not 0 <= coefficient < math.inf:
        raise UserError(f"{where} {coefficient}; give a number from 0 up")
