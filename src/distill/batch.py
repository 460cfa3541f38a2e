"""A batch of training or validation: the tokens of both models, and the counts that make its losses add up.

Shapes: B rows, L positions, N valid tokens (positions whose next token has a label), D width; where the two models have
tokenizers of their own, L' positions of the teacher, G groups of teacher ids, E entries of all groups.
"""

from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORE = -100  # label of a position that is no target


@dataclass(frozen=True, eq=False)
class Documents:
    """Where the documents of packed rows begin, the rows one after the other.

    Args:
        starts: int32 [documents + 1], flat indices b L + t; the last is B L.
        longest: tokens of the longest.
        flat: B L.
    """

    starts: Tensor
    longest: int
    flat: int
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, rows: int, window: int | None = None) -> Tensor:
        """Which earlier positions belong to the same document, and to the last `window`, bool [B, 1, L, L]."""
        if window not in self._masks:
            total = self.flat
            places_T = torch.arange(total, device=self.starts.device, dtype=self.starts.dtype)
            document_BL = torch.bucketize(places_T, self.starts, right=True).view(rows, -1)
            places_L = places_T[: total // rows]
            behind_LL = places_L[:, None] - places_L
            causal_LL = behind_LL >= 0 if window is None else (behind_LL >= 0) & (behind_LL < window)
            self._masks[window] = ((document_BL[:, :, None] == document_BL[:, None]) & causal_LL)[:, None]
        return self._masks[window]


@dataclass(frozen=True, eq=False)
class Tokens:
    """Rows of tokens as one model reads them; rows may hold several documents, and padding is on the right.

    Args:
        input_ids: int64 [B, L].
        labels: int64 [B, L], a target's own id at its own position, IGNORE elsewhere, on a document's first too.
        attention_mask: int64 [B, L], 0 where a row is padded.
        position_ids: int64 [B, L], places within a document; padding counts as a document of its own.
        positions: int64 [N], flat indices b L + t of the valid tokens.
        packed: whether a row holds several documents, padding aside.
        starts: see `Documents`; None = read from the position ids, for which the host waits.
        longest: likewise.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    positions: Tensor
    packed: bool
    starts: Tensor | None = None
    longest: int = 0

    @cached_property
    def documents(self) -> Documents:
        """Where documents begin, padding too."""
        total = self.position_ids.numel()
        if self.starts is not None:
            return Documents(self.starts, self.longest, total)
        begins = (self.position_ids.flatten() == 0).nonzero().flatten()
        starts = torch.cat([begins, begins.new_tensor([total])])
        return Documents(starts.int(), int(starts.diff().max()), total)

    @cached_property
    def labels_N(self) -> Tensor:
        """Next-token ids of the valid tokens, int64 [N]."""
        return self.labels.flatten().index_select(0, self.positions + 1)

    @cached_property
    def real_BL(self) -> Tensor:
        """Whether a position holds a token rather than padding, bool."""
        return self.attention_mask.bool()

    @cached_property
    def document_BL(self) -> Tensor:
        """Number of the document that a position belongs to, int64."""
        return (self.position_ids == 0).cumsum(-1)

    @cached_property
    def query_BL(self) -> Tensor:
        """Whether a valid token has an earlier one in its document, bool: the first has but itself to look at."""
        valid_T = torch.zeros(self.position_ids.numel(), dtype=torch.bool, device=self.positions.device)
        return valid_T.index_fill_(0, self.positions, True).view_as(self.position_ids) & (self.position_ids > 0)

    @cached_property
    def query_N(self) -> Tensor:
        """The same for each valid token, bool [N]."""
        return self.position_ids.flatten().index_select(0, self.positions) > 0

    def valid(self, states_BLD: Tensor) -> Tensor:
        """States at the valid tokens, (B, L, D) -> (N, D)."""
        return states_BLD.flatten(0, 1).index_select(0, self.positions)

    def laid(self, states_ND: Tensor) -> Tensor:
        """States of the valid tokens at their places, (N, D) -> (B, L, D); 0 elsewhere."""
        laid_TD = states_ND.new_zeros(self.input_ids.numel(), states_ND.shape[-1])
        return laid_TD.index_copy(0, self.positions, states_ND).view(*self.input_ids.shape, -1)

    def to(self, device: torch.device | str, non_blocking: bool | None = None) -> "Tokens":
        """The same on another device; see `Batch.to`."""
        if non_blocking is None:
            non_blocking = torch.device(device).type == "cuda"
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Tokens":
        """The same in pinned host memory."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Any) -> "Tokens":
        return replace(self, **{name: change(value) for name, value in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {field.name: value for field in fields(self) if isinstance(value := getattr(self, field.name), Tensor)}


@dataclass(frozen=True, eq=False)
class Spelling:
    """What the host alone looks at of how two tokenizers meet, in NumPy: nothing waits for a device to say it.

    Args:
        ids_T: the teacher's ids, int64 [B L'], the rows one after the other.
        place_N: flat index of k in them, -1 where there is no target.
        inside_N: bytes of u.
        own_N: the student's id at each valid token.
        label_N: the one behind it.
        group_N: as in `Pairs`.
        starts_G: likewise.
    """

    ids_T: np.ndarray
    place_N: np.ndarray
    inside_N: np.ndarray
    own_N: np.ndarray
    label_N: np.ndarray
    group_N: np.ndarray
    starts_G: np.ndarray

    @cached_property
    def inside_I(self) -> np.ndarray:
        """Which of the N have a u, ascending."""
        return np.flatnonzero(self.group_N > 0)

    @cached_property
    def sizes_I(self) -> np.ndarray:
        """How many entries each of their groups has."""
        return np.diff(self.starts_G)[self.group_N[self.inside_I] - 1]


@dataclass(frozen=True, eq=False)
class Pairs:
    """Where each valid token of the student stands between the teacher's tokens, where the tokenizers differ.

    At the student's position n, c is the byte behind its token, k the last of the teacher's positions that ends at or
    before c, and u the bytes between the two, with which the teacher's next token begins.

    Args:
        teacher_N: int64, flat index b L' + t of k in the teacher's rows; 0 where there is no target.
        group_N: int64, 0 where u is empty, from 1 on the group of teacher tokens that begin with u and go on; -1 where
            there is no target.
        starts_G: int64 [G + 1], the first entry of each group, from group 1 on, and the number of all.
        teacher_ids_E: int64, the ids of a group.
        student_ids_E: int64, the first id of the student for what a teacher's token has left behind u.
        spelling: the host's part.
    """

    teacher_N: Tensor
    group_N: Tensor
    starts_G: Tensor
    teacher_ids_E: Tensor
    student_ids_E: Tensor
    spelling: Spelling

    @cached_property
    def taught_M(self) -> Tensor:
        """Which of the N have a target, int64 [M]; the host knows, and nothing waits for a device."""
        taught = np.flatnonzero(self.spelling.group_N >= 0)
        return torch.from_numpy(taught).to(self.group_N.device, non_blocking=True)

    def to(self, device: torch.device | str, non_blocking: bool | None = None) -> "Pairs":
        """The same on another device; see `Batch.to`."""
        if non_blocking is None:
            non_blocking = torch.device(device).type == "cuda"
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Pairs":
        """The same in pinned host memory."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Any) -> "Pairs":
        return replace(self, **{name: change(value) for name, value in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {field.name: value for field in fields(self) if isinstance(value := getattr(self, field.name), Tensor)}


@dataclass(frozen=True, eq=False)
class Batch:
    """What a loader yields.

    Args:
        student: tokens as the student reads them.
        teacher: the same documents as the teacher reads them; the same object unless the tokenizers differ.
        units: kind of unit -> count over the whole optimizer step and all ranks in training, over this batch in
            evaluation.
        bytes: of text behind the labels.
        rows: numbers of the rows in the table that they come from, those of training and validation distinct; none for
            a stream's, and for a row without labels that only keeps the ranks in step.
        pairs: how the tokens of the two meet; None unless the tokenizers differ.
    """

    student: Tokens
    teacher: Tokens
    units: dict[str, int]
    bytes: int
    rows: tuple[int, ...] = ()
    pairs: Pairs | None = None

    def count(self, unit: str) -> int:
        """Units of a kind; the targets of `kd_loss` are all tokens unless the tokenizers differ."""
        return self.units["tokens" if unit == "targets" and unit not in self.units else unit]

    @cached_property
    def compared(self) -> Tokens:
        """The student's tokens as if those alone were there whose states have one of the teacher's beside them.

        That is the state of the teacher's last token that ends where the student's does, or before.
        """
        if self.pairs is None:
            return self.student
        positions_M = self.student.positions.index_select(0, self.pairs.taught_M)
        mask_BL = torch.zeros_like(self.student.attention_mask)
        mask_BL.view(-1).index_fill_(0, positions_M, 1)
        return replace(self.student, positions=positions_M, attention_mask=mask_BL)

    @cached_property
    def theirs_M(self) -> Tensor:
        """Flat indices b L' + t of the teacher's tokens beside the compared ones, int64 [M]."""
        if self.pairs is None:
            return self.student.positions
        return self.pairs.teacher_N.index_select(0, self.pairs.taught_M)

    def of_teacher(self, states_BLD: Tensor) -> Tensor:
        """The teacher's states beside the compared tokens, (B, L', D) -> (M, D)."""
        return states_BLD.flatten(0, 1).index_select(0, self.theirs_M)

    def over_student(self, states_BLD: Tensor) -> Tensor:
        """The teacher's states at the student's positions, (B, L', D) -> (B, L, D); 0 where none is compared."""
        return states_BLD if self.pairs is None else self.compared.laid(self.of_teacher(states_BLD))

    def to(self, device: torch.device | str, non_blocking: bool | None = None) -> "Batch":
        """The same on another device.

        Args:
            device: where to.
            non_blocking: whether the host goes on meanwhile; None = on the way to a CUDA device, for Lightning asks for
                it for bare tensors alone, and would wait for each of a batch's.
        """
        return self._each(lambda part: part.to(device, non_blocking))

    def pin_memory(self) -> "Batch":
        """The same in pinned host memory."""
        return self._each(lambda part: part.pin_memory())

    def _each(self, change: Any) -> "Batch":
        student: Tokens = change(self.student)
        teacher = student if self.teacher is self.student else change(self.teacher)
        pairs = None if self.pairs is None else change(self.pairs)
        return replace(self, student=student, teacher=teacher, pairs=pairs)

    def plain(self) -> dict[str, Any]:
        """Tensors and numbers by name, so that a saved batch loads without this program."""
        parts: dict[str, Any] = {**self.student.tensors(), "packed": self.student.packed}
        if self.teacher is not self.student:
            parts["teacher"] = {**self.teacher.tensors(), "packed": self.teacher.packed}
        if self.pairs is not None:
            parts["pairs"] = self.pairs.tensors()
        return parts | {"units": self.units, "bytes": self.bytes, "rows": list(self.rows)}
