"""Finding the MoE block or the dense FFN of a layer by what its modules are, not by what its family is called.

A MoE block is a module with `experts` and a router that has `top_k`; a dense FFN is a module whose last matrix is known
by one of five names.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill.models.layers import decoder_layers

FFN_NAMES = ("mlp", "feed_forward", "ffn")
LAST_MATRIX_NAMES = ("down_proj", "c_proj", "w2", "fc2", "dense_4h_to_h")


def router_of(block: nn.Module) -> nn.Module | None:
    """The router beside a block's experts."""
    return next((child for name in ("gate", "router") if hasattr(child := getattr(block, name, None), "top_k")), None)


def moe_block(layer: nn.Module) -> nn.Module | None:
    """The MoE block of a layer: the first module with `experts` and a router."""
    return next((m for m in layer.modules() if hasattr(m, "experts") and router_of(m) is not None), None)


def num_experts_of(block: nn.Module) -> int:
    """The number of experts of a MoE block: the length of the experts' weights."""
    return int(next(block.experts.parameters()).shape[0])  # type: ignore[union-attr]


def ffn_block(layer: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """A layer's dense FFN and its last matrix."""
    for name in FFN_NAMES:
        ffn = getattr(layer, name, None)
        for last in LAST_MATRIX_NAMES:
            down = getattr(ffn, last, None)
            if isinstance(ffn, nn.Module) and isinstance(down, nn.Linear | Conv1D):
                return ffn, down
    return None


def moe_layers(model: PreTrainedModel) -> list[int]:
    """0-based indices of the layers with a MoE block; empty for a dense model."""
    return [index for index, layer in enumerate(decoder_layers(model)) if moe_block(layer) is not None]


def made_up_tokens(width: int, like: Tensor) -> Tensor:
    """Eight fixed states [8, D] of unit scale, without drawing from the random generator."""
    return torch.arange(8 * width, device=like.device).sin().mul(2**0.5).to(like.dtype).view(8, width)
