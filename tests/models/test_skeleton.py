"""A model without memory, and whether a student has its embeddings."""

import pytest
import torch

from distill.models.cut import cut_layers
from distill.models.digests import tensor_digest
from distill.models.skeleton import KNOWN, same_embeddings, skeleton
from helpers import tiny


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_are_known_again_by_their_digest(dtype):
    teacher = tiny.tiny_llama().to(dtype)
    absent = skeleton(teacher.config, dtype)
    setattr(absent, KNOWN, tensor_digest(teacher.get_input_embeddings().weight))
    cut, other = cut_layers(teacher, 1).float(), cut_layers(teacher, 1).float()
    other.get_input_embeddings().weight.data[5, 3] += 0.25
    narrow = tiny.tiny_llama(hidden_size=24)
    for student, same in ((cut, True), (other, False), (narrow, False), (skeleton(cut.config, dtype), False)):
        assert same_embeddings(teacher, student) == same_embeddings(absent, student) == same
    assert not same_embeddings(skeleton(teacher.config, dtype), cut)  # nothing is known of it
