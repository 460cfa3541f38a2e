"""The configuration of a Mixture-of-Experts teacher of thirty billion parameters, which nothing here ever loads."""

from transformers import Qwen3MoeConfig

THIRTY_B = Qwen3MoeConfig(
    vocab_size=151_936,
    hidden_size=2048,
    intermediate_size=6144,
    num_hidden_layers=48,
    num_experts=128,
    num_experts_per_tok=8,
    moe_intermediate_size=768,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
)
