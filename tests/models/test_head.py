"""The head as data against the logits of real transformers models of the families that do something special."""

import pytest
import torch

from distill.errors import UserError
from distill.models.head import check_lm_head, lm_head_of
from helpers.tiny import BASE, build, tiny_gemma, tiny_gpt2, tiny_granite_moe, tiny_llama

GEMMA = BASE | {"head_dim": 8, "sliding_window": 32, "final_logit_softcapping": 3.0}
MODELS = {
    "llama": tiny_llama,
    "llama-tied": lambda: tiny_llama(tie_word_embeddings=True),
    "gpt2": tiny_gpt2,
    "granite-moe": tiny_granite_moe,
    "granite": lambda: build("GraniteForCausalLM", "GraniteConfig", BASE | {"logits_scaling": 8.0}),
    "cohere": lambda: build("CohereForCausalLM", "CohereConfig", BASE | {"logit_scale": 0.25}),
    "cohere2": lambda: build("Cohere2ForCausalLM", "Cohere2Config", BASE | {"logit_scale": 0.25, "sliding_window": 32}),
    "gemma2": lambda: build("Gemma2ForCausalLM", "Gemma2Config", GEMMA),
    "gemma3": lambda: tiny_gemma(final_logit_softcapping=3.0),
    "phi-bias": lambda: build("PhiForCausalLM", "PhiConfig", BASE | {"num_key_value_heads": 4}),
    "falcon-h1": lambda: build(
        "FalconH1ForCausalLM",
        "FalconH1Config",
        BASE
        | {"head_dim": 4, "lm_head_multiplier": 0.3, "mamba_d_ssm": 16, "mamba_n_heads": 4, "mamba_d_head": 4}
        | {"mamba_d_state": 4, "mamba_n_groups": 1, "mamba_chunk_size": 8},
    ),
    "gemma3n": lambda: build(
        "Gemma3nForCausalLM",
        "Gemma3nTextConfig",
        GEMMA
        | {"num_hidden_layers": 2, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 4}
        | {"laurel_rank": 4, "num_kv_shared_layers": 0, "intermediate_size": [24, 24], "altup_num_inputs": 2}
        | {"layer_types": ["sliding_attention", "full_attention"], "activation_sparsity_pattern": [0.0, 0.0]},
    ),
    "gemma4": lambda: build(
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        GEMMA
        | {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 4, "num_kv_shared_layers": 0}
        | {"layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 8},
    ),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_head_gives_the_models_own_logits(name):
    model = MODELS[name]()
    ids = torch.arange(3, 15)[None]
    head = lm_head_of(model)
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
    expected = model(input_ids=ids, use_cache=False).logits[0]
    torch.testing.assert_close(head.logits(hidden), expected, rtol=1e-5, atol=1e-5)
    assert head.weight is model.get_output_embeddings().weight
    check_lm_head(model, head)


def test_families_that_do_something_special_are_seen():
    assert lm_head_of(MODELS["granite"]()).scale == 1 / 8
    assert lm_head_of(MODELS["cohere"]()).scale == 0.25
    assert lm_head_of(MODELS["falcon-h1"]()).scale == 0.3
    assert lm_head_of(MODELS["gemma2"]()).softcap == 3.0
    assert lm_head_of(MODELS["phi-bias"]()).bias is not None


def test_unknown_trick_is_found_out():
    model = tiny_llama()
    head = lm_head_of(model)
    model.lm_head.register_forward_hook(lambda module, args, output: output * 1.1)
    with pytest.raises(UserError, match="model: llama computes its logits"):
        check_lm_head(model, head)


def test_model_without_head_is_refused():
    model = build("LlamaModel", "LlamaConfig", BASE)
    with pytest.raises(UserError, match="model: LlamaModel has no linear output head"):
        lm_head_of(model)
