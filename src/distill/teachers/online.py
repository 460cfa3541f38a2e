"""A live teacher, frozen for good and kept out of the module registry: no optimizer, wrapper or checkpoint sees it.

So nobody else sets its device and dtype: `to` does, once, when the strategy has placed the student.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.batch import Batch, Tokens
from distill.curriculum import CurriculumState
from distill.errors import UserError
from distill.losses.engine.divergence import KDLoss
from distill.models.head import lm_head_of
from distill.models.trace import Needs, Trace, trace
from distill.teachers.find_experts import set_experts_per_token
from distill.teachers.source import Run, Taught, thinned
from distill.teachers.targets import DenseTargets


class OnlineTeacher:
    """Runs the frozen teacher's decoder; a plain class, so that assigning it to a module registers nothing.

    There is one forward pass, with `top_k` experts per token, and routing losses record this one. Their gates still
    mean what they do natively: a gate is a function of all router logits, and the k of the selection is the recording
    view's own. What moves with `top_k` are the states behind the first MoE block, on which later routers decide. Gates
    of the native pass would take a second one, and would belong to other states than the target's.

    Args:
        model: a causal language model; put in eval mode with all gradients off.
        top_k: experts per token of a MoE, for good: a number, "all", or "native" to leave it as it is.

    Raises:
        UserError: the model has no experts, or fewer than `top_k`.
    """

    def __init__(self, model: PreTrainedModel, top_k: int | Literal["native", "all"] = "native") -> None:
        set_experts_per_token(model, top_k)
        self.model: PreTrainedModel = model.requires_grad_(False).eval()
        self.kd: KDLoss | None = None
        self.student_vocab = 0

    def open(self, run: Run) -> None:
        """Takes note of how targets are to be thinned; a live teacher can serve anything."""
        self.kd, self.student_vocab = run.kd, run.student_vocab

    def to(self, device: torch.device) -> None:
        """Moves the model to the student's device."""
        nn.Module.to(self.model, device)

    def __call__(self, batch: Batch, needs: Needs, state: CurriculumState, kd: bool) -> Taught:
        """One forward pass; see `TargetSource`."""
        seen = self.trace(batch.teacher, needs)
        whole = DenseTargets(batch.teacher.valid(seen.last_BLD), lm_head_of(self.model))
        return Taught(seen, whole, thinned(whole, self.kd, self.student_vocab, state, batch) if kd else None)

    @torch.no_grad()
    def trace(self, tokens: Tokens, needs: Needs = Needs()) -> Trace:  # noqa: B008  (frozen)
        """What the forward pass of the tokens leaves, detached."""
        with torch.autocast(tokens.input_ids.device.type, enabled=False):
            return trace(self.model, tokens, needs)

    def hidden(self, tokens: Tokens) -> Tensor:
        """Last hidden state `[B, L, D]` of the tokens, after the final norm, before the head."""
        return self.trace(tokens).last_BLD


def quantize(model: PreTrainedModel) -> None:
    """Turns the weights of the linear layers into int8 with a scale per row, in place; the output head stays whole.

    Raises:
        UserError: torchao is not installed.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise UserError(
            "model.teacher_quantization: torchao is not installed; run pip install "
            "'student-aware-distillation[quantization]'"
        ) from error
    head = model.get_output_embeddings()
    quantize_(model, Int8WeightOnlyConfig(), lambda module, name: isinstance(module, nn.Linear) and module is not head)
