"""Memory and work of a training step before it is run: the models are built without memory and traced without work.

What a forward and a backward pass keep alive is not computed from a formula but counted: both run on tensors that have
shapes and no storage, and every storage is counted from its birth to its end. The loss engine's share is its own rule
for chunks; parameters, gradients and optimizer states are arithmetic. The price: a second or two, an attention that is
taken to be torch's fused one, and nothing said about allocators, libraries or a CUDA context (add about 5%).

Shapes: B rows, L positions, T = B * L tokens of a micro-batch, D width, V vocabulary.
"""

import copy
import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from distill.cut import cut_layers
from distill.errors import UserError
from distill.losses.rows import BUFFERS
from distill.losses.walk import _sizes

TRACED_TEACHER_LAYERS = 4  # without gradients its peak does not grow with depth


@dataclass(frozen=True)
class Shape:
    """What a device sees at a time.

    Args:
        rows: B.
        length: L.
        autocast: dtype of matrix products where it is not the weights', else None.
        on_cpu: whether the device is a CPU, which has smaller chunks of logits.
        chunk_size: tokens whose logits exist at one time; None = the engine's budget.
        packed: whether rows hold several documents, which needs an attention mask.
        checkpointing: whether the student's activations are recomputed.
    """

    rows: int
    length: int
    autocast: torch.dtype | None = None
    on_cpu: bool = True
    chunk_size: int | None = None
    packed: bool = False
    checkpointing: bool = False

    @property
    def tokens(self) -> int:
        """T."""
        return self.rows * self.length


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device, by what they are for.

    Args:
        weights: of the student and what else learns.
        gradients: of these.
        optimizer: AdamW's two moments.
        buckets: DDP's copy of the gradients.
        teacher: its weights.
        gathered: weights that FSDP2 makes whole while they are used.
        activations: what the student keeps for the backward pass.
        engine: chunks of logits and the gradients that the loss engine finds in the forward pass.
        backward: peak of the backward pass above weights, moments and teacher.
        teacher_pass: peak of the teacher's forward pass above its weights.
        checkpoint: copy that is made in host memory while a checkpoint is saved.
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
    checkpoint: int

    @property
    def fixed(self) -> int:
        """What is there at any time."""
        return self.weights + self.optimizer + self.buckets + self.teacher

    @property
    def step(self) -> int:
        """Peak of a training step: at the end of a forward pass, with the gradients of the step before, or later."""
        forward = self.gradients + max(self.teacher_pass, self.activations + self.engine)
        return self.fixed + self.gathered + max(forward, self.backward)

    @property
    def saving(self) -> int:
        """Peak while a checkpoint is saved, in host memory where the device is a CPU."""
        return self.fixed + self.gradients + self.checkpoint


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that exist, from the operators that make them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, Any] = {}

    def count(self, tensor: Tensor) -> None:
        """Takes a storage into account until it is gone."""
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key not in self._known:
            self._known[key] = weakref.finalize(storage, self._gone, key, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def _gone(self, key: int, size: int) -> None:
        del self._known[key]
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self.count(leaf)
        return output


def skeleton(config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model without memory.

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


def size_of(parameters: Iterable[Tensor]) -> int:
    """Bytes, shared parameters once."""
    return sum({id(p): p.numel() * p.element_size() for p in parameters}.values())


def active_parameters(model: PreTrainedModel) -> int:
    """Parameters that one token meets in a matrix product: of the experts only those that it is routed to."""
    config = model.config.get_text_config(decoder=True)
    used, experts = 0, int(getattr(config, "num_experts", 0) or getattr(config, "num_local_experts", 0) or 0)
    for name, parameter in model.named_parameters(remove_duplicate=True):
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


def trace_student(student: PreTrainedModel, shape: Shape) -> tuple[int, int]:
    """What a forward pass keeps and a backward pass needs at its peak.

    Args:
        student: without memory, in train mode.
        shape: of a micro-batch.

    Returns:
        Bytes of activations after the forward pass; bytes at the peak of the backward pass, the new gradients and that
        of the head included. Neither counts the weights.
    """
    model, factor = _traceable(student)
    model.train()
    if shape.checkpointing:
        model.activation_checkpointing_enable()
    mode = FakeTensorMode()
    parameters = _without_storage(model, mode)
    with mode, LiveBytes() as live:
        for tensor in parameters:
            live.count(tensor)
        start = live.now
        with _autocast(shape):
            hidden_BLD = _decode(model, shape)
        kept = live.now - start
        head = model.get_output_embeddings().weight
        head_gradient = torch.zeros_like(head, dtype=torch.float32)
        gradient_BLD = torch.zeros_like(hidden_BLD)
        live.peak = live.now
        torch.autograd.backward([hidden_BLD, head], [gradient_BLD, head_gradient.to(head.dtype)])
        peak = live.peak - start
    return round(kept * factor), round(peak * factor)


def trace_teacher(teacher: PreTrainedModel, shape: Shape) -> int:
    """Peak of a forward pass without gradients above the weights, in bytes.

    Args:
        teacher: without memory.
        shape: of a micro-batch.
    """
    try:
        few = min(TRACED_TEACHER_LAYERS, teacher.config.get_text_config(decoder=True).num_hidden_layers)
        teacher = cut_layers(teacher, list(range(few)))
    except UserError:  # a rhythm of layers that four of them do not have
        pass
    model, factor = _traceable(teacher)
    mode = FakeTensorMode()
    parameters = _without_storage(model.eval(), mode)
    with torch.no_grad(), mode, LiveBytes() as live:
        for tensor in parameters:
            live.count(tensor)
        start = live.now
        _decode(model, shape)
    return round((live.peak - start) * factor)


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
    chunk, block = _sizes(vocabs, like, torch.float32, shape.chunk_size)
    logits = sum(chunk * head.shape[0] * _logit_bytes(head, shape) for head in heads)
    buffers = BUFFERS * block * max(vocabs) * 4
    rows = sum(shape.tokens * head.shape[1] * head.element_size() for head in heads)
    casts = sum(head.numel() * shape.autocast.itemsize for head in heads[:1] if shape.autocast is not None)
    gradients = 4 * (heads[0].numel() + shape.tokens * heads[0].shape[1])
    return logits + buffers + rows + casts + gradients


def estimate_memory(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    shape: Shape,
    *,
    extra_parameters: int = 0,
    devices: int = 1,
    sharded: bool = False,
) -> MemoryEstimate:
    """Bytes on each of some devices.

    Args:
        student: without memory, see `skeleton`.
        teacher: the same; None where targets come from elsewhere.
        shape: of a micro-batch.
        extra_parameters: projections and probes that learn too.
        devices: number of data-parallel ranks.
        sharded: whether FSDP2 shards student and teacher over them; otherwise each has all of it, as under DDP.
    """
    weights = size_of(student.parameters()) + 4 * extra_parameters
    teacher_bytes = size_of(teacher.parameters()) if teacher is not None else 0
    moments = 2 * weights
    activations, backward = trace_student(student, shape)
    if shape.packed:
        activations += shape.rows * shape.length**2
    gathered = 0
    shards = devices if sharded else 1
    if shards > 1:
        # Of each model the head and two layers, the one in use and the next, are whole while they are used.
        for model in (student, teacher):
            if model is not None:
                gathered += size_of([model.get_output_embeddings().weight]) + 2 * largest_layer(model)
        backward -= weights - weights // shards
    return MemoryEstimate(
        weights=weights // shards,
        gradients=weights // shards,
        optimizer=moments // shards,
        buckets=weights if devices > 1 and not sharded else 0,
        teacher=teacher_bytes // shards,
        gathered=gathered,
        activations=activations,
        engine=engine_bytes(student, teacher, shape),
        backward=backward,
        teacher_pass=trace_teacher(teacher, shape) if teacher is not None else 0,
        checkpoint=(weights + moments) // shards,
    )


def largest_layer(model: PreTrainedModel) -> int:
    """Bytes of the largest member of the decoder's lists of layers."""
    stacks = [child for child in model.get_decoder().children() if isinstance(child, nn.ModuleList)]
    return max((size_of(layer.parameters()) for stack in stacks for layer in stack), default=0)


def _logit_bytes(head: Tensor, shape: Shape) -> int:
    if shape.on_cpu:
        return shape.autocast.itemsize if shape.autocast is not None else head.element_size()
    return 4  # CUDA widens the products of 16-bit inputs on the fly


def _autocast(shape: Shape) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", shape.autocast) if shape.autocast is not None else nullcontext()


def _traceable(model: PreTrainedModel) -> tuple[PreTrainedModel, float]:
    """A copy to trace, and what its bytes count: the shape rule of grouped experts knows bf16 alone."""
    model = copy.deepcopy(model)
    dtype = next(model.parameters()).dtype
    if not any(".experts." in name for name, _ in model.named_parameters()) or dtype == torch.bfloat16:
        return model, 1.0
    return model.to(torch.bfloat16), dtype.itemsize / 2


def _without_storage(model: PreTrainedModel, mode: FakeTensorMode) -> list[Tensor]:
    """Makes the tensors of a model on the meta device tensors of a CPU that have no storage, in place."""
    replaced: dict[int, nn.Parameter] = {}
    cpu = torch.device("cpu")
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in replaced:
                    fake = FakeTensor(mode, parameter.detach(), cpu)
                    replaced[id(parameter)] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
                module._parameters[name] = replaced[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = FakeTensor(mode, buffer, cpu)
    return list(replaced.values())


def _decode(model: PreTrainedModel, shape: Shape) -> Tensor:
    ids_BL = torch.zeros(shape.rows, shape.length, dtype=torch.long)
    hidden_BLD: Tensor = model.get_decoder()(input_ids=ids_BL, use_cache=False).last_hidden_state
    return hidden_BLD
