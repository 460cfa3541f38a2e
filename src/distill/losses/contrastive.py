"""contrastive_loss: a student's token must find the teacher's state of the same token among those of other contexts.

Negatives are the teacher's states of this micro-batch on all ranks and of a queue of earlier ones, all detached; only
the student's projection learns. Each row of the batch gives the same number of evenly spaced tokens, so the shapes of
all ranks agree without asking them, and one process takes the same tokens as two that share its rows. The value depends
on what else is in the micro-batch, so it is a statistic of that and not a sum over tokens.

Shapes: B rows, L positions, S sampled tokens of this rank, M those of all ranks, Q places of the queue, D width (each
side its own).
"""

import math
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from distill.batch import Batch, Tokens
from distill.errors import UserError
from distill.losses.component import OneLoss, check_coefficient
from distill.losses.layers import check_layers
from distill.losses.states import apply, normalise
from distill.models.precision import full_precision
from distill.models.trace import Needs, Trace

BASE = 0x5851F42D4C957F2D  # of the polynomial hash, odd
INVERSE = pow(BASE, -1, 2**64)
EMPTY = 0  # context of a place that holds no token


def contexts(input_ids_BL: Tensor, position_ids_BL: Tensor) -> Tensor:
    """A 64-bit hash [B, L] of each token's document up to and with itself, never EMPTY.

    Two positions have one hash where a causal model sees the same for both: a polynomial in BASE over the (scrambled)
    ids of the document so far, modulo 2^64. It is made of running sums; different contexts meet once in 2^64.
    """
    length, device = input_ids_BL.shape[1], input_ids_BL.device
    scrambled = (input_ids_BL + 1) * _signed(0x9E3779B97F4A7C15)
    scrambled = (scrambled ^ (scrambled >> 29)) * _signed(0xBF58476D1CE4E5B9)
    scrambled = scrambled ^ (scrambled >> 32)
    powers_L, inverses_L = (torch.full((length,), _signed(x), device=device).cumprod(0) for x in (BASE, INVERSE))
    sums_BL = (scrambled * inverses_L).cumsum(-1)
    position_L = torch.arange(length, device=device)
    before_BL = position_L - position_ids_BL - 1  # the last position of the document before
    outside_BL = sums_BL.gather(-1, before_BL.clamp(min=0)).masked_fill(before_BL < 0, 0)
    hashes_BL = (sums_BL - outside_BL) * powers_L
    return hashes_BL.masked_fill(hashes_BL == EMPTY, 1)


def _signed(value: int) -> int:
    """The int64 with the same bits."""
    return value - 2**64 if value >= 2**63 else value


def sample(tokens: Tokens, per_row: int) -> tuple[Tensor, Tensor]:
    """Flat positions [B * per_row] of evenly spaced valid tokens of each row, and which of the places hold one."""
    shape = tokens.position_ids.shape
    valid_T = torch.zeros(shape.numel(), dtype=torch.long, device=tokens.positions.device)
    counts_BL = valid_T.index_fill_(0, tokens.positions, 1).view(shape).cumsum(-1)
    valid_B1 = counts_BL[:, -1:]
    place_S = torch.arange(per_row, device=valid_T.device)[None]
    spaced_BS = torch.where(valid_B1 > per_row, (2 * place_S + 1) * valid_B1 // (2 * per_row), place_S)
    column_BS = torch.searchsorted(counts_BL, spaced_BS + 1).clamp(max=shape[1] - 1)
    row_B1 = torch.arange(shape[0], device=valid_T.device)[:, None]
    return (row_B1 * shape[1] + column_BS).flatten(), (place_S < valid_B1).flatten()


def info_nce(anchor_SD: Tensor, key_MD: Tensor, own_S: Tensor, same_SM: Tensor, temperature: float) -> Tensor:
    """-log softmax [S] of each anchor's own key among all keys but those of the same context, in nats.

    Args:
        anchor_SD: unit vectors.
        key_MD: unit vectors, detached.
        own_S: index of the anchor's key.
        same_SM: bool, keys that are no negatives of the anchor; its own key counts whatever this says.
        temperature: of the softmax over cosines.

    Source:
        InfoNCE, arXiv 1807.03748; contrastive distillation with a queue, arXiv 1910.10699 and 1911.05722.
    """
    with torch.autocast(anchor_SD.device.type, enabled=False):
        logits_SM = anchor_SD @ key_MD.T / temperature
    own_S1 = own_S[:, None]
    logits_SM = logits_SM.masked_fill(same_SM.scatter(-1, own_S1, False), -math.inf)
    return logits_SM.logsumexp(-1) - logits_SM.gather(-1, own_S1).squeeze(-1)


@final
class Contrastive(OneLoss, nn.Module):
    """Token-level InfoNCE between the student's projected states and the teacher's.

    Args:
        temperature: of the softmax over cosines.
        tokens_per_row: tokens that a row of the batch gives, evenly spaced over its valid ones.
        queue_size: earlier states of the teacher that serve as negatives too; 0 = none. It is filled by training steps
            alone, is part of the checkpoint and takes teacher width x 4 bytes a place.
        teacher_layer: 0-based; null = the last, after the final norm.
        student_layer: 0-based; null = the last, after the final norm.
        coefficient: constant factor of the raw value.

    Raises:
        UserError: a number that cannot be meant.
    """

    component = "contrastive_loss"
    unit = "micro_batches"
    looks_at = "hidden states, queue of the teacher's"

    queue_QD: Tensor
    queue_contexts_Q: Tensor
    place: Tensor

    def __init__(
        self,
        temperature: float = 0.07,
        tokens_per_row: int = 64,
        queue_size: int = 4096,
        teacher_layer: int | None = None,
        student_layer: int | None = None,
        coefficient: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0 < temperature < math.inf:
            raise UserError(f"model.contrastive.temperature: {temperature}; give a number above 0")
        check_coefficient("model.contrastive.coefficient:", coefficient)
        for key, value, least in (("tokens_per_row", tokens_per_row, 1), ("queue_size", queue_size, 0)):
            if value < least:
                raise UserError(f"model.contrastive.{key}: {value} is not a count; give {least} or more")
        self.temperature, self.coefficient = temperature, coefficient
        self.tokens_per_row, self.queue_size = tokens_per_row, queue_size
        self.teacher_layer, self.student_layer = teacher_layer, student_layer
        self.projection: nn.Module = nn.Identity()
        self.rows = 1

    def build(self, teacher: PreTrainedModel, student: PreTrainedModel, rows: int | None = None) -> None:
        """Chooses the layers and makes the projection and an empty queue.

        Args:
            teacher: whose states are told apart.
            student: whose states are projected.
            rows: of a full micro-batch on one rank. Shorter ones are filled up to it, since ranks must agree; None
                where all micro-batches are full.

        Raises:
            UserError: a layer that is not there.
        """
        configs = {"teacher": teacher.config, "student": student.config}
        needs, widths = {}, {}
        for whose, layer in (("teacher", self.teacher_layer), ("student", self.student_layer)):
            config = configs[whose].get_text_config(decoder=True)
            layer = config.num_hidden_layers - 1 if layer is None else layer
            check_layers(f"model.contrastive.{whose}_layer", [layer], config.num_hidden_layers)
            needs[whose], widths[whose] = Needs(hidden=frozenset([layer])), config.hidden_size
        self.teacher_needs, self.student_needs = needs["teacher"], needs["student"]
        self.projection = nn.Linear(widths["student"], widths["teacher"])
        self.rows = rows or 1
        self.register_buffer("queue_QD", torch.zeros(self.queue_size, widths["teacher"]))
        self.register_buffer("queue_contexts_Q", torch.full((self.queue_size,), EMPTY))
        self.register_buffer("place", torch.zeros((), dtype=torch.long))

    def settings(self) -> dict[str, Any]:
        """What the projection and queue in a checkpoint depend on, as plain values."""
        layers = {"teacher_layer": self.teacher_needs.hidden, "student_layer": self.student_needs.hidden}
        return {
            "temperature": self.temperature,
            "tokens_per_row": self.tokens_per_row,
            "queue_size": self.queue_size,
            **{name: next(iter(layer), None) for name, layer in layers.items()},
            "coefficient": self.coefficient,
        }

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        """Mean over the sampled tokens of this micro-batch on all ranks, times the coefficient, scalar, nats per token.

        The value is global; the gradient is this rank's part times the number of ranks, which DDP's averaging turns
        into the whole. Where gradients are recorded the teacher's states go into the queue afterwards.

        Args:
            student: with what `student_needs` says.
            teacher: detached, with what `teacher_needs` says.
            batch: which both have read.
        """
        tokens = batch.compared
        position_S, taken_S = sample(tokens, self.tokens_per_row)
        (ours,), (theirs,) = self.student_needs.hidden, self.teacher_needs.hidden  # others' layers are there too
        states_SD, target_SD = (
            hidden_BLD.flatten(0, 1).index_select(0, position_S)
            for hidden_BLD in (student.hidden[ours], batch.over_student(teacher.hidden[theirs]))
        )
        context_T = contexts(tokens.input_ids, tokens.position_ids).flatten()
        context_S = context_T.index_select(0, position_S).masked_fill(~taken_S, EMPTY)
        anchor_SD = F.normalize(full_precision(apply(self.projection, normalise(states_SD))), dim=-1)
        key_SD = F.normalize(normalise(target_SD.detach()), dim=-1).to(anchor_SD.dtype)

        missing = self.rows * self.tokens_per_row - len(position_S)
        key_SD, context_S, taken_S = (_filled(rows, missing) for rows in (key_SD, context_S, taken_S))
        anchor_SD = _filled(anchor_SD, missing)
        key_MD, context_M = _of_all_ranks(key_SD), _of_all_ranks(context_S)
        everything = torch.cat([key_MD, self.queue_QD.to(key_MD.dtype)])
        context_everything = torch.cat([context_M, self.queue_contexts_Q])
        same = (context_S[:, None] == context_everything) | (context_everything == EMPTY)
        rank, world = (dist.get_rank(), dist.get_world_size()) if _distributed() else (0, 1)
        own_S = torch.arange(len(context_S), device=context_S.device) + rank * len(context_S)
        local = (info_nce(anchor_SD, everything, own_S, same, self.temperature) * taken_S).sum()
        shared = torch.stack([local.detach(), taken_S.sum().to(local.dtype)])
        if world > 1:
            dist.all_reduce(shared)
        count = shared[1].clamp(min=1)
        if torch.is_grad_enabled():
            self._enqueue(key_MD, context_M)
        return (shared[0] / count + world * (local - local.detach()) / count) * self.coefficient

    @torch.no_grad()
    def _enqueue(self, key_MD: Tensor, context_M: Tensor) -> None:
        """Writes the states over the oldest ones; those that are not finite as places that hold no token."""
        if not self.queue_size:
            return
        finite_M = key_MD.isfinite().all(-1)
        key_MD, context_M = key_MD.where(finite_M[:, None], 0.0), context_M.where(finite_M, EMPTY)
        key_MD, context_M = key_MD[-self.queue_size :], context_M[-self.queue_size :]
        index_M = (torch.arange(len(key_MD), device=key_MD.device) + self.place) % self.queue_size
        self.queue_QD.index_copy_(0, index_M, key_MD.to(self.queue_QD.dtype))
        self.queue_contexts_Q.index_copy_(0, index_M, context_M)
        self.place.add_(len(key_MD)).remainder_(self.queue_size)


def _filled(rows: Tensor, missing: int) -> Tensor:
    """The rows, and so many rows of zeros behind them."""
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing > 0 else rows


def _distributed() -> bool:
    return dist.is_initialized()


def _of_all_ranks(rows: Tensor) -> Tensor:
    """The ranks' rows one after the other; every rank has as many."""
    if not _distributed():
        return rows
    gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, rows)
    return torch.cat(gathered)
