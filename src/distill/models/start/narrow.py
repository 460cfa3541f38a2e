"""A narrower residual stream: the teacher's weights in the principal axes of its states [SliceGPT, arXiv 2401.15024].

States before a norm are divided by their root mean square there, so in these axes the norms can lose their weights to
the matrices that read from them; what reads is turned, what writes is turned back. The head gets weights of its own,
since a norm stands before it and none before the embedding. Heads keep their number and width.

Shapes: D the teacher's width, K the student's, N tokens.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.errors import UserError
from distill.models.blocks import moe_layers, num_experts_of, router_of
from distill.models.layers import decoder_layers
from distill.models.start.ffn import Neurons, ffn_of
from distill.models.start.skeleton import ffn_names, stack_name, teacher_name
from distill.models.start.walk import Walk

KEY = "model.student_hidden_size"
GROUPED = 8  # numbers of 16 bits in 16 bytes
NORMS = ("input_layernorm", "post_attention_layernorm")  # before attention, before the FFN
READ = tuple(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa"))
WRITE = ("self_attn.o_proj",)
WITHIN = ("q_norm", "k_norm", "q_a_layernorm", "kv_a_layernorm", "q_b_proj", "kv_b_proj", "sinks")  # of self_attn


@dataclass(frozen=True, eq=False)
class Axes:
    """The student's axes in the teacher's space.

    Args:
        axes_DK: orthonormal columns.
        scale: sqrt(D / K x kept energy), by which the narrower norm divides too much.
    """

    axes_DK: Tensor
    scale: float

    def read(self, weight_OD: Tensor, norm_D: Tensor) -> Tensor:
        """Weights that read from behind a norm with weights."""
        return (weight_OD * norm_D) @ self.axes_DK * self.scale

    def neurons(self, neurons: Neurons, norm_D: Tensor) -> Neurons:
        """Neurons that read from behind a norm and write into the stream."""
        constant = neurons.constant_D
        return replace(
            neurons,
            inward_PMD=self.read(neurons.inward_PMD, norm_D),
            outward_MD=neurons.outward_MD @ self.axes_DK,
            constant_D=None if constant is None else constant @ self.axes_DK,
        )


def check_narrowable(teacher: PreTrainedModel, hidden: int, experts: bool) -> None:
    """Refuses families whose residual stream cannot be turned, and widths that are none.

    Args:
        teacher: to be narrowed.
        hidden: width of the student.
        experts: whether it keeps the teacher's blocks.

    Raises:
        UserError: says which part stands in the way.
    """
    width, kind = teacher.config.hidden_size, type(teacher).__name__
    if not 1 <= hidden <= width:
        raise UserError(f"{KEY}: {hidden} of the teacher's {width}; give 1 to {width}")
    known = {f"{name}.weight" for name in (*READ, *WRITE)} | {f"{name}.bias" for name in (*READ, *WRITE)}
    known |= {f"self_attn.{name}{end}" for name in WITHIN for end in ("", ".weight", ".bias")}
    known |= {f"{name}.weight" for name in NORMS}
    if experts and moe_layers(teacher) and hidden % GROUPED:
        raise UserError(
            f"{KEY}: {hidden}, but torch multiplies experts of widths in steps of {GROUPED} alone; give such a number"
        )
    stack, ffns = stack_name(teacher), ffn_names(teacher)
    for name, _ in teacher.named_parameters():
        if name.startswith(f"{stack}.") and not name.startswith(ffns):
            inner = name.removeprefix(f"{stack}.").split(".", 1)[1]
            if inner not in known:
                raise UserError(f"{KEY}: {hidden}, but {kind} has {name}, which cannot be turned; leave the key out")
    for norm in _norms(teacher):
        if not _is_rms(norm):
            raise UserError(f"{KEY}: {hidden}, but the norms of {kind} do more than divide and scale; leave it out")


@torch.no_grad()
def principal_axes(walk: Walk, hidden: int) -> Axes:
    """The axes that hold most of the teacher's normalised states before its norms, on the walk's rows.

    Args:
        walk: over the teacher.
        hidden: K.
    """
    width = walk.model.config.hidden_size
    covariance_DD = torch.zeros(width, width, dtype=torch.float64)
    counted: list[Tensor] = []

    def add(norm: nn.Module, args: tuple[Any, ...]) -> None:
        states_ND = args[0].flatten(0, 1)[counted[-1]].float()
        unit_ND = states_ND * torch.rsqrt(states_ND.square().mean(-1, keepdim=True) + 1e-6)
        covariance_DD.add_((unit_ND.T @ unit_ND).cpu())

    *norms, final = _norms(walk.model)  # the final one runs behind every span, so its hook would count them all
    handles = [norm.register_forward_pre_hook(add) for norm in norms]
    states_RLD = walk.embed()
    try:
        for index in range(len(walk.layers)):
            span, after = range(index, index + 1), []
            with walk.present(span):
                for part in walk.rows.parts():
                    counted.append(walk.rows.counted_RL[part].flatten())
                    after.append(walk.through(span, states_RLD[part], part)[0])
            states_RLD = torch.cat(after)
    finally:
        for handle in handles:
            handle.remove()
    counted.append(walk.rows.counted_RL.flatten())
    add(final, (states_RLD,))
    energy_D, axes_DD = torch.linalg.eigh(covariance_DD)
    kept = float(energy_D[-hidden:].sum() / energy_D.sum())
    return Axes(axes_DD[:, -hidden:].flip(1).float(), math.sqrt(width / hidden * kept))


@torch.no_grad()
def turn(student: PreTrainedModel, teacher: PreTrainedModel, kept: list[int], axes: Axes) -> None:
    """Fills a narrower student with the teacher's weights in its axes, all but the FFNs."""
    theirs: dict[str, Tensor] = teacher.state_dict()
    mine, stack, ffns = student.state_dict(), stack_name(student), ffn_names(student)
    first, head, final = _around(teacher)
    my_first, my_head, my_final = _around(student)
    my_first.weight.copy_(first.weight.float() @ axes.axes_DK)
    my_head.weight.copy_(axes.read(head.weight.float(), final.weight.float()))
    my_final.weight.fill_(1.0)
    for name, value in mine.items():
        if not name.startswith(f"{stack}.") or name.startswith(ffns):
            continue
        source = theirs[teacher_name(name, student, kept)].float()
        part = name.removeprefix(f"{stack}.").split(".", 1)[1]
        if part.removesuffix(".weight") in READ:
            before = teacher_name(name.removesuffix(part) + f"{NORMS[0]}.weight", student, kept)
            source = axes.read(source, theirs[before].float())
        elif part.removesuffix(".weight") in WRITE:
            source = axes.axes_DK.T @ source
        elif part.removesuffix(".bias") in WRITE:
            source = source @ axes.axes_DK
        elif part.removesuffix(".weight") in NORMS:
            source = torch.ones_like(value)
        if source.shape != value.shape:
            raise UserError(f"{KEY}: {type(student).__name__} cannot keep the teacher's heads ({name}); leave it out")
        value.copy_(source)
    for layer, index in zip(decoder_layers(student), kept, strict=True):
        _turn_router(layer, decoder_layers(teacher)[index], axes, ffn_norm(teacher, index))


def _turn_router(layer: nn.Module, theirs: nn.Module, axes: Axes, norm_D: Tensor) -> None:
    """Gives a MoE block that keeps its experts the teacher's routing."""
    mine, router = router_of(ffn_of(layer)), router_of(ffn_of(theirs))
    if mine is None or router is None or num_experts_of(ffn_of(layer)) != num_experts_of(ffn_of(theirs)):
        return
    for name, value in mine.state_dict().items():
        source = router.state_dict()[name].float()
        value.copy_(axes.read(source, norm_D) if source.ndim == 2 else source)


def ffn_norm(teacher: PreTrainedModel, layer: int) -> Tensor:
    """The weights (D) of the norm before a layer's FFN."""
    weight: Tensor = getattr(decoder_layers(teacher)[layer], NORMS[1]).weight
    return weight.detach().float()


def _norms(model: PreTrainedModel) -> list[nn.Module]:
    """Every norm that reads the residual stream, the final one last."""
    layers = decoder_layers(model)
    found = [getattr(layer, name, None) for layer in layers for name in NORMS]
    norms = [norm for norm in (*found, getattr(model.get_decoder(), "norm", None)) if norm is not None]
    if len(norms) != len(NORMS) * len(layers) + 1:
        raise UserError(
            f"{KEY}: {type(model).__name__} lacks a norm before attention, before an FFN or at the end by a name that "
            "is known here; leave the key out"
        )
    return norms


def _around(model: PreTrainedModel) -> tuple[Any, Any, Any]:
    """Embedding, head and final norm."""
    return model.get_input_embeddings(), model.get_output_embeddings(), _norms(model)[-1]


def _is_rms(norm: Any) -> bool:
    """Whether a norm is weight x state / root mean square."""
    weight: Tensor = norm.weight.detach().float()
    states_ND = torch.arange(4 * len(weight), device=weight.device).sin().view(4, -1)
    expected_ND = weight * states_ND * torch.rsqrt(states_ND.square().mean(-1, keepdim=True))
    found_ND = norm(states_ND.to(norm.weight.dtype)).float()
    return bool((found_ND - expected_ND).abs().max() <= 2e-2 * expected_ND.abs().max())
