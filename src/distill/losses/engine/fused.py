"""The rows of a whole chunk as one operation on a CUDA device, where triton is installed.

It reads the logits of both models from device memory two or three times and writes their gradient once, where the plain
functions of `rows.py` pass over them thirty to seventy times. It serves the LM loss and dense targets; sparse targets,
statistics and float64 go through the plain functions.

Shapes: C tokens of a chunk, V vocabulary of a model.
"""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from distill.losses.engine.divergence import KDLoss
from distill.models.head import LMHead

_BLOCK, _WARPS = 2048, 8  # ids at a time, and warps of a program: 3.7 of 4.3 TB/s on an H200


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def serves(logits_CV: Tensor) -> bool:
    """Whether the student's logits can go through the kernel."""
    return logits_CV.device.type == "cuda" and logits_CV.dtype == torch.float32 and _has_triton()


def fused_rows_(
    student_CV: Tensor,
    teacher_CV: Tensor | None,
    labels_C: Tensor,
    gradient_CV: Tensor | None,
    kd_C: Tensor | None,
    lm_C: Tensor | None,
    heads: tuple[LMHead, LMHead],
    kd: KDLoss | None,
    shared: int,
    temperature: float,
    factors: tuple[float, float],
) -> None:
    """Values of C tokens and the gradient of the student's linear map, 2 x (C, V) -> 2 x (C), (C, V), in place.

    Args:
        student_CV: the linear map of the student's head, fp32, without bias, scale and soft-cap.
        teacher_CV: the teacher's; None without KD.
        labels_C: next-token ids.
        gradient_CV: where the gradient goes, in any dtype: the student's logits themselves if that is theirs. None:
            values alone.
        kd_C: where the divergence of each token goes, in nats, without its factors; None without KD.
        lm_C: where its cross-entropy goes; None without an LM loss.
        heads: of student and teacher; the student's twice without KD.
        kd: the divergence.
        shared: ids that KD compares.
        temperature: T.
        factors: of the divergence's gradient with respect to logits / T, and of the cross-entropy's to logits.
    """
    kind, share, kd_factor = "none", 0.0, factors[0]
    if kd is not None:
        kind = kd.effective
        share = kd.beta if kind == "jsd" else kd.alpha
        kd_factor *= 1 - share if kind == "jsd" else 1.0
    _operation(
        student_CV,
        teacher_CV,
        labels_C,
        gradient_CV,
        kd_C,
        lm_C,
        *(None if head.bias is None else head.bias.detach() for head in heads),
        [x for head in heads for x in (head.scale, head.softcap or 0.0)],
        [1 / temperature, share, kd_factor, factors[1]],
        kind,
        shared,
    )


@torch.library.custom_op("distill::fused_rows", mutates_args={"gradient", "kd_values", "lm_values"})
def _operation(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    gradient: Tensor | None,
    kd_values: Tensor | None,
    lm_values: Tensor | None,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    finish: list[float],
    numbers: list[float],
    kind: str,
    shared: int,
) -> None:
    """An operation of torch, so that fake tensors, which have no memory, pass through it and are counted."""
    from distill.losses.engine.triton_rows import fused_rows

    def there(tensor: Tensor | None) -> Tensor:
        return student if tensor is None else tensor  # what is not there is not read

    finishes = [
        (bias is not None) + 2 * (finish[i] != 1) + 4 * (finish[i + 1] > 0)
        for i, bias in ((0, student_bias), (2, teacher_bias))
    ]
    fused_rows[(len(student),)](
        student, there(teacher), there(gradient), labels, there(kd_values), there(lm_values), there(student_bias),
        there(teacher_bias), student.shape[1], shared, student.stride(0), there(teacher).stride(0),
        there(gradient).stride(0), *finish, *numbers, KIND=kind, LM=lm_values is not None,
        SAME=kind != "none" and numbers[0] == 1 and shared == student.shape[1], GRADIENT=gradient is not None,
        FINISH=finishes[0] + 8 * finishes[1], BLOCK=_BLOCK, num_warps=_WARPS,
    )  # fmt: skip


@_operation.register_fake
def _(*arguments: object) -> None:
    """Nothing is returned."""
