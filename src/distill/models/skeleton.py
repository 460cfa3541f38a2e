"""A model without memory: its shapes, names and configuration, for estimates and for targets that come from disk."""

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from distill.models.digests import tensor_digest

KNOWN = "known_embeddings"  # attribute of a skeleton: the digest of the embeddings that are not there


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


def same_embeddings(teacher: PreTrainedModel, student: PreTrainedModel) -> bool:
    """Whether a student has the teacher's embeddings, up to the rounding of its dtype.

    Args:
        teacher: on any device; where it is without memory its `KNOWN` digest is compared, and none is another's.
        student: on any device; one without memory has others.
    """
    both: list[Any] = [model.get_input_embeddings() for model in (student, teacher)]
    ours, theirs = (embedding.weight for embedding in both)
    if ours.shape != theirs.shape or ours.is_meta:
        return False
    if theirs.is_meta:
        return tensor_digest(ours.to(theirs.dtype)) == getattr(teacher, KNOWN, None)
    return torch.equal(ours.to(theirs), theirs)
