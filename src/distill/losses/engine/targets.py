"""What the loss engine asks of teacher targets: a new kind of them is one class, and no change here.

The engine walks over chunks of the student's tokens and hands each kind the student's logits of a few rows, and the
teacher's where the kind names a head to compute them with. What the kind compares them with is its own business: whole
distributions, k kept ids, draws, another tokenizer's ids mapped onto the student's.

Shapes: N tokens, D hidden width, R rows, V vocabulary of the teacher, S ids of the student that are compared.
"""

from typing import Protocol

from torch import Tensor

from distill.losses.engine.divergence import KDLoss
from distill.losses.engine.rows import Buffers
from distill.models.head import LMHead


class Targets(Protocol):
    """Targets of N tokens of the student."""

    @property
    def head_and_hidden(self) -> tuple[LMHead, Tensor] | None:
        """A head and (N, D) hidden states, whose logits `divergence` is handed; None if it needs none."""

    @property
    def whole(self) -> bool:
        """Whether these logits, over the first S ids, are the target: then statistics compare student and teacher."""

    def shared_vocab(self, student_vocab: int) -> int:
        """S: the student's softmax is taken over its first S ids."""

    def refuse_unsuitable(self, kd: KDLoss, temperature: float, student_vocab: int) -> None:
        """UserError for a divergence, temperature or vocabulary that these targets do not serve."""

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
        """Divergence of some of the N tokens, (R, S) -> (R), (R, S).

        Args:
            kd: which divergence; coefficient and T^2 are the engine's.
            student_RS: the student's finished logits; may be overwritten.
            teacher_RV: finished logits of `head_and_hidden`; may be overwritten.
            rows: which of the N tokens these are.
            temperature: T.
            buffers: 0 to 2 may be filled; each holds R rows of the larger vocabulary.
            gradient: whether to compute the second value.

        Returns:
            Value per row in nats, and its gradient with respect to the student's logits divided by T, written wherever
            it costs no copy: over the logits or in a buffer.
        """
