"""A student's experts under autocast on an accelerator: their grouped products in bf16, like those of its other layers.

Autocast doesn't know grouped matrix products. Left alone they run on fp32 weights, for which a GPU has no kernel: the
host then reads how many tokens each expert has, and multiplies one expert after the other.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

NAME = "distill_grouped_mm"


def cast_experts(model: PreTrainedModel) -> None:
    """Has the experts of a model, where it has such, follow autocast on devices that are no CPU."""
    if getattr(model.config.get_text_config(decoder=True), "_experts_implementation", None) == "grouped_mm":
        model.set_experts_implementation(NAME)


def _grouped_mm(module: nn.Module, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    device = hidden_TD.device.type
    if device != "cpu" and torch.is_autocast_enabled(device):
        # bf16 under 16-mixed too: there are no grouped products in fp16.
        lean: Any = copy.copy(module)
        lean._parameters = {name: None if p is None else p.bfloat16() for name, p in module._parameters.items()}
        out_TD: Tensor = grouped_mm_experts_forward(lean, hidden_TD.bfloat16(), index_TK, weights_TK)
        return out_TD.to(hidden_TD.dtype)
    plain_TD: Tensor = grouped_mm_experts_forward(module, hidden_TD, index_TK, weights_TK)
    return plain_TD


ALL_EXPERTS_FUNCTIONS.register(NAME, _grouped_mm)
