"""What a precision means on a device: the dtypes of both models, and whether a CPU has units for 16-bit products.

A CPU without such units multiplies bf16 seven to a hundred times slower than fp32. There teacher and loss engine work
in fp32 whatever the precision, which doubles the teacher's memory on such a machine.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.errors import UserError


@cache
def has_units(dtype: torch.dtype) -> bool:
    """Whether this machine's CPU multiplies matrices of a 16-bit dtype at least as fast as fp32 ones."""
    if not torch.backends.mkldnn.is_available():
        return False
    checks = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return bool(checks[dtype]())


def product_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """The dtype in which matrix products of a dtype are best done on a type of device."""
    return torch.float32 if device == "cpu" and dtype.itemsize < 4 and not has_units(dtype) else dtype


def student_dtype(precision: str) -> torch.dtype:
    """The dtype of parameters that learn: float32, but under a true precision its own."""
    true = {"64-true": torch.float64, "64": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}
    return true.get(precision, torch.float32)


def teacher_dtype(option: str, precision: str, device: str) -> torch.dtype:
    """The dtype of a frozen teacher.

    Args:
        option: auto, or the name of a dtype. auto = that of precision 32 and 64; else bfloat16, or float32 on a CPU
            without bf16 units.
        precision: of the trainer, such as bf16-mixed.
        device: cpu, cuda, ...
    """
    if option != "auto":
        dtype: torch.dtype = getattr(torch, option)
        return dtype
    whole = {"32-true": torch.float32, "32": torch.float32, "64-true": torch.float64, "64": torch.float64}
    return whole.get(precision) or product_dtype(torch.bfloat16, device)


def check_experts(model: PreTrainedModel, dtype: torch.dtype, key: str = "trainer.precision") -> None:
    """Refuses fused experts in float64: transformers multiplies them in groups, which torch does up to 32 bits.

    Args:
        model: in any dtype.
        dtype: that it is to run in.
        key: YAML key that the message names.

    Raises:
        UserError: it has such experts, and the dtype is float64.
    """
    fused = any(parameter.ndim == 3 and "expert" in name for name, parameter in model.named_parameters())
    grouped = getattr(model.config.get_text_config(decoder=True), "_experts_implementation", None) != "eager"
    if dtype == torch.float64 and fused and grouped:
        raise UserError(
            f"{key}: 64-true, but the experts of {type(model).__name__} are multiplied in groups, which torch cannot "
            "do in 64 bits; use 32-true"
        )


def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Casts weights in place; within a transformers model so that it is what `from_pretrained` gives with that dtype.

    What a family keeps in fp32 (DeepSeek's selection bias), and buffers that no checkpoint has (the frequencies of
    positions), stay as they are: rounded frequencies alone cost 1.7e-4 nats behind a thousand positions.

    Args:
        module: a model, or what holds models.
        dtype: of floating point.
    """
    if not isinstance(module, PreTrainedModel):
        for child in module.children():
            if any(isinstance(part, PreTrainedModel) for part in child.modules()):
                cast(child, dtype)
            else:
                child.to(dtype)
        return
    kept = [re.escape(key).replace(r"\*", ".*") for key in module._get_dtype_plan(dtype)]
    loaded = module.state_dict(keep_vars=True).items()
    for name, tensor in (*module.named_parameters(), *((n, t) for n, t in loaded if not isinstance(t, nn.Parameter))):
        _cast(tensor, torch.float32 if any(re.search(key, name) for key in kept) else dtype)


def _cast(tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.is_floating_point() and tensor.dtype != dtype:
        tensor.data = tensor.data.to(dtype)


@contextmanager
def whole_products() -> Iterator[None]:
    """Matrix products of fp32 are of fp32 in the block, whatever `model.matmul_precision` allows outside."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def full_precision(x: Tensor) -> Tensor:
    """fp32, or what is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
