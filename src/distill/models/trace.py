"""One forward pass of a model, and what the losses look at on its way: chosen layers' outputs, queries, keys, values.

Queries, keys and values are read where every family hands them to transformers' attention interface, after positions
and norms, for the length of one forward pass; outside of it nothing is installed and nothing costs. So gradient
checkpointing, which runs layers again later, fills nothing twice. What does not go through the interface (eager
attention, layers without softmax attention) cannot be read, and is refused before training.

Shapes: B rows, L positions, N valid positions, D width, H query heads, G key-value heads, d width of a head.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from distill.batch import Tokens
from distill.errors import UserError
from distill.models.attention import NAME, allowed


@dataclass(frozen=True)
class Needs:
    """What losses look at, as 0-based layer indices.

    Args:
        hidden: layers whose output is read; the last one's comes after the final norm.
        attention: layers whose queries, keys and values are read.
        recorders: what else watches a layer during the pass, the experts of a teacher for example.
    """

    hidden: frozenset[int] = frozenset()
    attention: frozenset[int] = frozenset()
    recorders: "tuple[Recorder, ...]" = ()

    def __or__(self, other: "Needs") -> "Needs":
        return Needs(self.hidden | other.hidden, self.attention | other.attention, self.recorders + other.recorders)


class Recorder(Protocol):
    """Watches one layer for the length of a forward pass."""

    @property
    def layer(self) -> int:
        """Index of the layer, under which its record is found."""

    def hooks(self, record: dict[str, Tensor]) -> list[RemovableHandle]:
        """Hooks that fill the record; they are removed after the pass."""


def merged(needs: Iterable[Needs]) -> Needs:
    """What all of them look at together."""
    return reduce(or_, needs, Needs())


@dataclass(frozen=True, eq=False)
class QKV:
    """What one layer's attention is computed from.

    Args:
        query_BHLd: after positions and norms.
        key_BGLd: the same; G divides H.
        value_BGLd: its heads may have another width than those of the keys.
        mask: bool, broadcasts to [B, H, L, L], true = may be attended to; None = every earlier position.
        scale: of the dot products.
        plain: whether the scores are scaled dot products alone, without biases, sinks or caps.
    """

    query_BHLd: Tensor
    key_BGLd: Tensor
    value_BGLd: Tensor
    mask: Tensor | None
    scale: float
    plain: bool


@dataclass(frozen=True, eq=False)
class Trace:
    """What a forward pass left.

    Args:
        last_BLD: last hidden state, after the final norm, before the head; of a teacher from a cache nothing, [0].
        hidden: layer -> its output [B, L, D].
        attention: layer -> its queries, keys and values.
        records: layer -> what its recorder noted.
    """

    last_BLD: Tensor
    hidden: Mapping[int, Tensor]
    attention: Mapping[int, QKV]
    records: Mapping[int, dict[str, Tensor]] = field(default_factory=dict)


def decode(model: PreTrainedModel, tokens: Tokens, **kwargs: Any) -> Any:
    """The decoder's output without the head, documents of packed rows hidden from each other by their position ids.

    Rows that hold one document need neither a mask nor positions: attention is causal and padding is on the right.
    """
    if tokens.packed:
        kwargs["position_ids"] = tokens.position_ids
        if model.get_decoder().config._attn_implementation == NAME:
            kwargs["documents"] = tokens.documents
    return model.get_decoder()(input_ids=tokens.input_ids, use_cache=False, **kwargs)


def trace(model: PreTrainedModel, tokens: Tokens, needs: Needs = Needs()) -> Trace:
    """`decode`, keeping what the losses need and nothing else."""
    options = {"output_hidden_states": sorted(layer + 1 for layer in needs.hidden)} if needs.hidden else {}
    with _reading_attention(model, needs.attention) as attention, recording(needs.recorders) as records:
        output = decode(model, tokens, **options)
    hidden = {layer: output.hidden_states[layer + 1] for layer in needs.hidden}  # 0 is the embedding
    return Trace(output.last_hidden_state, hidden, attention, records)


@contextmanager
def recording(recorders: Iterable[Recorder]) -> Iterator[dict[int, dict[str, Tensor]]]:
    """What the recorders note in the forward pass inside the block, by layer; their hooks exist only there."""
    records: dict[int, dict[str, Tensor]] = {recorder.layer: {} for recorder in recorders}
    handles = [handle for recorder in recorders for handle in recorder.hooks(records[recorder.layer])]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _reading_attention(model: PreTrainedModel, layers: frozenset[int]) -> Iterator[dict[int, QKV]]:
    """Wraps the attention function that the model uses; yields what its layers hand over."""
    read: dict[int, QKV] = {}
    name = model.get_decoder().config._attn_implementation
    if not layers or name not in ALL_ATTENTION_FUNCTIONS:
        yield read
        return
    original = ALL_ATTENTION_FUNCTIONS[name]

    def reading(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> Any:
        if (layer := getattr(module, "layer_idx", None)) in layers:
            mask = attention_mask if isinstance(attention_mask, Tensor) and attention_mask.ndim == 4 else None
            if name == NAME:
                mask = allowed(query, options.get("documents"), options.get("sliding_window"))
            extras = any(options.get(extra) is not None for extra in ("position_bias", "s_aux", "softcap"))
            boolean = mask is None or mask.dtype == torch.bool
            scale = options.get("scaling") or query.shape[-1] ** -0.5
            read[layer] = QKV(query, key, value, mask if boolean else None, scale, boolean and not extras)
        return original(module, query, key, value, attention_mask, **options)

    ALL_ATTENTION_FUNCTIONS[name] = reading
    try:
        yield read
    finally:
        if ALL_ATTENTION_FUNCTIONS._global_mapping.get(name) is original:
            del ALL_ATTENTION_FUNCTIONS[name]
        else:  # somebody's own override was there
            ALL_ATTENTION_FUNCTIONS[name] = original


def four_tokens(device: torch.device) -> Tokens:
    """A row of four made-up tokens."""
    ids_1L = torch.arange(4, device=device)[None]
    return Tokens(ids_1L, ids_1L, torch.ones_like(ids_1L), ids_1L, ids_1L[0, :-1], packed=False)


@torch.no_grad()
def try_attention(model: PreTrainedModel, layer: int, key: str) -> QKV:
    """Queries, keys and values of a layer on four made-up tokens.

    Args:
        model: on any device, in any mode, not sharded.
        layer: 0-based.
        key: YAML key that error messages name.

    Raises:
        UserError: the layer's attention cannot be read.
    """
    training = model.training
    attention = trace(model.eval(), four_tokens(model.device), Needs(attention=frozenset([layer]))).attention
    model.train(training)
    if layer not in attention:
        used = model.get_decoder().config._attn_implementation
        raise UserError(
            f"{key}: {layer} of {type(model).__name__} ({used} attention) hands no queries and keys to transformers' "
            "attention interface; choose another layer, or a family that runs with sdpa"
        )
    return attention[layer]
