"""What a forward and a backward pass keep alive, counted before anything is run.

Models are built on the meta device and run on tensors that have shapes and no storage; every storage is counted from
its birth to its end. That takes a second or two. Attention is taken to be torch's fused one on a CPU, and nothing is
known of allocators.

Shapes: B rows, L positions, D width.
"""

import copy
import weakref
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from distill.errors import UserError
from distill.models.cut import cut_layers

TRACED_TEACHER_LAYERS = 4  # without gradients the peak does not grow with depth


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
        """Positions of all its rows, padding included."""
        return self.rows * self.length


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


def trace_student(student: PreTrainedModel, shape: Shape) -> tuple[int, int]:
    """What a forward pass keeps and a backward pass needs at its peak.

    Args:
        student: without memory, in train mode.
        shape: of a micro-batch.

    Returns:
        Bytes of activations after the forward pass; bytes at the peak of the backward pass, the new gradients and that
        of the head included. Neither counts the weights.
    """
    model, factor = _traceable(student, shape)
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
        learning = [hidden_BLD]
        head = model.get_output_embeddings().weight
        if head.requires_grad:
            learning.append(head)
        wide = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in learning[1:]]
        gradients = [torch.zeros_like(hidden_BLD), *(gradient.to(head.dtype) for gradient in wide)]
        live.peak = live.now
        torch.autograd.backward(learning, gradients)
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
    model, factor = _traceable(teacher, shape)
    mode = FakeTensorMode()
    parameters = _without_storage(model.eval(), mode)
    with torch.no_grad(), mode, LiveBytes() as live:
        for tensor in parameters:
            live.count(tensor)
        start = live.now
        _decode(model, shape)
    return round((live.peak - start) * factor)


def _without_mask(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
    """transformers' fused attention as it is called where rows need no mask, which a trace does not see by itself."""
    return sdpa_attention_forward(module, query, key, value, None, **options)


AttentionInterface.register("distill_trace", _without_mask)
AttentionMaskInterface.register("distill_trace", lambda *args, **options: None)


def _autocast(shape: Shape) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", shape.autocast) if shape.autocast is not None else nullcontext()


def _traceable(model: PreTrainedModel, shape: Shape) -> tuple[PreTrainedModel, float]:
    """A copy to trace, and what its bytes count: the shape rule of grouped experts knows bf16 alone."""
    model = copy.deepcopy(model)
    if not shape.packed and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("distill_trace")
    dtype = next(model.parameters()).dtype
    if not any(".experts." in name for name, _ in model.named_parameters()) or dtype == torch.bfloat16:
        return model, 1.0
    nn.Module.to(model, torch.bfloat16)
    return model, dtype.itemsize / 2


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
