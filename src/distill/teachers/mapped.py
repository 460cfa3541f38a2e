"""A teacher whose tokenizer is not the student's: its next-token distributions as targets on the student's ids.

It wraps a source that has the teacher's last hidden states, gathers them where each of the student's tokens stands
between the teacher's, and leaves the sums over the vocabulary to the loss engine, a chunk at a time.

Shapes: N valid tokens of the student, T positions of the teacher in a batch, D its hidden width, R rows.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.batch import Batch, Pairs
from distill.curriculum import CurriculumState
from distill.errors import UserError
from distill.losses.engine.divergence import KDLoss
from distill.losses.engine.mapped import VocabularyMap, inside_rows, mapped_rows, vocabulary_map
from distill.losses.engine.rows import Buffers
from distill.losses.engine.targets import Targets
from distill.models.head import LMHead, lm_head_of
from distill.models.trace import Needs
from distill.teachers.baselines import RankedTargets, aligned_only, exact_matches
from distill.teachers.cached import CachedTeacher
from distill.teachers.look_ahead import Changes, LookAhead
from distill.teachers.source import Run, TargetSource, Taught
from distill.vocabularies.options import Method
from distill.vocabularies.pair import VocabularyPair


@dataclass(frozen=True, eq=False)
class MappedTargets:
    """The teacher's whole distributions, on the student's ids.

    Args:
        hidden_ND: its last hidden state at the position that each of the student's predicts on from.
        head: the teacher's.
        tables: of the two vocabularies.
        pairs: of the batch.
        changes: what looking ahead found; None where it was not asked for.
        weight: factor on each token that has a target.
    """

    hidden_ND: Tensor
    head: LMHead
    tables: VocabularyMap
    pairs: Pairs
    changes: Changes | None = None
    weight: float = 1.0

    @property
    def head_and_hidden(self) -> tuple[LMHead, Tensor]:
        """The teacher's logits on its own ids, a chunk at a time."""
        return self.head, self.hidden_ND

    @property
    def whole(self) -> bool:
        """Its ids are not the student's, so statistics of the student alone can be taken."""
        return False

    def shared_vocab(self, student_vocab: int) -> int:
        """The ids of the student's tokenizer, padding of its head left out."""
        return self.tables.student_vocab

    def refuse_unsuitable(self, kd: KDLoss, temperature: float, student_vocab: int) -> None:
        """They serve every divergence, as there is nothing that one between masses of classes would not mean."""
        assert self.changes is None or self.changes.temperature == temperature

    def by_tables(self) -> "MappedTargets":
        """The same without looking ahead: what validation measures at T = 1 whatever a run learns from."""
        return replace(self, changes=None)

    def divergence(
        self,
        kd: KDLoss,
        student_RS: Tensor,
        teacher_RV: Tensor | None,
        rows: slice,
        temperature: float,
        buffers: Buffers,
        gradient: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """See `Targets.divergence`."""
        assert teacher_RV is not None
        taught_R = (self.pairs.group_N[rows] >= 0).to(teacher_RV.dtype).mul_(self.weight)
        inside = inside_rows(self.pairs, rows)
        ahead = None if self.changes is None else self.changes.of(rows)
        return mapped_rows(
            kd, student_RS, teacher_RV, self.tables, taught_R, inside, ahead, temperature, buffers, gradient
        )


class MappedTeacher:
    """A source of targets for a student with another tokenizer.

    With `look_ahead` the host looks at the most probable tokens of each row, so it waits for the device once a
    micro-batch.

    Args:
        source: has the teacher's last hidden states: a live teacher, or a cache of them.
        pair: the two tokenizers.
        look_ahead: whether to look past the text's own next tokens, and at the token before.
        method: how targets are made; all but `first_token` are baselines.
    """

    def __init__(
        self, source: TargetSource, pair: VocabularyPair, look_ahead: bool = False, method: Method = "first_token"
    ) -> None:
        self.source, self.pair, self.method = source, pair, method
        self.model: PreTrainedModel = source.model
        self.look_ahead = LookAhead(pair) if look_ahead else None
        self._tables: VocabularyMap | None = None
        self._learned_tables: VocabularyMap | None = None

    def open(self, run: Run) -> None:
        """Makes the tables of the two vocabularies; see `TargetSource`.

        Raises:
            UserError: `kd_loss` asks for some ids of a row alone, or the source cannot serve the run.
        """
        for key in ("top_k", "samples"):
            if run.kd is not None and (count := getattr(run.kd, key)) is not None:
                raise UserError(
                    f"model.kd_loss.{key}: {count}, but teacher and student have different tokenizers, between which "
                    "whole distributions are compared; leave it out"
                )
        if self.look_ahead is not None and isinstance(self.source, CachedTeacher):
            raise UserError(
                f"model.vocabulary.look_ahead: true, but the cache {self.source.folder} holds the states of labelled "
                "tokens alone; set it to false, or give a live teacher"
            )
        self.source.open(run)
        vocabs = lm_head_of(self.model).vocab_size, run.student_vocab
        self._tables = vocabulary_map(self.pair.firsts, self.pair.classes, *vocabs)
        self._class_S = self._tables.class_S.numpy()
        if self.method == "aligned":
            self._learned_tables = vocabulary_map(self.pair.firsts, np.arange(self.pair.student.size), *vocabs)
        elif self.method == "exact_matches":
            self._learned_tables = vocabulary_map(*exact_matches(self.pair), *vocabs)

    def to(self, device: torch.device) -> None:
        """Moves source and tables to the student's device."""
        self.source.to(device)
        assert self._tables is not None
        self._tables = self._tables.to(device)
        self._learned_tables = self._learned_tables and self._learned_tables.to(device)

    def __call__(self, batch: Batch, needs: Needs, state: CurriculumState, kd: bool) -> Taught:
        """What the teacher says of a batch; see `TargetSource`. `whole` does not exist between tokenizers."""
        assert batch.pairs is not None
        assert self._tables is not None
        taught = self.source(batch, needs, state, kd=False)
        assert taught.whole is not None
        head, pairs = taught.whole.head, batch.pairs
        if taught.trace is not None and taught.trace.last_BLD.numel():
            states_TD, of_T = taught.trace.last_BLD.flatten(0, 1), None
        else:  # of a cache, which holds those of valid tokens
            states_TD, of_T = taught.whole.hidden_ND, batch.teacher.positions

        def states(places: Tensor) -> Tensor:
            if of_T is not None:
                places = torch.searchsorted(of_T, places).clamp_(max=len(of_T) - 1)
            return states_TD.index_select(0, places)

        targets = MappedTargets(states(pairs.teacher_N), head, self._tables, pairs)
        if not kd:
            return Taught(taught.trace, None, None, classes=targets)
        learned: Targets = targets
        if self.method != "first_token":
            learned = self._baseline(targets)
        elif self.look_ahead is not None:
            changes = self.look_ahead(targets.hidden_ND, states, head, self._class_S, pairs, state.temperature)
            learned = replace(targets, changes=changes)
        return Taught(taught.trace, None, learned, classes=targets)

    def _baseline(self, targets: MappedTargets) -> MappedTargets | RankedTargets:
        """What a baseline learns from, averaged over its own targets in a batch."""
        pairs = aligned_only(targets.pairs)
        counts = [int((some.spelling.group_N >= 0).sum()) for some in (targets.pairs, pairs)]
        weight = counts[0] / max(1, counts[1])
        if self.method == "uld":
            weight_N = (pairs.group_N >= 0).to(torch.promote_types(targets.hidden_ND.dtype, torch.float32)).mul_(weight)
            return RankedTargets(targets.hidden_ND, targets.head, weight_N)
        assert self._learned_tables is not None
        return replace(targets, tables=self._learned_tables, pairs=pairs, weight=weight)
