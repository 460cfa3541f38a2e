"""The neurons of FFNs and MoE blocks as plain tensors, read from a teacher and written into a student.

A neuron reads a state, once (plain FFN) or twice (gate and up), and adds its activation times a vector to the output.
An expert is a set of such neurons under a gate, a shared expert one that is always on; so a block of all of them and a
dense FFN are the same kind of thing. What was read by names is tried on made-up tokens against the module itself.

Shapes: N tokens, D width, M neurons, P inputs of a neuron (2: gate and up, 1: a plain FFN), E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from distill.errors import UserError
from distill.models.blocks import LAST_MATRIX_NAMES, ffn_block, made_up_tokens, moe_block

GATED = (("gate_proj", "up_proj"), ("w1", "w3"))
FUSED = "gate_up_proj"  # both in one matrix, gate first
PLAIN = ("c_fc", "fc1", "dense_h_to_4h", "w1", "up_proj")
ACTIVATIONS = ("act_fn", "act", "activation_fn", "activation", "activation_function")
SHARED = ("shared_experts", "shared_mlp")  # always on, added to the routed ones as they are


@dataclass(frozen=True, eq=False)
class Neurons:
    """A set of neurons; the output is activations_NM @ outward_MD + constant_D.

    Args:
        inward_PMD: what they read.
        outward_MD: what they write.
        activate: (P, N, M) -> (N, M).
        bias_PM: added to what they read; None for none.
        constant_D: bias of the output; None for none.
    """

    inward_PMD: Tensor
    outward_MD: Tensor
    activate: Callable[[Tensor], Tensor]
    bias_PM: Tensor | None = None
    constant_D: Tensor | None = None

    def __len__(self) -> int:
        return self.inward_PMD.shape[1]

    def __getitem__(self, index_F: Tensor | slice) -> "Neurons":
        """Some of them; the constant stays."""
        bias = None if self.bias_PM is None else self.bias_PM[:, index_F]
        return replace(self, inward_PMD=self.inward_PMD[:, index_F], outward_MD=self.outward_MD[index_F], bias_PM=bias)

    def activations(self, states_ND: Tensor) -> Tensor:
        """(N, D) -> (N, M)."""
        read_PNM = torch.einsum("nd,pmd->pnm", states_ND, self.inward_PMD)
        return self.activate(read_PNM if self.bias_PM is None else read_PNM + self.bias_PM[:, None])

    def output(self, states_ND: Tensor) -> Tensor:
        """(N, D) -> (N, D), all of them at gate 1."""
        output_ND = self.activations(states_ND) @ self.outward_MD
        return output_ND if self.constant_D is None else output_ND + self.constant_D

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> "Neurons":
        """Copies of the tensors elsewhere."""

        def moved(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device, dtype)

        return Neurons(
            self.inward_PMD.to(device, dtype),
            self.outward_MD.to(device, dtype),
            self.activate,
            moved(self.bias_PM),
            moved(self.constant_D),
        )


@dataclass(frozen=True, eq=False)
class Block:
    """All neurons of a layer's FFN or MoE block.

    Args:
        module: the block itself.
        experts: the module whose call carries the routing; None for a dense FFN.
        neurons: of all routed experts one after the other, then the shared ones.
        expert_M: the expert of each neuron, -1 for those that are always on.
        constants_ED: bias of each expert's output; None for none.
    """

    module: nn.Module
    experts: nn.Module | None
    neurons: Neurons
    expert_M: Tensor
    constants_ED: Tensor | None = None

    def of(self, expert: int) -> Neurons:
        """The neurons of an expert, with the bias of its output; -1: those that are always on."""
        index_I = (self.expert_M == expert).nonzero()[:, 0]
        neurons = self.neurons[slice(int(index_I[0]), int(index_I[-1]) + 1)]
        return neurons if self.constants_ED is None else replace(neurons, constant_D=self.constants_ED[expert])


def ffn_of(layer: nn.Module, where: str = "model.student_intermediate_size") -> nn.Module:
    """The FFN or MoE block of a layer.

    Raises:
        UserError: it has none that is known.
    """
    if (block := moe_block(layer)) is not None:
        return block
    found = ffn_block(layer)
    if found is None:
        raise UserError(f"{where}: {type(layer).__name__} has no FFN that is known here; leave the key out")
    return found[0]


@torch.no_grad()
def read_block(layer: nn.Module, where: str = "model.student_intermediate_size") -> Block:
    """The neurons of a layer, as views of its weights where that is possible.

    Args:
        layer: decoder layer.
        where: YAML key that error messages name.

    Raises:
        UserError: an FFN or experts of a kind that is not known here.
    """
    module = ffn_of(layer, where)
    experts: Any = getattr(module, "experts", None)
    if experts is None:
        neurons = _dense(module, where)
        always = torch.full((len(neurons),), -1, device=neurons.inward_PMD.device)
        return Block(module, None, neurons, always)
    routed, constants_ED = _fused(experts, where)
    count = experts.down_proj.shape[0]
    expert_M = torch.arange(count, device=routed.inward_PMD.device).repeat_interleave(len(routed) // count)
    parts = [routed]
    for name, child in module.named_children():
        if name in SHARED:
            parts.append(_dense(child, where))
            expert_M = torch.cat([expert_M, expert_M.new_full((len(parts[-1]),), -1)])
        elif child is not experts and not hasattr(child, "top_k") and any(True for _ in child.parameters()):
            raise UserError(
                f"{where}: {type(module).__name__} has a part {name!r} that is unknown here; leave the key out"
            )
    return Block(module, experts, _joined(parts, where), expert_M, constants_ED)


def is_known(layer: nn.Module) -> bool:
    """Whether the FFN of a layer is of a kind whose neurons can be read."""
    try:
        read_block(layer)
    except UserError:
        return False
    return True


@torch.no_grad()
def write_ffn(module: nn.Module, neurons: Neurons) -> None:
    """Puts neurons into a dense FFN, or a MoE block of one expert, of just as many.

    Args:
        module: whose weights are overwritten.
        neurons: what it is to compute.
    """
    experts = getattr(module, "experts", None)
    if experts is None:
        _write_dense(module, neurons)
    else:
        _write_fused(experts, 0, neurons)


@torch.no_grad()
def write_expert(block: Block, expert: int, neurons: Neurons) -> None:
    """Puts the neurons of an expert, or of the shared ones at -1, into a block and into its module."""
    index_I = (block.expert_M == expert).nonzero()[:, 0]
    block.neurons.outward_MD[index_I] = neurons.outward_MD
    if block.constants_ED is not None and expert >= 0 and neurons.constant_D is not None:
        block.constants_ED[expert] = neurons.constant_D
    write_experts(block.module, {expert: neurons})


@torch.no_grad()
def write_experts(module: nn.Module, sets: dict[int, Neurons]) -> None:
    """Puts neurons into the experts of a MoE block; -1: into its shared ones, one after the other."""
    for expert, neurons in sets.items():
        if expert >= 0:
            _write_fused(module.experts, expert, neurons)
            continue
        first = 0
        for part in (child for name, child in module.named_children() if name in SHARED):
            count = len(_dense(part, ""))
            _write_dense(part, neurons[slice(first, first + count)])
            first += count


def has_constant(module: nn.Module) -> bool:
    """Whether a dense FFN, or a block of experts, has a bias on its output."""
    experts: Any = getattr(module, "experts", None)
    if experts is not None:
        return bool(getattr(experts, "has_bias", False))
    found = [name for name in LAST_MATRIX_NAMES if hasattr(module, name)]
    return bool(found) and getattr(getattr(module, found[0]), "bias", None) is not None


def _write_fused(experts: Any, expert: int, neurons: Neurons) -> None:
    transposed, concatenated = bool(getattr(experts, "is_transposed", False)), _concatenated(experts)
    both_MD = neurons.inward_PMD.flatten(0, 1) if concatenated else _interleaved(neurons.inward_PMD)
    experts.gate_up_proj[expert].copy_(both_MD.T if transposed else both_MD)
    experts.down_proj[expert].copy_(neurons.outward_MD if transposed else neurons.outward_MD.T)
    if getattr(experts, "has_bias", False):
        assert neurons.bias_PM is not None
        bias_M = neurons.bias_PM.flatten() if concatenated else _interleaved(neurons.bias_PM)
        experts.gate_up_proj_bias[expert].copy_(bias_M)
        if neurons.constant_D is not None:
            experts.down_proj_bias[expert].copy_(neurons.constant_D)


def _concatenated(experts: nn.Module) -> bool:
    return bool(getattr(experts, "is_concatenated", True))


def _interleaved(pair: Tensor) -> Tensor:
    """(2, M, ...) -> (2 M, ...), gate and up of a neuron next to each other."""
    return pair.transpose(0, 1).flatten(0, 1)


def _fused(experts: Any, where: str) -> tuple[Neurons, Tensor | None]:
    """Neurons of experts whose weights are fused into tensors, and the biases (E, D) of their outputs."""
    name = type(experts).__name__
    if not all(isinstance(getattr(experts, key, None), Tensor) for key in ("gate_up_proj", "down_proj")):
        raise UserError(f"{where}: the experts {name} are of a kind that is unknown here; leave the key out")
    transposed, concatenated = bool(getattr(experts, "is_transposed", False)), _concatenated(experts)
    both_EJD = experts.gate_up_proj.detach()
    both_EJD = both_EJD.transpose(1, 2) if transposed else both_EJD
    down_EID = experts.down_proj.detach()
    down_EID = down_EID if transposed else down_EID.transpose(1, 2)

    def parted(x: Tensor) -> Tensor:
        halves = x.chunk(2, dim=1) if concatenated else (x[:, 0::2], x[:, 1::2])
        return torch.stack([half.flatten(0, 1) for half in halves])

    def activate(read_PNM: Tensor) -> Tensor:
        fused = read_PNM.movedim(0, -1).flatten(-2) if not concatenated else torch.cat(tuple(read_PNM), -1)
        activated: Tensor = experts._apply_gate(fused)
        return activated

    bias_PM = constants_ED = None
    if getattr(experts, "has_bias", False):
        bias_PM = parted(experts.gate_up_proj_bias.detach())
        constants_ED = experts.down_proj_bias.detach()
    return Neurons(parted(both_EJD), down_EID.flatten(0, 1), activate, bias_PM), constants_ED


def _matrices(module: nn.Module) -> tuple[list[nn.Module], nn.Module] | None:
    """What a dense FFN reads with, gate first, and what it writes with."""
    last = next((getattr(module, n) for n in LAST_MATRIX_NAMES if hasattr(module, n)), None)
    if last is None:
        return None
    for pair in GATED:
        if all(hasattr(module, name) for name in pair):
            return [getattr(module, name) for name in pair], last
    if hasattr(module, FUSED):
        return [getattr(module, FUSED)], last
    first = next((getattr(module, name) for name in PLAIN if hasattr(module, name)), None)
    return None if first is None else ([first], last)


def _weight(linear: Any) -> Tensor:
    """(out, in), a view."""
    weight: Tensor = linear.weight.detach()
    return weight.T if isinstance(linear, Conv1D) else weight


def _dense(module: nn.Module, where: str) -> Neurons:
    found, kind = _matrices(module), type(module).__name__
    act: Any = next((getattr(module, name) for name in ACTIVATIONS if hasattr(module, name)), None)
    if found is None or act is None:
        raise UserError(f"{where}: the FFN {kind} is of a kind that is unknown here; leave the key out")
    firsts, last = found
    parts = [part for first in firsts for part in _weight(first).chunk(2 if hasattr(module, FUSED) else 1)]
    biases = [getattr(first, "bias", None) for first in firsts]
    bias_PM = None
    if all(bias is not None for bias in biases):
        bias_PM = torch.cat([b.detach() for b in biases]).view(len(parts), -1)  # type: ignore[union-attr]

    def activate(read_PNM: Tensor) -> Tensor:
        activated: Tensor = act(read_PNM[0])
        return activated * read_PNM[1] if len(read_PNM) == 2 else activated

    constant = getattr(last, "bias", None)
    neurons = Neurons(
        torch.stack(list(parts)), _weight(last).T, activate, bias_PM, None if constant is None else constant.detach()
    )
    _check(module, neurons, where)
    return neurons


def _check(module: nn.Module, neurons: Neurons, where: str) -> None:
    """The neurons must compute what the module does."""
    states_ND = made_up_tokens(neurons.inward_PMD.shape[-1], neurons.inward_PMD)
    theirs = module(states_ND[None])
    ours_ND = neurons.output(states_ND)
    tolerance = 1e-4 if ours_ND.dtype in (torch.float32, torch.float64) else 5e-2
    if not (isinstance(theirs, Tensor) and (theirs[0] - ours_ND).abs().max() <= tolerance * ours_ND.abs().max()):
        raise UserError(
            f"{where}: the FFN {type(module).__name__} is more than a sum over its neurons; leave the key out"
        )


def _joined(parts: list[Neurons], where: str) -> Neurons:
    """The neurons of routed and shared experts together, which must activate alike."""
    first = parts[0]
    if len(parts) == 1:
        return first
    tried = torch.arange(-6.0, 6.0, device=first.inward_PMD.device).to(first.inward_PMD.dtype).expand(2, 1, -1)
    if any(not torch.allclose(part.activate(tried), first.activate(tried), atol=1e-3) for part in parts[1:]):
        raise UserError(f"{where}: routed and shared experts have different activations; leave the key out")
    if any(part.bias_PM is not None or part.constant_D is not None for part in parts):
        raise UserError(f"{where}: shared experts with biases are unknown here; leave the key out")
    return Neurons(
        torch.cat([part.inward_PMD for part in parts], 1),
        torch.cat([part.outward_MD for part in parts]),
        first.activate,
    )


def _write_dense(module: nn.Module, neurons: Neurons) -> None:
    found = _matrices(module)
    assert found is not None, type(module).__name__
    firsts, last = found
    for first, rows in zip(firsts, neurons.inward_PMD.flatten(0, 1).chunk(len(firsts)), strict=True):
        _weight(first).copy_(rows)
    _weight(last).copy_(neurons.outward_MD.T)
    biases = [bias for first in firsts if isinstance(bias := getattr(first, "bias", None), Tensor)]
    if biases and neurons.bias_PM is not None:
        for bias, values in zip(biases, neurons.bias_PM.flatten().chunk(len(biases)), strict=True):
            bias.copy_(values)
    constant = getattr(last, "bias", None)
    if isinstance(constant, Tensor) and neurons.constant_D is not None:
        constant.copy_(neurons.constant_D)
