"""Published ways to learn across tokenizers, by name, to compare with; none is a default.

All of them look only at places where both sides have a boundary. `aligned` leads tokens as the default does, without
classes. `exact_matches` compares tokens that have the same bytes on both sides, and all others together. `uld` compares
probabilities by rank, whatever tokens they belong to.

Shapes: N valid tokens of the student, R rows, V vocabulary of the teacher, S ids of the student.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from distill.batch import Pairs
from distill.errors import UserError
from distill.losses.engine.divergence import KDLoss
from distill.losses.engine.rows import Buffers, softmax_into
from distill.models.head import LMHead
from distill.vocabularies.pair import VocabularyPair


def aligned_only(pairs: Pairs) -> Pairs:
    """Without targets inside of the teacher's tokens."""
    spelling = pairs.spelling
    kept = replace(spelling, group_N=np.where(spelling.group_N > 0, -1, spelling.group_N))
    return replace(pairs, group_N=pairs.group_N.masked_fill(pairs.group_N > 0, -1), spelling=kept)


def exact_matches(pair: VocabularyPair) -> tuple[np.ndarray, np.ndarray]:
    """Where ids lead to and the classes of the student's, as `VocabularyPair` has them.

    The student's ids without a match are one class, to which the teacher's without a match lead.
    """
    teacher, student = pair.teacher, pair.student
    firsts = np.full(teacher.size, -1, dtype=np.int64)
    for number, token in enumerate(teacher.tokens):
        if token is not None:
            firsts[number] = student.ids.get(token, -1)
        elif pair.firsts[number] < student.size:
            firsts[number] = pair.firsts[number]
    others = np.setdiff1d(np.arange(student.size), firsts)
    classes = np.arange(student.size)
    classes[others] = others[0] if len(others) else -1
    with_bytes = pair.teacher.lengths > 0
    firsts[(firsts < 0) & with_bytes] = others[0] if len(others) else student.size
    firsts[firsts < 0] = student.size
    return firsts, classes


@dataclass(frozen=True, eq=False)
class RankedTargets:
    """Universal logit distillation: the distance between two sorted distributions.

    Formula: sum_i |p_(i) - q_(i)|, the shorter one filled up with zeros.

    Args:
        hidden_ND: the teacher's last hidden states.
        head: the teacher's.
        weight_N: of each token; 0 where it has no target.

    Source:
        ULD, arXiv 2402.12030, equation 4; the published code goes by the place in the sequence, here both sides have
        written the same text.
    """

    hidden_ND: Tensor
    head: LMHead
    weight_N: Tensor

    @property
    def head_and_hidden(self) -> tuple[LMHead, Tensor]:
        """The teacher's logits, a chunk at a time."""
        return self.head, self.hidden_ND

    @property
    def whole(self) -> bool:
        """Its ids are not the student's."""
        return False

    def shared_vocab(self, student_vocab: int) -> int:
        """All of the student's ids."""
        return student_vocab

    def refuse_unsuitable(self, kd: KDLoss, temperature: float, student_vocab: int) -> None:
        """Refuses a divergence: it is a distance of its own."""
        if kd.divergence != "forward_kl":
            raise UserError(
                f"model.kd_loss.divergence: {kd.divergence}, but model.vocabulary.method uld is a distance of its own; "
                "leave the divergence out"
            )

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
        p_RV, q_RS = buffers.get(0, *teacher_RV.shape), buffers.get(1, *student_RS.shape)
        softmax_into(teacher_RV.mul_(1 / temperature), p_RV)
        softmax_into(student_RS.mul_(1 / temperature), q_RS)
        ranked_p, (ranked_q, order_RS) = p_RV.sort(-1, descending=True).values, q_RS.sort(-1, descending=True)
        width = max(ranked_p.shape[1], ranked_q.shape[1])
        ranked_p, difference = (pad(ranked, (0, width - ranked.shape[1])) for ranked in (ranked_p, ranked_q))
        difference.sub_(ranked_p)
        weight_R = self.weight_N[rows]
        value_R = difference.abs().sum(-1) * weight_R
        if not gradient:
            return value_R, None
        sign_RS = torch.empty_like(q_RS).scatter_(1, order_RS, difference[:, : q_RS.shape[1]].sign_())
        sign_RS.sub_((q_RS * sign_RS).sum(-1, keepdim=True)).mul_(q_RS)
        return value_R, sign_RS.mul_(weight_R[:, None])
