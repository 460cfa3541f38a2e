"""Memory and work of a training step, from models without memory: what a preflight can say about other machines.

Activations are counted by tracing (`live_bytes`), the loss engine's share follows its own rule for chunks, and weights,
gradients and moments are arithmetic. Allocators, which take 5 to 10% more, and captures of feature losses are left out.

Shapes: T tokens of a micro-batch, D width, V vocabulary.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.losses.engine.rows import BUFFERS
from distill.losses.engine.walk import sizes
from distill.models.precision import product_dtype
from distill.preflight.live_bytes import Shape, trace_student, trace_teacher

# Tokenizer, rows, buffers of libraries: 150 to 200 MB beside all tensors in fits on a CPU. A CUDA context takes more.
PROCESS_BYTES = 150_000_000


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device, by what they are for.

    Args:
        weights: of the student and what learns beside it.
        gradients: of what learns.
        optimizer: its moments.
        buckets: DDP's copy of the gradients.
        teacher: its weights.
        gathered: weights that FSDP2 makes whole while they are used.
        activations: what the student keeps for the backward pass.
        engine: chunks of logits and the gradients that the loss engine finds in the forward pass.
        backward: peak of the backward pass above weights, moments and teacher.
        teacher_pass: peak of the teacher's forward pass above its weights.
        accumulates: whether gradients are there during a forward pass, those of the micro-batches before it.
        process: what a process holds beside all this.
    """

    weights: int
    gradients: int
    optimizer: int
    buckets: int
    teacher: int
    gathered: int
    activations: int
    engine: int
    backward: int
    teacher_pass: int
    accumulates: bool = False
    process: int = PROCESS_BYTES

    @property
    def fixed(self) -> int:
        """What is there at any time."""
        return self.weights + self.optimizer + self.buckets + self.teacher + self.process

    @property
    def step(self) -> int:
        """Peak of a training step: at the end of a forward pass, or later."""
        forward = self.gradients * self.accumulates + max(self.teacher_pass, self.activations + self.engine)
        return self.fixed + self.gathered + max(forward, self.backward)


def size_of(parameters: Iterable[Tensor]) -> int:
    """Bytes, shared parameters once."""
    return sum({id(p): p.numel() * p.element_size() for p in parameters}.values())


def active_parameters(model: Any) -> int:
    """Parameters that one token meets in a matrix product: of the experts only those that it is routed to."""
    config = model.config.get_text_config(decoder=True)
    used, experts = 0, int(getattr(config, "num_experts", 0) or getattr(config, "num_local_experts", 0) or 0)
    for name, parameter in model.named_parameters():
        share = 1.0
        if ".experts." in name and experts:
            share = config.num_experts_per_tok / experts
        used += int(parameter.numel() * share)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return used if embedding is head else used - embedding.numel()


def forward_flops(model: PreTrainedModel, tokens: int, length: int) -> float:
    """Floating-point operations of a forward pass with all logits: 2 a parameter and token, and causal attention."""
    config = model.config.get_text_config(decoder=True)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * width * length
    return float(tokens) * (2 * active_parameters(model) + attention)


def engine_bytes(student: PreTrainedModel, teacher: PreTrainedModel | None, shape: Shape) -> int:
    """What the loss engine holds at the end of its walk: a chunk of logits of each side, buffers, and gradients.

    Args:
        student: without memory.
        teacher: without memory; None where no loss needs it.
        shape: of a micro-batch.
    """
    heads = [model.get_output_embeddings().weight for model in (student, teacher) if model is not None]
    vocabs = [head.shape[0] for head in heads]
    like = torch.empty(shape.tokens, 0, device="cpu" if shape.on_cpu else "meta")
    chunk, block = sizes(vocabs, like, torch.float32, shape.chunk_size)
    products = [_product_dtype(head, shape) for head in heads]
    widths = [dtype.itemsize if shape.on_cpu else 4 for dtype in products]  # CUDA widens 16-bit products on the fly
    logits = sum(chunk * head.shape[0] * width for head, width in zip(heads, widths, strict=True))
    if widths[0] != products[0].itemsize:
        logits += chunk * vocabs[0] * products[0].itemsize  # the gradient of the student's
    buffers = BUFFERS * block * max(vocabs) * 4
    rows = sum(shape.tokens * head.shape[1] * head.element_size() for head in heads)
    casts = sum(
        head.numel() * dtype.itemsize for head, dtype in zip(heads, products, strict=True) if dtype != head.dtype
    )
    gradients = 4 * (heads[0].numel() * heads[0].requires_grad + shape.tokens * heads[0].shape[1])
    return logits + buffers + rows + casts + gradients


@dataclass(frozen=True)
class Parts:
    """What does not depend on the number of devices, in bytes; see `MemoryEstimate`."""

    activations: int
    backward: int
    teacher_pass: int
    engine: int


def trace(student: PreTrainedModel, teacher: PreTrainedModel | None, shape: Shape) -> Parts:
    """Traces both models without memory.

    Args:
        student: without memory, see `skeleton`.
        teacher: the same; None where targets come from elsewhere.
        shape: of a micro-batch.
    """
    activations, backward = trace_student(student, shape)
    teacher_pass = trace_teacher(teacher, shape) if teacher is not None else 0
    return Parts(activations, backward, teacher_pass, engine_bytes(student, teacher, shape))


def estimate_memory(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    parts: Parts,
    *,
    extra_parameters: int = 0,
    one_moment: Iterable[Tensor] = (),
    devices: int = 1,
    sharded: bool = False,
    accumulates: bool = False,
) -> MemoryEstimate:
    """Bytes on each of some devices.

    Args:
        student: without memory, see `skeleton`.
        teacher: the same; None where targets come from elsewhere.
        parts: of `trace`.
        extra_parameters: projections and probes that learn too.
        one_moment: parameters of the student whose optimizer keeps one moment rather than two.
        devices: number of data-parallel ranks.
        sharded: whether FSDP2 shards student and teacher over them; otherwise each has all of it, as under DDP.
        accumulates: whether an optimizer step has several micro-batches.
    """
    weights = size_of(student.parameters()) + 4 * extra_parameters
    learning = size_of(p for p in student.parameters() if p.requires_grad) + 4 * extra_parameters
    teacher_bytes = size_of(teacher.parameters()) if teacher is not None else 0
    gathered, backward = 0, parts.backward
    shards = devices if sharded else 1
    if shards > 1:
        # Of each model the head and two layers, the one in use and the next, are whole while they are used.
        for model in (student, teacher):
            if model is not None:
                gathered += size_of([model.get_output_embeddings().weight]) + 2 * largest_layer(model)
        backward -= learning - learning // shards
    return MemoryEstimate(
        weights=weights // shards,
        gradients=learning // shards,
        optimizer=(2 * learning - size_of(one_moment)) // shards,
        buckets=learning if devices > 1 and not sharded else 0,
        teacher=teacher_bytes // shards,
        gathered=gathered,
        activations=parts.activations,
        engine=parts.engine,
        backward=backward,
        teacher_pass=parts.teacher_pass,
        accumulates=accumulates,
    )


def largest_layer(model: PreTrainedModel) -> int:
    """Bytes of the largest member of the decoder's lists of layers."""
    stacks = [child for child in model.get_decoder().children() if isinstance(child, nn.ModuleList)]
    return max((size_of(layer.parameters()) for stack in stacks for layer in stack), default=0)


def _product_dtype(head: Tensor, shape: Shape) -> torch.dtype:
    return product_dtype(shape.autocast or head.dtype, "cpu" if shape.on_cpu else "cuda")
