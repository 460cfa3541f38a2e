"""Which tensors of a model are one piece of memory under several names, as tied embeddings are.

Whoever changes one of them changes the others as well. So an adapter, which counts where it was put in training, counts
everywhere once it is merged, and the merged model is another one.
"""

from torch import nn


def shared_parameters(model: nn.Module) -> dict[str, list[str]]:
    """Name of each parameter that shares memory -> the other names of that memory; views that overlap count.

    Args:
        model: on any device, the meta device too; not sharded.

    Example:
        >>> twins = nn.ModuleDict({"one": nn.Linear(2, 2, bias=False), "two": nn.Linear(2, 2, bias=False)})
        >>> twins["two"].weight = twins["one"].weight
        >>> shared_parameters(twins)
        {'one.weight': ['two.weight'], 'two.weight': ['one.weight']}
    """
    spans = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.numel():
            memory = parameter.untyped_storage()
            storage = memory.data_ptr() or memory._cdata  # on the meta device all addresses are 0
            last = sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
            start = parameter.storage_offset() * parameter.element_size()
            spans.append((storage, start, start + (last + 1) * parameter.element_size(), name))
    others: dict[str, list[str]] = {}
    spans.sort()
    for index, (storage, _, end, name) in enumerate(spans):
        for their_storage, their_start, _, their_name in spans[index + 1 :]:
            if their_storage != storage or their_start >= end:
                break
            others.setdefault(name, []).append(their_name)
            others.setdefault(their_name, []).append(name)
    return others
