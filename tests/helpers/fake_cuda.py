"""A CUDA device without memory: tensors that believe they are on it, so that what only a GPU would show shows on a CPU.

A product of tensors on two devices raises; so does reading a value, which on a GPU would wait for it. Kernels and
copies between host and device are counted. What a kernel computes and how long it takes, a fake does not know.
"""

import ctypes
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
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
    """Counts what runs on the fake device: `kernels` by name, and `copies` from or to the host by shape."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.copies: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name == "is_set_to":  # fake tensors have no rule for it
            one, other = ((x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride()) for x in args)
            return one == other
        out = func(*args, **(kwargs or {}))
        devices = {x.device.type for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)}
        if devices == {"cpu", "cuda"} and name in ("_to_copy", "copy_"):
            self.copies.append(tuple(args[0].shape))
        if "cuda" in devices and name not in VIEWS and not name.startswith(("empty", "new_empty", "prim::")):
            self.kernels[name] += 1
        return out


@contextmanager
def fake_cuda() -> Iterator[tuple[FakeTensorMode, Launches]]:
    """Within it, `device="cuda"` makes fake tensors and `fake` turns real ones into them."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * TYPES).in_dll(library, REGISTRY)
    before = guards[CUDA]
    guards[CUDA] = before or guards[META]  # whose guard does nothing
    try:
        with FakeTensorMode(allow_fallback_kernels=False) as mode, Launches() as launches:
            yield mode, launches
    finally:
        guards[CUDA] = before


def fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """The same tensor on the fake device."""
    with _disable_current_modes():
        made = FakeTensor(mode, tensor.detach().to("meta"), torch.device("cuda:0"))
        return made.requires_grad_(tensor.requires_grad)
