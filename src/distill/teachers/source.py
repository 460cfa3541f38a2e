"""What a run asks of its teacher: a source is opened before the first step, and called with each batch.

A live model is one source; a cache on disk can be another. Whatever it is, it thins its targets itself and refuses in
`open` what it cannot serve, so that nobody behind it asks where a target came from.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from distill.batch import Batch
from distill.curriculum import CurriculumState, Schedule
from distill.losses.engine.divergence import KDLoss
from distill.models.trace import Needs, Trace
from distill.teachers.targets import DenseTargets, Targets, sampled_targets, top_k_targets


class KnownRows(Protocol):
    """Rows that have numbers and can be known again."""

    def numbers_R(self) -> np.ndarray:
        """What `Batch.rows` calls them, int64 [R]."""

    def digests_R2(self) -> np.ndarray:
        """Digests of tokens, labels and documents, uint64 [R, 2]; those of the same row are the same anywhere."""


@dataclass(frozen=True)
class ReadData:
    """What a run will read.

    Args:
        tokenizer: digest of what made its tokens.
        read: keys of `data:` that made the rows, for errors that say what has changed.
        training: the rows; None for a stream, whose rows have no numbers.
        validation: those of each set.
    """

    tokenizer: str
    read: Mapping[str, Any]
    training: KnownRows | None
    validation: tuple[KnownRows, ...]


@dataclass(frozen=True)
class Run:
    """What a run will ask for, as far as it is known before its first step.

    Args:
        kd: options of `kd_loss`, None where it is off.
        needs: what each configured component looks at, by the key of `model:` that says so.
        student_vocab: ids of the student's head.
        temperature: of the KD softmaxes, over the whole run.
        top_k_experts: per token of routing losses, over the whole run; None = the teacher's native number.
        data: what it will read; None where that is not known.
    """

    kd: KDLoss | None
    needs: Mapping[str, Needs]
    student_vocab: int
    temperature: Schedule = 1.0
    top_k_experts: Schedule | None = None
    data: ReadData | None = None


@dataclass(frozen=True, eq=False)
class Taught:
    """What the teacher says of a batch, all of it detached.

    Args:
        trace: what components look at, and of a live teacher the last hidden state.
        whole: the whole distribution of each valid token, which weight-free metrics compare with; None where the source
            does not have it for these rows.
        targets: what `kd_loss` learns from, thinned where its options say so; None where it was not asked for.
        classes: what weight-free metrics compare with in place of `whole` where the tokenizers differ.
    """

    trace: Trace
    whole: DenseTargets | None
    targets: Targets | None
    classes: Targets | None = None


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


def thinned(
    whole: DenseTargets, kd: KDLoss | None, student_vocab: int, state: CurriculumState, batch: Batch
) -> Targets:
    """The part of whole distributions that `kd_loss` learns from.

    Draws depend on step and batch alone, not on the random state: so a resumed run repeats them, and a validation
    between two steps changes nothing.

    Args:
        whole: of the batch's valid tokens.
        kd: options of `kd_loss`.
        student_vocab: ids of the student's head.
        state: of the curriculum.
        batch: whose tokens they are.
    """
    if kd is None or (kd.top_k is None and kd.samples is None):
        return whole
    shared = min(student_vocab, whole.head.vocab_size)
    whole = replace(whole, head=whole.head.whole())
    if kd.top_k is not None:
        return top_k_targets(whole, kd.top_k, state.temperature, shared)
    assert kd.samples is not None
    generator = torch.Generator(whole.hidden_ND.device).manual_seed(state.step * 1_000_003 + batch.bytes)
    return sampled_targets(whole, kd.samples, state.temperature, shared, generator)
