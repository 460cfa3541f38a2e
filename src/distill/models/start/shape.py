"""What a student keeps of its teacher, how it is fitted, and how near it came: plain values."""

from dataclasses import dataclass
from typing import Literal

from distill.errors import UserError

AUTO_TOKENS, TOKENS_A_NEURON = 16_384, 30


@dataclass(frozen=True)
class StudentFit:
    """How a student that is cut from its teacher is fitted, layer by layer, before the run.

    Args:
        tokens: calibration tokens, of training rows; auto = 16,384, and 30 for each neuron of an FFN that is chosen.
        steps: optimizer steps of each layer or FFN alone, of 512 tokens; 0 = none, only what has a closed form.
        learning_rate: their peak; null = 0.2 / width of the residual stream.
        seed: of the batches' order.
    """

    tokens: int | Literal["auto"] = "auto"
    steps: int = 60
    learning_rate: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens != "auto" and self.tokens < 1:
            raise UserError(f"model.student_fit.tokens: {self.tokens} must be at least 1, or auto")
        if self.steps < 0:
            raise UserError(f"model.student_fit.steps: {self.steps} must be at least 0")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise UserError(f"model.student_fit.learning_rate: {self.learning_rate} must be above 0")

    def tokens_for(self, neurons: int) -> int:
        """Calibration tokens, where FFNs of so many neurons are fitted in closed form."""
        return max(AUTO_TOKENS, TOKENS_A_NEURON * neurons) if self.tokens == "auto" else self.tokens


@dataclass(frozen=True)
class Shape:
    """What a student keeps of its teacher.

    Args:
        layers: indices of the teacher's layers, ascending.
        intermediate_size: neurons of each FFN; None = the teacher's blocks.
        hidden_size: width of the residual stream; None = the teacher's.
    """

    layers: list[int]
    intermediate_size: int | None = None
    hidden_size: int | None = None


@dataclass(frozen=True)
class LayerFit:
    """How near a layer of the student came to its target, as `unexplained` says.

    Args:
        layer: of the student.
        teacher_layer: that it was made from.
        trained: what was trained alone: layer, ffn or nothing.
        before: error of the layer as it was cut, or of the closed form where it has one.
        after: error in the end.
    """

    layer: int
    teacher_layer: int
    trained: str
    before: float
    after: float
