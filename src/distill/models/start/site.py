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
    """What a teacher layer's block did while the teacher went through it.

    Args of `gates`: T positions in all, padding included.
    """

    def __init__(self) -> None:
        self.routing: list[tuple[Tensor, Tensor]] = []  # indices and weights [T, K] of a part of the rows
        self.outputs: list[Tensor] = []

    def gates(self, positions: int, block: Block) -> Tensor | None:
        """Gates [T, E], zero where a token was not routed; None of a dense FFN."""
        if not self.routing:
            return None
        index_TK, weights_TK = (torch.cat(parts) for parts in zip(*self.routing, strict=True))
        experts = int(block.expert_M.max()) + 1
        return weights_TK.new_zeros(positions, experts, dtype=torch.float32).scatter_(1, index_TK, weights_TK.float())


@contextmanager
def watching(layer: nn.Module) -> Iterator[Seen]:
    """Records the routing and the output of a layer's block."""
    seen = Seen()
    module = ffn_of(layer)
    experts = getattr(module, "experts", None)

    def routed(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = [*args, *kwargs.values()]
        seen.routing.append((given[1], given[2]))

    def wrote(part: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.outputs.append(output[0] if isinstance(output, tuple) else output)

    handles = [module.register_forward_hook(wrote)] if experts is None else []
    if experts is not None:
        handles.append(experts.register_forward_hook(routed, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, eq=False)
class Site:
    """An FFN's place in its layer.

    Args:
        inputs_ND: what it reads at the positions that count.
        without_RLD: the layer's output if it wrote nothing.
        factor: by which what it writes is added to that; None where it goes through a norm first.
        seen: its routing there, where it is a MoE block.
    """

    inputs_ND: Tensor
    without_RLD: Tensor
    factor: float | None
    seen: Seen


@torch.no_grad()
def site_of(walk: Walk, layer: int, states_RLD: Tensor) -> Site:
    """Runs a layer without its FFN, and one part of the rows with made-up outputs in its place."""
    inputs: list[Tensor] = []
    counted = [walk.rows.counted_RL[part] for part in walk.rows.parts()]
    written: list[Tensor] = [torch.zeros(())]

    def reads(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states_BLD = args[0] if args else kwargs["hidden_states"]
        if len(inputs) < len(counted):
            inputs.append(states_BLD[counted[len(inputs)]].float())

    def writes(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        made_up = written[0].to(first).expand_as(first)
        return (made_up, *output[1:]) if isinstance(output, tuple) else made_up

    module, span = ffn_of(walk.layers[layer]), range(layer, layer + 1)
    handles = [module.register_forward_pre_hook(reads, with_kwargs=True), module.register_forward_hook(writes)]
    if not hasattr(module, "experts"):  # its own output is not needed; a block's may come with more
        module.forward = _nothing
    try:
        with watching(walk.layers[layer]) as seen:
            without_RLD = walk.advance(span, states_RLD).float()
        part = next(walk.rows.parts())
        shape = without_RLD[part].shape
        size = torch.arange(1, shape[1] + 1, device=states_RLD.device).remainder(3).add(1)[:, None]
        written[0] = torch.arange(shape[1] * shape[2], device=states_RLD.device).sin().view(shape[1:]) * size
        with walk.present(span):
            change_BLD = walk.through(span, states_RLD[part], part)[0].float() - without_RLD[part]
    finally:
        module.__dict__.pop("forward", None)
        for handle in handles:
            handle.remove()
    made_up_BLD = written[0].expand_as(change_BLD)
    factor = float((change_BLD * made_up_BLD).sum() / made_up_BLD.square().sum())
    linear = (change_BLD - factor * made_up_BLD).abs().max() <= 2e-2 * change_BLD.abs().max()
    return Site(torch.cat(inputs), without_RLD, factor if bool(linear) and factor else None, seen)


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
