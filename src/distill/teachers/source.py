"""What a run asks of its teacher: a source is opened before the first step, and called with each batch.

A live model is one source; a cache on disk can be another. Whatever it is, it thins its targets itself and refuses in
`open` what it cannot serve, so that nobody behind it asks where a target came from.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import PreTrainedModel

from distill.batch import Batch
from distill.curriculum import CurriculumState
from distill.losses.engine.divergence import KDLoss
from distill.models.trace import Needs, Trace
from distill.teachers.targets import DenseTargets, Targets


@dataclass(frozen=True)
class Run:
    """What a run will ask for, as far as it is known before its first step.

    Args:
        kd: options of `kd_loss`, None where it is off.
        needs: what all configured components look at together.
        student_vocab: ids of the student's head.
    """

    kd: KDLoss | None
    needs: Needs
    student_vocab: int


@dataclass(frozen=True, eq=False)
class Taught:
    """What the teacher says of a batch, all of it detached.

    Args:
        trace: what components look at, and the last hidden state.
        whole: the whole distribution of each valid token, which weight-free metrics compare with; None where the source
            does not have it for these rows.
        targets: what `kd_loss` learns from, thinned where its options say so; None where it was not asked for.
    """

    trace: Trace
    whole: DenseTargets | None
    targets: Targets | None


class TargetSource(Protocol):
    """The teacher of a run.

    Attributes:
        model: its network, frozen and in eval mode; of a source without weights here, on the meta device.
    """

    model: PreTrainedModel

    def open(self, run: Run) -> None:
        """Takes note of what the run will ask for.

        Raises:
            UserError: something of it is not to be had here.
        """

    def to(self, device: torch.device) -> None:
        """Moves what there is to the student's device."""

    def __call__(self, batch: Batch, needs: Needs, state: CurriculumState, kd: bool) -> Taught:
        """What it says of a batch.

        Args:
            batch: on its device.
            needs: what active components look at.
            state: of the curriculum; its step and temperature are what thinned targets are made for.
            kd: whether `kd_loss` takes part.

        Returns:
            What was asked for, and `whole` on validation rows always.
        """
