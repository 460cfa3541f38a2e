"""Tiny random models, one per family, in fp32 and eval mode: real transformers code in a millisecond.

Random weights say nothing about learning; they serve shapes, identities and gradients. Every maker is seeded and takes
keyword overrides of its configuration.
"""

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCAB = 64
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "initializer_range": 0.3,  # near-zero outputs would hide wrong ones
}


def build(model_class: str, config_class: str, options: dict[str, Any]) -> PreTrainedModel:
    """A seeded fp32 model in eval mode; the global random state is left as it was."""
    config = getattr(transformers, config_class)(**options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = getattr(transformers, model_class)(config)
        for name, parameter in model.named_parameters():
            if "bias" in name or "sinks" in name:  # zero by default, and then untested
                torch.nn.init.normal_(parameter, std=0.1)
    return model.float().eval()


def tiny_llama(**options: Any) -> PreTrainedModel:
    return build("LlamaForCausalLM", "LlamaConfig", BASE | options)


def tiny_qwen2(**options: Any) -> PreTrainedModel:
    return build("Qwen2ForCausalLM", "Qwen2Config", BASE | options)


def tiny_gemma(**options: Any) -> PreTrainedModel:
    """Gemma 3 text model: four norms per layer, soft-cappable, wide heads."""
    return build("Gemma3ForCausalLM", "Gemma3TextConfig", BASE | {"head_dim": 8, "sliding_window": 32} | options)


def tiny_gpt2(**options: Any) -> PreTrainedModel:
    """Plain FFN of Conv1D layers, learned positions. Takes GPT-2's own configuration names."""
    sizes = {"vocab_size": VOCAB, "n_embd": 16, "n_inner": 24, "n_layer": 2, "n_head": 4, "n_positions": 64}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
    return build("GPT2LMHeadModel", "GPT2Config", sizes | tokens | options)


def tiny_qwen3_moe(**options: Any) -> PreTrainedModel:
    """4 experts, top-2 with renormalised weights."""
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
    return build("Qwen3MoeForCausalLM", "Qwen3MoeConfig", BASE | moe | {"head_dim": 4} | options)


def tiny_mixtral(**options: Any) -> PreTrainedModel:
    return build(
        "MixtralForCausalLM", "MixtralConfig", BASE | {"num_local_experts": 4, "num_experts_per_tok": 2} | options
    )


def tiny_olmoe(**options: Any) -> PreTrainedModel:
    """Top-k weights are not renormalised: they sum to less than 1."""
    return build("OlmoeForCausalLM", "OlmoeConfig", BASE | {"num_experts": 4, "num_experts_per_tok": 2} | options)


def tiny_granite_moe(**options: Any) -> PreTrainedModel:
    """Router in a block of its own name, logits divided by `logits_scaling`."""
    moe = {"num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 2.0, "residual_multiplier": 0.5}
    return build("GraniteMoeForCausalLM", "GraniteMoeConfig", BASE | moe | options)


def tiny_deepseek_v3(**options: Any) -> PreTrainedModel:
    """Layer 0 dense, layer 1 a MoE block: sigmoid scores, selection bias, groups, a shared expert, weights x 2.5."""
    moe = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
    }
    attention = {
        "num_key_value_heads": 4,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 4,
    }
    model = build("DeepseekV3ForCausalLM", "DeepseekV3Config", BASE | moe | attention | options)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # moves the selection but not the scores
            buffer.copy_(torch.linspace(-0.3, 0.3, buffer.numel()))
    return model


def tiny_gpt_oss(**options: Any) -> PreTrainedModel:
    """Biased, transposed, interleaved experts; softmax over the chosen logits; attention sinks (eager attention)."""
    moe = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 4, "sliding_window": 32}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    return build("GptOssForCausalLM", "GptOssConfig", BASE | moe | rope | {"attn_implementation": "eager"} | options)
