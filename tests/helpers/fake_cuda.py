"""A CUDA device without memory: tensors that believe they are on it, so that what only a GPU would show shows on a CPU.

A product of tensors on two devices raises; so does reading a value, which on a GPU would wait for it, except in the
functions that a test names. Kernels and copies between host and device are counted. What a kernel computes and how long
it takes, a fake does not know; nor do backward passes run, which stop in C++.
"""

import ctypes
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

CUDA, META, TYPES = 1, 14, 21  # numbers of device types in c10, and how many there are
REGISTRY = "_ZN3c104impl26device_guard_impl_registryE"  # c10::impl::device_guard_impl_registry
VIEWS = {
    "alias", "as_strided", "detach", "expand", "permute", "select", "slice", "split", "t", "transpose", "unsqueeze",
    "view", "_unsafe_view",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts what runs on the fake device: `kernels` by name, and `copies` from or to the host by shape, `blocking` how
    many of them the host waits for.

    Args:
        allowed: function -> what its reading of a value from the device gives it; `waits` counts these by function.
    """

    def __init__(self, allowed: Mapping[str, Any]) -> None:
        super().__init__()
        self.allowed = allowed
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.copies: list[tuple[int, ...]] = []
        self.blocking = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name == "is_set_to":  # fake tensors have no rule for it
            one, other = ((x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride()) for x in args)
            return one == other
        if name == "_local_scalar_dense" and args[0].is_cuda:
            frame = sys._getframe(1)
            while frame is not None and frame.f_code.co_name not in self.allowed:
                frame = frame.f_back  # type: ignore[assignment]
            if frame is not None:
                self.waits[frame.f_code.co_name] += 1
                return self.allowed[frame.f_code.co_name]
        out = func(*args, **(kwargs or {}))
        devices = {x.device.type for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)}
        if devices == {"cpu", "cuda"} and name in ("_to_copy", "copy_"):
            self.copies.append(tuple(args[0].shape))
            asked = (kwargs or {}).get("non_blocking", args[2] if name == "copy_" and len(args) > 2 else False)
            self.blocking += not asked
        if "cuda" in devices and name not in VIEWS and not name.startswith(("empty", "new_empty", "prim::")):
            self.kernels[name] += 1
        return out


PATCHES = {
    "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,  # else autocast and the scaler are off
    "torch.cuda.is_bf16_supported": lambda *args, **kwargs: True,
    "torch.cuda.get_device_capability": lambda *args: (9, 0),
    "torch.cuda.Event": mock.MagicMock(),
    "torch.Generator": mock.MagicMock(return_value=mock.MagicMock(manual_seed=lambda seed: None)),
    "transformers.masking_utils.is_tracing": lambda *args: False,  # which would hide a wait from fakes
}


@contextmanager
def fake_cuda(allowed: Mapping[str, Any] = MappingProxyType({})) -> Iterator[tuple[FakeTensorMode, Launches]]:
    """Within it, `device="cuda"` makes fake tensors and `fake` turns real ones into them.

    Args:
        allowed: see `Launches`.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * TYPES).in_dll(library, REGISTRY)
    before = guards[CUDA]
    guards[CUDA] = before or guards[META]  # whose guard does nothing
    try:
        with ExitStack() as stack:
            for target, value in PATCHES.items():
                stack.enter_context(mock.patch(target, value))
            mode = stack.enter_context(FakeTensorMode(allow_fallback_kernels=False, allow_non_fake_inputs=True))
            yield mode, stack.enter_context(Launches(allowed))
    finally:
        guards[CUDA] = before


def fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """The same tensor on the fake device."""
    with _disable_current_modes():
        made = FakeTensor(mode, tensor.detach().to("meta"), torch.device("cuda:0"))
        return made.requires_grad_(tensor.requires_grad)


def onto(module: nn.Module, mode: FakeTensorMode, dtype: torch.dtype | None = None) -> nn.Module:
    """Moves a module there in place, tied parameters together; `dtype` for those of its parameters that are fp32."""
    moved: dict[int, Tensor] = {}
    for part in module.modules():
        for store in (part._parameters, part._buffers):
            for name, tensor in store.items():
                if tensor is None:
                    continue
                if id(tensor) not in moved:
                    kept = isinstance(tensor, nn.Parameter)
                    with _disable_current_modes():
                        cast = tensor.to(dtype) if kept and dtype and tensor.dtype == torch.float32 else tensor
                        made = fake(cast.detach(), mode)
                        moved[id(tensor)] = nn.Parameter(made, requires_grad=tensor.requires_grad) if kept else made
                store[name] = moved[id(tensor)]
    return module
