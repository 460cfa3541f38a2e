"""KD whose tokens weigh unequally, as arms of quality.py: what such weights gain decides whether distill has them.

Each is forward KL at temperature 1 over all ids, times a weight a token whose mean over a micro-batch is 1, so that the
step stays as long as that of plain KD. They stand in the place of `layerwise_loss`, in one piece and without the loss
engine: for a vocabulary of a thousand ids.

Shapes: N valid tokens, V ids.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.batch import Batch
from distill.curriculum import CurriculumState
from distill.losses.component import Measured
from distill.losses.engine.divergence import forward_kl
from distill.losses.layerwise import Layerwise
from distill.models.head import lm_head_of
from distill.models.trace import Trace

Weigh = Callable[[Tensor, Tensor, float], Tensor]  # log p and log q (N, V), progress -> (N)


def entropy(log_p_NV: Tensor) -> Tensor:
    """In nats, (N, V) -> (N)."""
    return -(log_p_NV.exp() * log_p_NV).sum(-1)


def by_entropy(log_p_NV: Tensor, log_q_NV: Tensor, progress: float) -> Tensor:
    """More where the teacher is uncertain."""
    return entropy(log_p_NV)


def by_certainty(log_p_NV: Tensor, log_q_NV: Tensor, progress: float) -> Tensor:
    """More where the teacher is certain."""
    return 1 / (1 + entropy(log_p_NV))


def low_to_high(log_p_NV: Tensor, log_q_NV: Tensor, progress: float) -> Tensor:
    """Only the most certain tenth at first, ever more of the others, and all from 70% of the run on."""
    entropy_N = entropy(log_p_NV)
    share = min(1.0, 0.1 + 0.9 * progress / 0.7)
    return (entropy_N <= entropy_N.quantile(share)).float()


def harder_half(log_p_NV: Tensor, log_q_NV: Tensor, progress: float) -> Tensor:
    """The half on which the two models are farthest apart, by Hellinger distance, as in AdaKD (2510.11615)."""
    squared_N = 1 - (0.5 * (log_p_NV + log_q_NV)).exp().sum(-1)
    return (squared_N >= squared_N.median()).float()


class WeightedKD(Layerwise):  # type: ignore[misc]  # an option of distill takes its own class alone
    """Forward KL times a weight a token.

    Args:
        weigh: without gradient; its values are divided by their mean.
    """

    unit = "tokens"

    def __init__(self, weigh: Weigh) -> None:
        super().__init__()
        self.weigh = weigh

    def build(self, teacher: PreTrainedModel, student: PreTrainedModel, rows: int | None = None) -> None:
        """Remembers the models, whose heads are read at each step."""
        self.models = (student, teacher)  # in a tuple, so that they are not registered here

    def measure(
        self, names: Collection[str], student: Trace, teacher: Trace, batch: Batch, state: CurriculumState
    ) -> Measured:
        """The weighted sum over tokens."""
        states = [batch.student.valid(seen.last_BLD) for seen in (student, teacher)]
        heads = [lm_head_of(model) for model in self.models]
        log_q_NV, log_p_NV = (
            head.logits(state_ND).log_softmax(-1) for head, state_ND in zip(heads, states, strict=True)
        )
        with torch.no_grad():
            weight_N = self.weigh(log_p_NV, log_q_NV, state.progress)
            weight_N /= weight_N.mean()
        return Measured({"layerwise_loss": (weight_N * forward_kl(log_q_NV, log_p_NV)).sum()})

    def settings(self) -> dict[str, Any]:
        """Its weights' name."""
        return {"weigh": self.weigh.__name__}
