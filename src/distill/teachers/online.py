"""A live teacher, frozen for good and kept out of the module registry: no optimizer, wrapper or checkpoint sees it.

So its device and dtype are ours to set, once, when the strategy has placed the student.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, device, nn
from transformers import PreTrainedModel

from distill.curriculum import CurriculumState
from distill.errors import UserError
from distill.losses.engine.divergence import KDLoss
from distill.models.trace import Needs, Trace, trace
from distill.teachers.find_experts import set_experts_per_token
from distill.teachers.targets import DenseTargets, Targets, sampled_targets, top_k_targets


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
        self.model = model.requires_grad_(False).eval()

    def to(self, device: device) -> None:
        """Moves the model to the student's device."""
        nn.Module.to(self.model, device)

    @torch.no_grad()
    def trace(self, batch: Mapping[str, Any], needs: Needs = Needs()) -> Trace:  # noqa: B008  (frozen)
        """What the forward pass of the batch leaves, detached."""
        with torch.autocast(batch["input_ids"].device.type, enabled=False):
            return trace(self.model, batch, needs)

    def hidden(self, batch: Mapping[str, Any]) -> Tensor:
        """Last hidden state `[B, L, D]` of the batch, after the final norm, before the head."""
        return self.trace(batch).last_BLD


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


def thinned(
    targets: DenseTargets | None,
    kd: KDLoss | None,
    student_vocab: int,
    state: CurriculumState,
    batch: Mapping[str, Any],
) -> Targets:
    """The part of dense targets that `kd` learns from. Draws depend on step and batch alone, not on the random state:
    so a resumed run repeats them, and a validation between two steps changes nothing.
    """
    assert targets is not None
    assert kd is not None
    shared = min(student_vocab, targets.head.vocab_size)
    targets = replace(targets, head=targets.head.whole())
    if kd.top_k is not None:
        return top_k_targets(targets, kd.top_k, state.temperature, shared)
    assert kd.samples is not None
    generator = torch.Generator(targets.hidden_ND.device).manual_seed(state.step * 1_000_003 + batch["bytes"])
    return sampled_targets(targets, kd.samples, state.temperature, shared, generator)
