"""What an FFN reads in its layer on the student's states, how what it writes enters the stream, and what the teacher's
block did on the same tokens.

Shapes: R rows, L positions, D width, T positions of all rows, E experts, K experts per token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distill.models.start.ffn import Block, ffn_of
from distill.models.start.walk import Walk

FIRST_NORMS = ("input_layernorm", "ln_1", "attention_norm", "self_attn_layer_norm")


class Seen:
    """What a layer's block did while a model went through it.

    Args:
        factor: by which what it writes is added to the stream; None where it goes through a norm first.
    """

    def __init__(self, factor: float | None) -> None:
        self.factor = factor
        self.routing: list[tuple[Tensor, Tensor]] = []  # indices and weights [T, K] of a part of the rows
        self.outputs: list[Tensor] = []  # of each part, where there is no factor

    def gates(self, positions: int, block: Block) -> Tensor | None:
        """Gates [T, E] of T positions, padding included, zero where a token was not routed; None of a dense FFN."""
        if not self.routing:
            return None
        index_TK, weights_TK = (torch.cat(parts) for parts in zip(*self.routing, strict=True))
        experts = int(block.expert_M.max()) + 1
        return weights_TK.new_zeros(positions, experts, dtype=torch.float32).scatter_(1, index_TK, weights_TK.float())


@contextmanager
def watching(layer: nn.Module, factor: float | None) -> Iterator[Seen]:
    """Records the routing of a layer's block, and what it writes where that goes through a norm."""
    seen = Seen(factor)
    module = ffn_of(layer)
    experts = getattr(module, "experts", None)

    def routed(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = [*args, *kwargs.values()]
        seen.routing.append((given[1], given[2]))

    def wrote(part: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.outputs.append(output[0] if isinstance(output, tuple) else output)

    handles = [module.register_forward_hook(wrote)] if factor is None else []
    if experts is not None:
        handles.append(experts.register_forward_hook(routed, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def writing_factor(walk: Walk, layer: int, states_RLD: Tensor) -> float | None:
    """By which what a layer's FFN writes is added to the stream; None where it goes through a norm first.

    By made-up outputs in its place, on one part of the rows.
    """
    module, span, part = ffn_of(walk.layers[layer]), range(layer, layer + 1), next(walk.rows.parts())
    length, width = states_RLD.shape[1:]
    size_L1 = torch.arange(1, length + 1, device=states_RLD.device).remainder(3).add(1)[:, None]
    made_up_LD = torch.arange(length * width, device=states_RLD.device).sin().view(length, width) * size_L1
    found = []
    with walk.present(span):
        for written in (torch.zeros_like(made_up_LD), made_up_LD):
            with _writing(module, written):
                found.append(walk.through(span, states_RLD[part], part)[0].float())
    change_BLD = found[1] - found[0]
    made_up_BLD = made_up_LD.expand_as(change_BLD)
    factor = float((change_BLD * made_up_BLD).sum() / made_up_BLD.square().sum())
    linear = (change_BLD - factor * made_up_BLD).abs().max() <= 2e-2 * change_BLD.abs().max()
    return factor if bool(linear) and factor else None


@dataclass(frozen=True, eq=False)
class Site:
    """An FFN's place in its layer.

    Args:
        inputs_ND: what it reads at the positions that count.
        without_RLD: the layer's output if it wrote nothing.
        seen: its routing there, where it is a MoE block.
    """

    inputs_ND: Tensor
    without_RLD: Tensor
    seen: Seen


@torch.no_grad()
def site_of(walk: Walk, layer: int, states_RLD: Tensor) -> Site:
    """Runs a layer without its FFN."""
    inputs: list[Tensor] = []
    counted = [walk.rows.counted_RL[part] for part in walk.rows.parts()]

    def reads(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append((args[0] if args else kwargs["hidden_states"])[counted[len(inputs)]].float())

    module, span = ffn_of(walk.layers[layer]), range(layer, layer + 1)
    handle = module.register_forward_pre_hook(reads, with_kwargs=True)
    try:
        with watching(walk.layers[layer], 1.0) as seen, _writing(module, states_RLD.new_zeros(())):
            without_RLD = walk.advance(span, states_RLD).float()
    finally:
        handle.remove()
    return Site(torch.cat(inputs), without_RLD, seen)


@contextmanager
def _writing(module: nn.Module, written: Tensor) -> Iterator[None]:
    """An FFN writes what it is told to; experts are run all the same, since their routing is asked for."""

    def writes(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        instead = written.to(first).expand_as(first).clone()  # some families add to it in place
        return (instead, *output[1:]) if isinstance(output, tuple) else instead

    handle = module.register_forward_hook(writes)
    if not hasattr(module, "experts"):
        module.forward = _nothing
    try:
        yield
    finally:
        module.__dict__.pop("forward", None)
        handle.remove()


def _nothing(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


@torch.no_grad()
def reading_gain(layer: nn.Module, states_RLD: Tensor) -> Tensor | None:
    """How much a layer's first norm makes of each channel (D); None where it has none by a known name."""
    norm: Any = next((getattr(layer, name) for name in FIRST_NORMS if hasattr(layer, name)), None)
    if norm is None:
        return None
    width, weight = states_RLD.shape[-1], next(norm.parameters())
    made_up_ND = torch.randn(256, width, generator=torch.Generator().manual_seed(0)).to(weight)
    gain_D: Tensor = norm(made_up_ND).float().std(0)
    return gain_D.to(states_RLD.device)
