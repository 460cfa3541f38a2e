"""attention_loss: what a student's token looks at follows the teacher's, one layer of each, any numbers of heads.

Two forms. Relations (MiniLMv2): dot products among queries, among keys and among values, re-split into a common number
of relation heads. Maps: the attention itself, averaged over heads. Nothing here learns, so nothing can become a target.
Scores of the chosen layer are computed once more on each side, and only layers whose attention goes through
transformers' attention interface can be read.

Shapes: B rows, L positions, H query heads, G key-value heads, d width of a head, D = heads * d.
"""

from dataclasses import replace
from typing import Any, Literal, final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.batch import Batch
from distill.errors import UserError
from distill.losses.component import OneLoss, check_coefficient
from distill.losses.layers import check_layers
from distill.losses.map_kl import map_kl
from distill.losses.relation_kl import relation_kl
from distill.models.trace import QKV, Needs, Trace, try_attention


@final
class AttentionTransfer(OneLoss):
    """Attention transfer between one layer of the teacher and one of the student.

    Args:
        form: relations (of queries, keys and values) or maps (head-averaged attention).
        teacher_layer: 0-based; null = the last. Of deep teachers the paper prefers one of the upper middle.
        student_layer: 0-based; null = the last.
        relation_heads: heads that queries, keys and values are re-split into, a divisor of all their widths; null =
            for each of them the largest common one up to 16.
        coefficient: constant factor of the raw value.

    Raises:
        UserError: a number that cannot be meant.

    Source:
        MiniLMv2, arXiv 2012.15828; MiniLM's own attention distributions, arXiv 2002.10957.
    """

    component = "attention_loss"
    unit = "queries"  # valid tokens with an earlier one in their document: the first has but itself to look at
    looks_at = "queries, keys, values"

    def __init__(
        self,
        form: Literal["relations", "maps"] = "relations",
        teacher_layer: int | None = None,
        student_layer: int | None = None,
        relation_heads: int | None = None,
        coefficient: float = 1.0,
    ) -> None:
        check_coefficient("model.attention.coefficient:", coefficient)
        if relation_heads is not None and relation_heads < 1:
            raise UserError(f"model.attention.relation_heads: {relation_heads} is not a count; give 1 or more")
        if relation_heads is not None and form == "maps":
            raise UserError(
                f"model.attention.relation_heads: {relation_heads} has no meaning for maps; set form: relations or "
                "leave it out"
            )
        self.form = form
        self.teacher_layer, self.student_layer = teacher_layer, student_layer
        self.relation_heads = relation_heads
        self.coefficient = coefficient

    def build(self, teacher: PreTrainedModel, student: PreTrainedModel, rows: int | None = None) -> None:
        """Choose the layers and see on a few made-up tokens that their attention can be read and compared.

        Raises:
            UserError: a layer that is not there or cannot be read, or relation heads that do not divide the widths.
        """
        self.teacher_needs, theirs = self._layer(teacher, "teacher", self.teacher_layer)
        self.student_needs, ours = self._layer(student, "student", self.student_layer)
        if self.relation_heads is not None:
            for name, one, other in zip(("queries", "keys", "values"), _states(ours), _states(theirs), strict=True):
                for whose, width in (("student", one.shape[-1]), ("teacher", other.shape[-1])):
                    if width % self.relation_heads:
                        raise UserError(
                            f"model.attention.relation_heads: {self.relation_heads} does not divide the width {width} "
                            f"of the {whose}'s {name}; give a common divisor or leave it out"
                        )

    def _layer(self, model: PreTrainedModel, whose: str, layer: int | None) -> tuple[Needs, QKV]:
        depth = model.config.get_text_config(decoder=True).num_hidden_layers
        layer = depth - 1 if layer is None else layer
        key = f"model.attention.{whose}_layer"
        check_layers(key, [layer], depth)
        qkv = try_attention(model, layer, key)
        if self.form == "maps" and not qkv.plain:
            raise UserError(
                f"{key}: attention of {type(model).__name__} is more than scaled dot products (biases, sinks or caps), "
                "so its maps cannot be made from queries and keys; set model.attention.form: relations"
            )
        return Needs(attention=frozenset([layer])), qkv

    def settings(self) -> dict[str, Any]:
        """What a checkpoint was made with, as plain values."""
        layers = {"teacher_layer": self.teacher_needs.attention, "student_layer": self.student_needs.attention}
        chosen = {name: next(iter(layer), None) for name, layer in layers.items()}
        return {
            "form": self.form,
            **chosen,
            "relation_heads": self.relation_heads,
            "coefficient": self.coefficient,
        }

    def __call__(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        """Sum over queries, scalar, nats times the coefficient; relations are averaged over their three kinds.

        Args:
            student: with what `student_needs` says.
            teacher: detached, with what `teacher_needs` says.
            batch: which both have read.
        """
        ours, theirs = (next(iter(side.attention.values())) for side in (student, teacher))
        tokens = batch.compared
        places = (tokens.document_BL, tokens.real_BL, tokens.query_BL)
        dtype = torch.promote_types(ours.query_BHLd.dtype, torch.float32)
        if self.form == "maps":
            if batch.pairs is not None:
                raise UserError(
                    "model.attention.form: maps are of the same tokens on both sides, and the student has its own "
                    "tokenizer; set relations"
                )
            total = map_kl(_cast(ours, dtype), _cast(theirs, dtype), *places)
        else:
            their_states = [batch.over_student(states) for states in _states(_cast(theirs, dtype))]
            pairs = zip(_states(_cast(ours, dtype)), their_states, strict=True)
            total = torch.stack(
                [relation_kl(one, other, *places, self.relation_heads, with_self=True) for one, other in pairs]
            ).mean()
        return total * self.coefficient


def _cast(qkv: QKV, dtype: torch.dtype) -> QKV:
    return replace(
        qkv,
        query_BHLd=qkv.query_BHLd.to(dtype),
        key_BGLd=qkv.key_BGLd.to(dtype),
        value_BGLd=qkv.value_BGLd.to(dtype),
    )


def _states(qkv: QKV) -> list[Tensor]:
    """Queries, keys and values with their heads side by side, [B, L, D] of their own widths."""
    return [states.transpose(1, 2).flatten(2) for states in (qkv.query_BHLd, qkv.key_BGLd, qkv.value_BGLd)]
