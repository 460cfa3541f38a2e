"""Running some layers of a model on given states, by the family's own forward pass.

A state at a layer's border is all that a model needs to go on, so teacher and student can be walked through border by
border: memory holds one state of each, [rows, length, width], and every teacher layer runs once however many layers
are fitted. Masks and positions are the family's own: its decoder is called, the layers outside the span hand on what
they get, and the state is put in where the span begins.

Shapes: R rows, L positions, D width, N counted positions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.models.layers import decoder_layers

PART_TOKENS = 2048  # that go through a model at one time


@dataclass(frozen=True, eq=False)
class Rows:
    """Calibration rows.

    Args:
        ids_RL: token ids, padded on the right.
        counted_RL: which positions count. A document's first does not: some models keep values there that are
            hundreds of times larger than all others and say nothing.
        positions_RL: of each token in its document, for packed rows; None where a row is one text.
    """

    ids_RL: Tensor
    counted_RL: Tensor
    positions_RL: Tensor | None = None

    @staticmethod
    def of(ids_RL: Tensor) -> "Rows":
        """Full rows of one text each."""
        counted_RL = torch.ones_like(ids_RL, dtype=torch.bool)
        counted_RL[:, 0] = False
        return Rows(ids_RL, counted_RL)

    def first(self, count: int) -> "Rows":
        """The first rows."""
        positions = None if self.positions_RL is None else self.positions_RL[:count]
        return Rows(self.ids_RL[:count], self.counted_RL[:count], positions)

    def parts(self) -> Iterator[slice]:
        """Slices of rows of about PART_TOKENS."""
        rows, length = self.ids_RL.shape
        step = max(1, PART_TOKENS // length)
        return (slice(start, min(start + step, rows)) for start in range(0, rows, step))

    def to(self, device: torch.device) -> "Rows":
        """The same elsewhere."""
        positions = None if self.positions_RL is None else self.positions_RL.to(device)
        return Rows(self.ids_RL.to(device), self.counted_RL.to(device), positions)


class Walk:
    """A model that is walked through layer by layer.

    Args:
        model: in eval mode; its layers are moved to `device` while they run and back after.
        rows: on `device`.
        device: where layers run.
        autocast: dtype of products there; None = that of the weights.
    """

    def __init__(
        self, model: PreTrainedModel, rows: Rows, device: torch.device, autocast: torch.dtype | None = None
    ) -> None:
        self.model, self.rows, self.device, self.autocast = model, rows, device, autocast
        self.layers = decoder_layers(model)
        self._tuples = _returns_tuples(model)

    def embed(self) -> Tensor:
        """States [R, L, D] that enter layer 0."""
        found: list[Tensor] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append((args[0] if args else kwargs["hidden_states"]).detach())

        handle = self.layers[0].register_forward_pre_hook(before, with_kwargs=True)
        try:
            with torch.no_grad(), self.present(range(0)), self._skipping(range(0)):
                for part in self.rows.parts():
                    self._decode(part, input_ids=self.rows.ids_RL[part])
        finally:
            handle.remove()
        return torch.cat(found)

    def through(self, span: range, states_BLD: Tensor, part: slice | Tensor) -> tuple[Tensor, Tensor]:
        """States after the layers of a span, and the same after the final norm; gradients flow where they are enabled.

        Args:
            span: 0-based layers, ascending; empty for the norm alone.
            states_BLD: that enter its first layer.
            part: which of the rows these are.
        """
        found: list[Tensor] = []

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (states_BLD, *args[1:]), kwargs
            return args, kwargs | {"hidden_states": states_BLD}

        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)

        first, last = (span[0], span[-1]) if len(span) else (0, -1)
        handles = [
            self.layers[first].register_forward_pre_hook(enter, with_kwargs=True),
            self.layers[last].register_forward_hook(leave),
        ]
        try:
            with self._skipping(span):
                normed_BLD = self._decode(part, inputs_embeds=states_BLD)
        finally:
            for handle in handles:
                handle.remove()
        return found[-1], normed_BLD

    @torch.no_grad()
    def advance(self, span: range, states_RLD: Tensor, normed: bool = False) -> Tensor:
        """States of all rows after the layers of a span [R, L, D], after the final norm if asked for."""
        after_RLD: Tensor | None = None
        with self.present(span):
            for part in self.rows.parts():
                after_BLD = self.through(span, states_RLD[part], part)[normed]
                if after_RLD is None:  # at once in its whole size: pieces and their sum would be two states
                    after_RLD = after_BLD.new_empty(len(states_RLD), *after_BLD.shape[1:])
                after_RLD[part] = after_BLD
        assert after_RLD is not None
        return after_RLD

    @contextmanager
    def present(self, span: range) -> Iterator[None]:
        """The layers of a span on the device, with the embeddings, positions and final norm around them."""
        around = [child for child in self.model.get_decoder().children() if child is not self.layers]
        homes = []
        for part in (*around, *(self.layers[index] for index in span)):
            first = next(iter([*part.parameters(), *part.buffers()]), None)
            if first is not None and first.device != self.device:
                homes.append((part, first.device))
                part.to(self.device)
        try:
            yield
        finally:
            for part, home in homes:
                part.to(home)

    def _decode(self, part: slice | Tensor, **inputs: Tensor) -> Tensor:
        if self.rows.positions_RL is not None:
            inputs["position_ids"] = self.rows.positions_RL[part]
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            output: Tensor = self.model.get_decoder()(**inputs, use_cache=False).last_hidden_state
        return output

    @contextmanager
    def _skipping(self, span: range) -> Iterator[None]:
        """The layers outside a span hand on what they get."""
        skipped = [layer for index, layer in enumerate(self.layers) if index not in span]
        for layer in skipped:
            layer.forward = _handing_on_tuples if self._tuples else _handing_on
        try:
            yield
        finally:
            for layer in skipped:
                del layer.forward


def _handing_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


def _handing_on_tuples(hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
    return (hidden_states,)


@torch.no_grad()
def _returns_tuples(model: PreTrainedModel) -> bool:
    """Whether a model's layers return tuples, by one of them on four made-up tokens."""
    found: list[bool] = []
    first = decoder_layers(model)[0]
    handle = first.register_forward_hook(lambda module, args, output: found.append(isinstance(output, tuple)))
    try:
        model.get_decoder()(input_ids=torch.arange(4, device=model.device)[None], use_cache=False)
    finally:
        handle.remove()
    return found[0]
