"""A live teacher, frozen for good and kept out of the module registry: no optimizer, wrapper or checkpoint sees it.

The price: its device and dtype are ours to set, once, when the strategy has placed the student.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, device, nn
from transformers import PreTrainedModel


class OnlineTeacher:
    """Runs the frozen teacher's decoder; a plain class, so that assigning it to a module registers nothing.

    Args:
        model: a causal language model; put in eval mode with all gradients off.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.requires_grad_(False).eval()

    def to(self, device: device) -> None:
        """Moves the model to the student's device."""
        nn.Module.to(self.model, device)

    @torch.no_grad()
    def hidden(self, batch: Mapping[str, Any]) -> Tensor:
        """Last hidden state `[B, L, D]` of the batch, after the final norm, before the head."""
        with torch.autocast(batch["input_ids"].device.type, enabled=False):
            return decode(self.model, batch).last_hidden_state


def decode(model: PreTrainedModel, batch: Mapping[str, Any], **kwargs: Any) -> Any:
    """The decoder's output without the head, documents of packed rows hidden from each other by their position ids.

    Rows that hold one document need neither a mask nor positions: attention is causal and padding is on the right.
    """
    if batch["packed"]:
        kwargs["position_ids"] = batch["position_ids"]
    return model.get_decoder()(input_ids=batch["input_ids"], use_cache=False, **kwargs)
