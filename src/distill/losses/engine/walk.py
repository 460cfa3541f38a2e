"""The walk of the loss engine over chunks of tokens: matrix products, buffers and the order of the steps.

Two reusable buffers hold one chunk of logits each. Where one kernel can do it (`fused.py`), the element-wise work is
one launch a chunk; else it goes through a chunk in blocks of rows: on a CPU a few, which stay in its cache, elsewhere
enough to keep the device busy. So nearly all of the memory goes to the chunk, and the larger it is, the faster are the
matrix products. The student's buffer ends up holding the gradient of its own logits, unless products are in 16 bits
and logits are not.

Shapes: N tokens, C tokens of a chunk, R rows of a block, D hidden width, V vocabulary of a model, S shared vocabulary.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from distill.losses.engine import fused
from distill.losses.engine.divergence import KDLoss
from distill.losses.engine.rows import BUFFERS, Buffers, nll_rows, statistics_rows
from distill.losses.engine.targets import Targets
from distill.models.head import LMHead, addmm_into, logits_dtype, mm_into
from distill.models.precision import product_dtype

_CHUNK_BYTES_CPU = 256 << 20  # of all buffers; more buys nothing once a chunk has a few hundred tokens
_CHUNK_BYTES_ELSEWHERE = 2 << 30  # each chunk reads and writes the head's gradient once
_TILE = 256  # tokens of a chunk are a multiple of it on an accelerator, as matrix units work in tiles
_ALIGNED = 64  # ids of a product are a multiple of it there, and rows of logits begin at one
_BLOCK_BYTES_CPU = 768 << 10  # of one buffer of a row block: all of them together stay in the cache
_BLOCK_BYTES_ELSEWHERE = 32 << 20  # an element-wise pass then takes longer than its launch


@dataclass(frozen=True, eq=False)
class Task:
    """What one walk computes.

    Args:
        kd: the divergence, or None for no KD loss.
        temperature: KD temperature T.
        kd_weight, lm_weight: factors in the gradient. None: that loss is not computed. 0: without gradient.
        shared_vocab: ids that KD compares.
        metrics: whether to find the weight-free statistics too.
        needs: whether hidden states, head weight and head bias want a gradient.
    """

    kd: KDLoss | None
    temperature: float
    kd_weight: float | None
    lm_weight: float | None
    shared_vocab: int
    metrics: bool
    needs: tuple[bool, ...]

    @property
    def kd_factor(self) -> float:
        """Weight of the KD gradient with respect to logits / T, as the gradient with respect to logits needs it."""
        if self.kd is None or not self.kd_weight:
            return 0.0
        return self.kd_weight * self.kd.coefficient * self.kd.temperature_factor(self.temperature) / self.temperature


def wide_dtype(hidden_ND: Tensor) -> torch.dtype:
    """Of softmax, sums and accumulation."""
    return torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32


def _compute_dtype(hidden_ND: Tensor) -> torch.dtype:
    """Of matrix products: what autocast would use, else the tensor's own; fp32 on a CPU without units for it."""
    device, dtype = hidden_ND.device.type, hidden_ND.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return product_dtype(dtype, device)


def _slices(start: int, stop: int, size: int, multiple: int = 1) -> Iterator[slice]:
    """Consecutive slices of at most `size`, a multiple of `multiple`, as equal as can be."""
    total = stop - start
    count = -(-total // size)
    edges = [min(total, -(-(i * total // count) // multiple) * multiple) for i in range(count + 1)] if count else []
    for first, last in pairwise(edges):
        yield slice(start + first, start + last)


def _matrix(like: Tensor, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """An empty (rows, width) on the device of `like`; on an accelerator rows begin at aligned addresses."""
    if like.device.type == "cpu":
        return like.new_empty(rows, width, dtype=dtype)
    return like.new_empty(rows, -(-width // _ALIGNED) * _ALIGNED, dtype=dtype)[:, :width]


def _parts(vocab: int, device: torch.device) -> list[slice]:
    """The ids as one slice; on an accelerator a few may be one of their own, for products of odd widths are slow."""
    even = vocab if device.type == "cpu" or vocab < _ALIGNED else vocab - vocab % _ALIGNED
    return [slice(0, even)] + [slice(even, vocab)] * (even < vocab)


class _Side:
    """One model's hidden states and head in its compute dtype, and its buffer for one chunk of logits."""

    def __init__(self, hidden_ND: Tensor, head: LMHead) -> None:
        self.hidden_ND = hidden_ND.detach()
        self.compute = _compute_dtype(hidden_ND)
        self.weight_VD = head.weight.detach().to(self.compute)
        self.head = head
        self.parts = _parts(head.vocab_size, hidden_ND.device)

    def allocate(self, tokens: int) -> None:
        dtype = logits_dtype(self.compute, self.hidden_ND.device)
        self.logits_CV = _matrix(self.hidden_ND, tokens, self.head.vocab_size, dtype)

    def load(self, chunk: slice) -> Tensor:
        """Fills the buffer with the linear map of a chunk; returns the chunk in the compute dtype, (C, D)."""
        hidden_CD = self.hidden_ND[chunk].to(self.compute)
        for part in self.parts:
            mm_into(self.logits_CV[: len(hidden_CD), part], hidden_CD, self.weight_VD[part].T)
        return hidden_CD

    def add_gradients(
        self, d_CV: Tensor, hidden_CD: Tensor, hidden_grad_CD: Tensor | None, weight_grad: Tensor | None, factor: float
    ) -> None:
        """Of a chunk's hidden states, without the factor, and of the head's weight, from that of its linear map."""
        for part in self.parts:
            if hidden_grad_CD is not None and part.start == 0:
                mm_into(hidden_grad_CD, d_CV[:, part], self.weight_VD[part])
            elif hidden_grad_CD is not None:
                addmm_into(hidden_grad_CD, d_CV[:, part], self.weight_VD[part], 1.0)
            if weight_grad is not None:
                addmm_into(weight_grad[part], d_CV[:, part].T, hidden_CD, factor)

    def finished(self, block: slice, room: Tensor) -> Tensor:
        """Logits of a block with the head's bias, scale and soft-cap: in place, or in `room` if that is wider."""
        logits_RV = self.logits_CV[block]
        if logits_RV.dtype != room.dtype:
            logits_RV = room.copy_(logits_RV)
        return self.head.finish_(logits_RV)


def walk(
    hidden_ND: Tensor, head: LMHead, labels_N: Tensor, targets: Targets | None, task: Task, chunk_size: int | None
) -> tuple[dict[str, Tensor], list[Tensor | None]]:
    """Values per token and gradients of their weighted sum, one pass over the tokens.

    Args:
        hidden_ND: last hidden states of the student.
        head: the student's, gathered.
        labels_N: next-token ids.
        targets: of the teacher, or None.
        task: what to compute.
        chunk_size: tokens at a time; by a memory budget when None.

    Returns:
        Name -> (N) in nats, `kd` without its factors; gradients of hidden states, head weight and head bias in fp32
        (fp64), None where not needed.
    """
    tokens, dtype = len(hidden_ND), wide_dtype(hidden_ND)
    student = _Side(hidden_ND, head)
    source = targets.head_and_hidden if targets is not None else None
    teacher = _Side(source[1], source[0].whole()) if source is not None else None
    sides = [student, teacher] if teacher else [student]
    chunk_size, block_size = sizes([side.head.vocab_size for side in sides], hidden_ND, dtype, chunk_size)
    for side in sides:
        side.allocate(chunk_size)
    one_kernel = not task.metrics and (targets is None or targets.whole) and fused.serves(student.logits_CV)
    largest = 0 if one_kernel else block_size * max(side.head.vocab_size for side in sides)
    buffers = Buffers(BUFFERS, largest, hidden_ND, dtype)
    gradient_CV = student.logits_CV
    if any(task.needs) and gradient_CV.dtype != student.compute:
        gradient_CV = _matrix(hidden_ND, chunk_size, head.vocab_size, student.compute)

    values: dict[str, Tensor] = defaultdict(lambda: hidden_ND.new_empty(tokens, dtype=dtype))
    hidden_grad, weight_grad, bias_grad = gradients = [
        torch.zeros(x.shape, dtype=dtype, device=x.device) if x is not None and needed else None
        for x, needed in zip((hidden_ND, head.weight, head.bias), task.needs, strict=True)
    ]
    unit = max(task.kd_factor, task.lm_weight or 0.0) * head.scale  # left out of the logits' gradient, see _combine
    multiple = _TILE if chunk_size % _TILE == 0 and hidden_ND.device.type != "cpu" else 1
    for chunk in _slices(0, tokens, chunk_size, multiple):
        hidden_CD = student.load(chunk)
        if teacher:
            teacher.load(chunk)
        if one_kernel:
            _fused_chunk(student, teacher, labels_N[chunk], task, chunk, values, gradient_CV)
        for rows in () if one_kernel else _slices(chunk.start, chunk.stop, block_size):
            block = slice(rows.start - chunk.start, rows.stop - chunk.start)
            found = _block(student, teacher, targets, labels_N[rows], task, rows, block, buffers, gradient_CV[block])
            for name, value_R in found.items():
                values[name][rows] = value_R
        d_CV = gradient_CV[: len(hidden_CD)]
        student.add_gradients(d_CV, hidden_CD, None if hidden_grad is None else hidden_grad[chunk], weight_grad, unit)
        if bias_grad is not None:
            bias_grad.add_(d_CV.sum(0, dtype=dtype), alpha=unit)
    if hidden_grad is not None:
        hidden_grad.mul_(unit)
    return values, gradients


def sizes(vocabs: list[int], like: Tensor, dtype: torch.dtype, chunk_size: int | None) -> tuple[int, int]:
    """Tokens of a chunk and rows of a block."""
    chunk_bytes, block_bytes = _CHUNK_BYTES_ELSEWHERE, _BLOCK_BYTES_ELSEWHERE
    if like.device.type == "cpu":
        chunk_bytes, block_bytes = _CHUNK_BYTES_CPU, _BLOCK_BYTES_CPU
    row_bytes = max(vocabs) * dtype.itemsize
    block_size = max(1, block_bytes // row_bytes)
    if like.device.type == "cpu":  # torch's softmax gives a thread whole rows
        block_size = max(block_size, min(torch.get_num_threads(), chunk_bytes // (4 * BUFFERS * row_bytes)))
    if chunk_size is None:
        buffers = BUFFERS * block_size * max(vocabs)
        chunk_size = (chunk_bytes // dtype.itemsize - buffers) // sum(vocabs)
        if like.device.type != "cpu" and chunk_size > _TILE:
            chunk_size -= chunk_size % _TILE
    chunk_size = max(1, min(chunk_size, len(like)))
    return chunk_size, min(chunk_size, block_size)


def _fused_chunk(
    student: _Side,
    teacher: _Side | None,
    labels_C: Tensor,
    task: Task,
    chunk: slice,
    values: dict[str, Tensor],
    gradient_CV: Tensor,
) -> None:
    """Values of a chunk and the gradient of its logits by one kernel."""
    tokens, unit = len(labels_C), max(task.kd_factor, task.lm_weight or 0.0)
    factors = (task.kd_factor / unit, (task.lm_weight or 0.0) / unit) if unit else (0.0, 0.0)
    fused.fused_rows_(
        student.logits_CV[:tokens],
        teacher.logits_CV[:tokens] if teacher else None,
        labels_C,
        gradient_CV[:tokens] if any(task.needs) else None,
        values["kd"][chunk] if task.kd is not None else None,
        values["lm"][chunk] if task.lm_weight is not None else None,
        (student.head, teacher.head if teacher else student.head),
        task.kd,
        task.shared_vocab,
        task.temperature,
        factors,
    )


def _block(
    student: _Side,
    teacher: _Side | None,
    targets: Targets | None,
    labels_R: Tensor,
    task: Task,
    rows: slice,
    block: slice,
    buffers: Buffers,
    gradient_RV: Tensor,
) -> dict[str, Tensor]:
    """Values per row by name for the rows `block` of the chunk; the logits' gradient is written to `gradient_RV`."""
    height, vocab = block.stop - block.start, student.head.vocab_size
    student_RV = student.finished(block, buffers.get(5, height, vocab))
    teacher_RV = teacher.finished(block, buffers.get(6, height, teacher.head.vocab_size)) if teacher else None
    found: dict[str, Tensor] = {}
    if task.metrics:
        whole_RV = teacher_RV if targets is not None and targets.whole else None
        found |= statistics_rows(student_RV, whole_RV, labels_R, task.shared_vocab, buffers)
    kd_grad_RS = lm_grad_RV = slope_RV = None
    softcap = student.head.softcap
    if any(task.needs) and softcap is not None:
        slope_RV = torch.div(student_RV, softcap, out=buffers.get(3, height, vocab)).square_().neg_().add_(1)
    if task.lm_weight is not None:
        learns = any(task.needs) and task.lm_weight > 0
        found["lm"], lm_grad_RV = nll_rows(student_RV, labels_R, buffers.get(4, height, vocab), learns)
    if task.kd is not None:
        student_RS, learns = student_RV[:, : task.shared_vocab], any(task.needs) and task.kd_factor > 0
        assert targets is not None
        found["kd"], kd_grad_RS = targets.divergence(
            task.kd, student_RS, teacher_RV, rows, task.temperature, buffers, learns
        )
    if any(task.needs):
        _combine(gradient_RV, kd_grad_RS, lm_grad_RV, slope_RV, task)
    return found


def _combine(
    out_RV: Tensor, kd_grad_RS: Tensor | None, lm_grad_RV: Tensor | None, slope_RV: Tensor | None, task: Task
) -> None:
    """Gradient of the head's linear map from those of the two losses and the soft-cap's slope; overwrites the losses'.

    The larger of the two factors is left to be applied after the products: so 16-bit gradients keep their range.
    """
    lm_weight = task.lm_weight or 0.0
    unit = max(task.kd_factor, lm_weight)
    if lm_grad_RV is not None:
        total = lm_grad_RV.mul_(lm_weight / unit)
        if kd_grad_RS is not None:
            total[:, : kd_grad_RS.shape[1]].add_(kd_grad_RS, alpha=task.kd_factor / unit)
    else:
        assert kd_grad_RS is not None
        total = kd_grad_RS
    width = total.shape[1]
    if slope_RV is not None:
        total.mul_(slope_RV[:, :width])
    if not total.is_set_to(out_RV[:, :width]):  # the usual divergences leave theirs where the logits were
        out_RV[:, :width].copy_(total)
    out_RV[:, width:].zero_()
