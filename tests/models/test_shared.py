"""Tensors that are one piece of memory, and adapters that must not be put on one of them."""

import pytest
import torch
from torch import nn

from distill.errors import UserError
from distill.models.lora import LoRA
from distill.models.shared import shared_parameters
from helpers.tiny import tiny_gemma, tiny_gpt2, tiny_llama, tiny_qwen3_moe


@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen3_moe, tiny_gemma])
def test_tied_embeddings_are_found_and_untied_ones_are_not(build):
    assert shared_parameters(build(tie_word_embeddings=False)) == {}
    tied = {"model.embed_tokens.weight": ["lm_head.weight"], "lm_head.weight": ["model.embed_tokens.weight"]}
    assert shared_parameters(build(tie_word_embeddings=True)) == tied


def test_views_that_overlap_share_and_neighbours_do_not():
    whole = torch.zeros(4, 3)
    model = nn.Module()
    for name, view in (("top", whole[:2]), ("middle", whole[1:3]), ("bottom", whole[3:]), ("turned", whole[:1].T)):
        model.register_parameter(name, nn.Parameter(view))
    assert shared_parameters(model) == {"top": ["turned", "middle"], "turned": ["top"], "middle": ["top"]}


def test_one_layer_at_two_places_shares_all_of_it():
    """As in models that run one block several times."""
    model = nn.ModuleList([nn.Linear(2, 2)])
    model.append(model[0])
    assert shared_parameters(model) == {
        "0.weight": ["1.weight"], "1.weight": ["0.weight"], "0.bias": ["1.bias"], "1.bias": ["0.bias"]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("student", "target", "twin"),
    [
        (lambda: tiny_gpt2(), ["c_attn", "wte"], "lm_head.weight"),
        (
            lambda: tiny_gemma(tie_word_embeddings=True),
            ".*embed_tokens",
            "lm_head.weight",
        ),
    ],
    ids=["gpt2", "gemma"],
)
def test_an_adapter_on_one_of_two_tied_tensors_is_refused(student, target, twin):
    with pytest.raises(UserError, match=rf"model\.lora\.target_modules: .* whose weight is {twin} too: .* leave it"):
        LoRA(target_modules=target).add_to(student())


def test_an_adapter_on_a_matrix_that_two_layers_share_is_refused():
    student = tiny_llama()
    student.model.layers[1].mlp.up_proj.weight = student.model.layers[0].mlp.up_proj.weight
    with pytest.raises(UserError, match=r"names model.layers.0.mlp.up_proj, whose weight is model.layers.1.mlp.up_pro"):
        LoRA().add_to(student)
    LoRA(target_modules=["q_proj", "down_proj"]).add_to(student)
