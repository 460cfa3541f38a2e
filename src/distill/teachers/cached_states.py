"""What losses on layers look at, on disk: chosen hidden states, and a mixture of experts' routing at its recorded k.

A position takes a record of fixed width, a field for each layer's states behind the other; all positions of a row are
stored, not only its valid tokens, for the keys of a relation need not be valid. Hidden states and mixtures are rounded
to one dtype; logits and weights of a router stay as it made them, and indices are whole numbers.

There is nothing to ask an expert with: routing at another k, a finite tau and the slices of a dense teacher need its
weights. Nor are queries and keys stored.

Shapes: B rows, L positions, T = B * L, D width, E experts, K experts per token, W bytes of a position.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from distill.batch import Tokens
from distill.curriculum import Schedule, round_half_up
from distill.errors import UserError
from distill.models.trace import Needs, Trace
from distill.teachers.experts import MoeView

HIDDEN, MIXTURE, INDEX = "hidden", "mixture_TD", "index_TK"
ROUTING = (MIXTURE, "logits_TE", "weights_TK", INDEX)  # of what a `MoeView` notes
NO_ATTENTION = (
    "looks at the teacher's queries, keys and values, which no cache holds; leave it out, or give a live teacher"
)


@dataclass(frozen=True)
class Field:
    """Some numbers of a position.

    Args:
        layer: of the teacher, 0-based.
        name: "hidden", or one of what a `MoeView` notes.
        dtype: of a number, by its name in torch.
        width: how many.
    """

    layer: int
    name: str
    dtype: str
    width: int

    @property
    def bytes(self) -> int:
        """Of a position."""
        return self.width * self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of a number."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found


@dataclass(frozen=True)
class States:
    """How the states of a position lie behind each other; no field for a cache without them.

    Args:
        fields: in the order of their bytes.
    """

    fields: tuple[Field, ...] = ()

    @classmethod
    def described_by(cls, described: Iterable[dict[str, Any]]) -> "States":
        """What a manifest describes."""
        return cls(tuple(Field(**field) for field in described))

    @classmethod
    def like(cls, seen: Trace, needs: Needs, dtype: torch.dtype | None) -> "States":
        """The layout for what is needed, each field as wide as a forward pass has it.

        Args:
            seen: what the pass left.
            needs: that `check_storable` lets through.
            dtype: that hidden states and mixtures are rounded to; None = the teacher's.
        """
        named = [(layer, HIDDEN) for layer in sorted(needs.hidden)]
        named += [(layer, name) for layer in sorted({r.layer for r in needs.recorders}) for name in ROUTING]
        fields = []
        for layer, name in named:
            values = _values(seen, layer, name)
            kept = values.dtype
            if name in (HIDDEN, MIXTURE):
                kept = dtype or kept
            elif name == INDEX:  # as narrow as the number of experts allows
                kept = torch.uint8 if seen.records[layer]["logits_TE"].shape[-1] <= 256 else torch.int16
            fields.append(Field(layer, name, str(kept).removeprefix("torch."), values.shape[-1]))
        return cls(tuple(fields))

    def described(self) -> list[dict[str, Any]]:
        """What the manifest says of it."""
        return [asdict(field) for field in self.fields]

    @cached_property
    def bytes(self) -> int:
        """W."""
        return sum(field.bytes for field in self.fields)

    @property
    def layers(self) -> dict[str, list[int]]:
        """The layers whose hidden states are there, and those whose routing is."""
        return {
            "hidden": [field.layer for field in self.fields if field.name == HIDDEN],
            "routing": [field.layer for field in self.fields if field.name == INDEX],
        }

    @property
    def k(self) -> int | None:
        """Experts per token of the stored routing, None without."""
        return next((field.width for field in self.fields if field.name == INDEX), None)

    def __str__(self) -> str:
        """In a few words."""
        told = [f"{name} of teacher layers {layers}" for name, layers in self.layers.items() if layers]
        dtypes = {field.dtype for field in self.fields if field.name in (HIDDEN, MIXTURE)}
        return f"{' and '.join(told)} in {', '.join(sorted(dtypes))}" if told else "no states of layers"

    def encode(self, seen: Trace, tokens: Tokens) -> list[Tensor]:
        """The records of each row, uint8 [positions but padding, W], on the CPU."""
        shape = tokens.input_ids.shape
        parts = [torch.zeros(*shape, 0, dtype=torch.uint8, device=tokens.input_ids.device)]
        parts += [
            _values(seen, field.layer, field.name)
            .to(field.torch_dtype)
            .reshape(*shape, -1)
            .contiguous()
            .view(torch.uint8)
            for field in self.fields
        ]
        record_BLW = torch.cat(parts, -1).cpu()
        used_B = tokens.attention_mask.sum(-1).tolist()  # padding is on the right
        return [record_BLW[row, :used] for row, used in enumerate(used_B)]

    def decode(self, record_BLW: Tensor, needs: Needs) -> Trace:
        """What a forward pass would have left of the layers that are needed, zeros in the place of padding.

        There is no last hidden state: who looks at the last layer needs it by its number.
        """
        hidden: dict[int, Tensor] = {}
        records: dict[int, dict[str, Tensor]] = {}
        recorded, start = {recorder.layer for recorder in needs.recorders}, 0
        for field in self.fields:
            if field.layer in (needs.hidden if field.name == HIDDEN else recorded):
                part = record_BLW[..., start : start + field.bytes].contiguous().view(field.torch_dtype)
                if field.name == HIDDEN:
                    hidden[field.layer] = part
                else:
                    part_TW = part.flatten(0, 1)
                    records.setdefault(field.layer, {})[field.name] = part_TW.long() if field.name == INDEX else part_TW
            start += field.bytes
        return Trace(record_BLW.new_empty(0), hidden, {}, records)

    def check(self, where: str, needs: Mapping[str, Needs], experts: Schedule | None) -> None:
        """Compares what is there with what a run looks at.

        Args:
            where: the cache, as an error names it.
            needs: key of `model:` -> what it looks at.
            experts: the schedule of experts per token, None for the native number.

        Raises:
            UserError: something is not there; says whose and which.
        """
        for key, each in needs.items():
            check_storable(key, each)
            wanted = {"hidden": each.hidden, "routing": {recorder.layer for recorder in each.recorders}}
            for name, layers in wanted.items():
                if missing := sorted(set(layers) - set(self.layers[name])):
                    raise UserError(
                        f"{key}: looks at the {'hidden states' if name == 'hidden' else name} of the teacher's layer "
                        f"{missing[0]}, of which {where} holds nothing (it has {self}); choose what is there, or build "
                        "one with --states true for these losses"
                    )
            for view in each.recorders:
                assert isinstance(view, MoeView)
                self._check_experts(where, view.native_k, experts)

    def _check_experts(self, where: str, native: int, experts: Schedule | None) -> None:
        """Refuses other numbers of experts per token than that of the stored routing."""
        values = (
            [knot[1] for knot in experts] if isinstance(experts, list) else [native if experts is None else experts]
        )
        if any(round_half_up(value) != self.k for value in values):
            asked = f"null (the native {native})" if experts is None else experts
            raise UserError(
                f"curriculum.top_k_experts: {asked}, but the routing in {where} is with {self.k} experts a token; set "
                f"it to {self.k}, or give a live teacher"
            )


def _values(seen: Trace, layer: int, name: str) -> Tensor:
    """A field's numbers in what a forward pass left, [B, L, width] or [T, width]."""
    return seen.hidden[layer] if name == HIDDEN else seen.records[layer][name]


def check_storable(key: str, needs: Needs) -> None:
    """Refuses what no cache holds.

    Args:
        key: of `model:`, whose needs they are.
        needs: what it looks at.

    Raises:
        UserError: queries and keys, or experts that are no module of the teacher.
    """
    if needs.attention:
        raise UserError(f"{key}: {NO_ATTENTION}")
    if not all(isinstance(recorder, MoeView) for recorder in needs.recorders):
        raise UserError(
            f"{key}: cuts experts out of a dense teacher's weights, which no cache holds; leave it out, or give a live "
            "teacher"
        )
