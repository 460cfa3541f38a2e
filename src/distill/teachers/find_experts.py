"""Finding a teacher's experts by what its modules are, not by what its family is called.

Blocks are found by their structure (`models.blocks`). Names can lie, so each guess is tried on a few made-up tokens: a
router whose weights are neither a softmax nor a sigmoid of its logits, or an FFN that does more after its last matrix,
is refused in one line. A family with another kind of gate needs code here first.
"""

import copy
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill.errors import UserError
from distill.models.blocks import ffn_block, made_up_tokens, moe_block, moe_layers, num_experts_of, router_of
from distill.models.layers import decoder_layers
from distill.models.precision import full_precision
from distill.teachers.experts import DenseView, MoeView, View, call_router, gate_of_logits

DENSE_EXPERTS, DENSE_K = 8, 2  # without a word from the user


@torch.no_grad()
def moe_view(layer: nn.Module, index: int, width: int) -> MoeView | None:
    """The view of a layer's MoE block, None where it has none.

    Raises:
        UserError: the router's weights are neither a softmax nor a sigmoid of its logits.
    """
    block = moe_block(layer)
    if block is None:
        return None
    router = router_of(block)
    assert router is not None
    assert isinstance(block.experts, nn.Module)
    native_k = int(router.top_k)  # type: ignore[arg-type]
    num_experts = num_experts_of(block)
    trouble = f"model.teacher: routing losses cannot read the router {type(router).__name__} of layer {index}"
    remedy = "its gate would need an adapter in distill/teachers/find_experts.py; leave the routing losses out"
    try:
        tried = with_made_up_weights(router)
        states_ND = made_up_tokens(width, next(tried.parameters()))
        logits_NE, weights_NK, index_NK = call_router(tried, states_ND, min(2, num_experts))
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{trouble} ({error}); {remedy}") from error
    share_NK = full_precision(weights_NK) / full_precision(weights_NK).sum(-1, keepdim=True)
    error_of = {}
    for sigmoid in (False, True):
        chosen_NK = gate_of_logits(logits_NE, sigmoid).gather(-1, index_NK)
        error_of[sigmoid] = float((chosen_NK / chosen_NK.sum(-1, keepdim=True) - share_NK).abs().max())
    sigmoid = error_of[True] < error_of[False]
    if not error_of[sigmoid] < (1e-3 if weights_NK.dtype in (torch.float32, torch.float64) else 2e-2):
        raise UserError(f"{trouble}: its weights are neither a softmax nor a sigmoid of its logits; {remedy}")
    return MoeView(index, router, block.experts, num_experts, native_k, width, sigmoid)


def with_made_up_weights(router: nn.Module) -> nn.Module:
    """The router itself, or of one without memory a copy on the CPU: what its gate is doesn't depend on its weights."""
    weight = next(router.parameters())
    if not weight.is_meta:
        return router
    made = copy.deepcopy(router).to_empty(device="cpu")
    for tensor in made.state_dict().values():
        fixed = torch.arange(tensor.numel()).sin().view(tensor.shape) if tensor.ndim > 1 else torch.zeros(tensor.shape)
        tensor.copy_(fixed * (2 / weight.shape[-1]) ** 0.5)  # logits of unit scale
    return made


@torch.no_grad()
def dense_view(layer: nn.Module, index: int, width: int, num_experts: int, native_k: int) -> DenseView:
    """The view of a layer's dense FFN as `num_experts` slices.

    Raises:
        UserError: no FFN is found, it does more after its last matrix, or its neurons do not divide.
    """
    found = ffn_block(layer)
    if found is None:
        raise UserError(
            f"model.teacher: layer {index} ({type(layer).__name__}) has no experts and no FFN that can be sliced; "
            "leave the routing losses out"
        )
    ffn, down = found
    weight = down.weight
    assert isinstance(weight, Tensor)
    if weight.ndim != 2 or not weight.is_floating_point():
        raise UserError(f"model.teacher: layer {index} has quantized FFN weights; load the teacher in fp32 or bf16")
    num_neurons = weight.shape[0] if isinstance(down, Conv1D) else weight.shape[1]
    if num_neurons % num_experts:
        near = [e for e in range(2, 65) if num_neurons % e == 0]
        raise UserError(
            f"model.routing.num_experts: {num_experts} does not divide the {num_neurons} FFN neurons; try one of {near}"
        )
    if weight.is_meta:  # there is nothing to try it on, nor will its slices be asked for
        return DenseView(index, down, num_experts, native_k, width)
    kept: list[Tensor] = []
    handle = down.register_forward_hook(lambda module, args, output: kept.append(output))
    try:
        output = ffn(made_up_tokens(width, weight)[None])
    finally:
        handle.remove()
    if not (isinstance(output, Tensor) and len(kept) == 1 and torch.equal(output, kept[0])):
        raise UserError(
            f"model.teacher: the FFN {type(ffn).__name__} of layer {index} is more than a sum over its neurons; "
            "leave the routing losses out"
        )
    return DenseView(index, down, num_experts, native_k, width)


def find_views(
    teacher: PreTrainedModel, layers: list[int], num_experts: int | None, native_top_k: int | None
) -> list[View]:
    """One view per teacher layer.

    Args:
        teacher: in eval mode.
        layers: 0-based indices.
        num_experts: slices of a dense FFN, 8 by default; of a MoE teacher None or the number it has.
        native_top_k: slices per token of a dense FFN, 2 by default; of a MoE teacher None or the number it has.

    Raises:
        UserError: a layer has no experts, or not as many as asked for.
    """
    width, blocks = teacher.config.get_text_config().hidden_size, decoder_layers(teacher)
    sparse = moe_layers(teacher)
    views: list[View] = []
    for index in layers:
        view: View | None = moe_view(blocks[index], index, width)
        if view is None and sparse:
            raise UserError(
                f"model.routing.teacher_layers: {index} is a dense layer of a MoE teacher; choose among {sparse}"
            )
        views.append(
            view or dense_view(blocks[index], index, width, num_experts or DENSE_EXPERTS, native_top_k or DENSE_K)
        )
    real = views[0]
    if any((view.num_experts, view.native_k) != (real.num_experts, real.native_k) for view in views):
        raise UserError(
            f"model.routing.teacher_layers: {layers} differ in their number of experts; choose layers that agree"
        )
    for key, asked, has in (
        ("num_experts", num_experts, real.num_experts),
        ("native_top_k", native_top_k, real.native_k),
    ):
        if asked is not None and asked != has:
            raise UserError(f"model.routing.{key}: {asked}, but the teacher's MoE blocks have {has}; leave the key out")
    if real.native_k > real.num_experts:
        raise UserError(
            f"model.routing.native_top_k: {real.native_k} is more than the {real.num_experts} experts; lower it"
        )
    return views


def set_experts_per_token(teacher: PreTrainedModel, top_k: int | Literal["native", "all"]) -> None:
    """From now on the teacher's own forward passes use `top_k` experts per token in every MoE block.

    The routers' `top_k` is all that the families' code reads, so the logits are those of the same weights configured
    with that number. Views keep the native k if they were built before.

    Args:
        teacher: changed in place.
        top_k: "native" changes nothing, "all" is the number of experts.

    Raises:
        UserError: the teacher has no MoE block, or fewer experts than `top_k`.
    """
    if top_k == "native":
        return
    blocks = [block for layer in decoder_layers(teacher) if (block := moe_block(layer)) is not None]
    if not blocks:
        raise UserError(
            f"model.teacher_top_k: {top_k}, but {type(teacher).__name__} has no experts that it could choose among; "
            "leave the key out"
        )
    routers: list[Any] = [router_of(block) for block in blocks]
    most = min(num_experts_of(block) for block in blocks)
    k = most if top_k == "all" else top_k
    if not 1 <= k <= most:
        raise UserError(f"model.teacher_top_k: {k} is not between 1 and the teacher's {most} experts; change it")
    if k < (native_k := max(router.top_k for router in routers)):
        rank_zero_warn(
            f"model.teacher_top_k: {k} is below the teacher's own {native_k} experts per token: the targets are poorer "
            "than what the teacher computes"
        )
    for router in routers:
        router.top_k = k
