"""A model without memory: its shapes, names and configuration, for estimates and for targets that come from disk."""

import copy

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


def skeleton(config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model on the meta device.

    Args:
        config: of a causal language model; left alone.
        dtype: of the weights.
        trust_remote_code: run model code that comes with the configuration.
    """
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=dtype, trust_remote_code=trust_remote_code
        )
    return model
