"""A student cut from its teacher: some of its layers, copied, rather than a model configured a second time.

The copy is edited instead of built from a configuration, so that any family works whose layers sit in one list; that
the configuration describes the copy is checked by building it once without memory.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from distill.errors import UserError
from distill.models.layers import layer_stack


def cut_layers(teacher: PreTrainedModel, layers: int | list[int], key: str = "model.student_layers") -> PreTrainedModel:
    """A student that starts as some of the teacher's layers, with its embeddings, final norm and head.

    Parameters are copies, trainable, in the teacher's dtype; tied ones stay tied. The configuration describes the
    student, so that it saves and loads like any model.

    Args:
        teacher: left untouched.
        layers: how many, spread evenly with first and last included, or which (ascending).
        key: YAML key that error messages name.

    Returns:
        The student in train mode, with the use of a cache switched off.

    Raises:
        UserError: layers that the teacher does not have, or a family whose configuration cannot describe the cut.
    """
    stack = layer_stack(teacher, key)
    kept = kept_layers(layers, len(stack), key)
    memo: dict[int, Any] = {}
    cut = nn.ModuleList(copy.deepcopy(stack[index], memo) for index in kept)
    memo[id(stack)] = cut  # whatever refers to the teacher's stack refers to the cut one in the copy
    student = copy.deepcopy(teacher, memo)
    for new_index, layer in enumerate(cut):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = new_index  # type: ignore[assignment]
    cut_config(student.config.get_text_config(decoder=True), len(stack), kept)
    student.config.use_cache = False
    _check_describes(student, kept, key)
    return student.requires_grad_(True).train()


@torch.no_grad()
def most_important_layers(teacher: PreTrainedModel, count: int, ids_BL: Tensor) -> list[int]:
    """The layers that change their input most, ascending.

    A layer's influence is 1 - cos(state before it, state after it), averaged over tokens [Block Influence of ShortGPT,
    arXiv 2403.03853, section 3.2].

    Args:
        teacher: in eval mode, left untouched.
        count: how many layers to keep.
        ids_BL: token ids to measure on.

    Raises:
        UserError: more layers than the teacher has.
    """
    stack = layer_stack(teacher, "model.student_layers")
    kept_layers(count, len(stack), "model.student_layers")
    influence: list[Tensor] = []

    def after(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before_BLD = args[0] if args else kwargs["hidden_states"]
        after_BLD = output[0] if isinstance(output, tuple) else output
        influence.append(1 - torch.cosine_similarity(before_BLD.float(), after_BLD.float(), dim=-1).mean())

    handles = [layer.register_forward_hook(after, with_kwargs=True) for layer in stack]
    try:
        teacher.get_decoder()(input_ids=ids_BL.to(teacher.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return sorted(torch.stack(influence).topk(count).indices.tolist())


def kept_layers(layers: int | list[int], count: int, key: str) -> list[int]:
    """Indices of a number of layers among `count`, spread evenly, or those that are named."""
    if isinstance(layers, int):
        if not 1 <= layers <= count:
            raise UserError(f"{key}: {layers} of the teacher's {count} layers; give 1 to {count}")
        return torch.linspace(0, count - 1, layers, dtype=torch.float64).round().long().tolist()
    if not layers or sorted(set(layers)) != layers or not 0 <= layers[0] <= layers[-1] < count:
        raise UserError(f"{key}: {layers}; give ascending layer indices between 0 and {count - 1}")
    return layers


def cut_config(config: PreTrainedConfig, count: int, kept: list[int]) -> None:
    """Makes a configuration of `count` layers describe the kept ones, in place."""
    for name, value in list(vars(config).items()):
        if name == "mlp_only_layers" and value:  # layer indices rather than one entry per layer
            setattr(config, name, [new for new, old in enumerate(kept) if old in value])
        elif name == "first_k_dense_replace":
            setattr(config, name, sum(old < value for old in kept))
        elif isinstance(value, (list, tuple)) and len(value) == count and "token_id" not in name:
            setattr(config, name, [value[old] for old in kept])
    config.num_hidden_layers = len(kept)


def _check_describes(student: PreTrainedModel, kept: list[int], key: str) -> None:
    """Building from the student's configuration must give the same parameters, or the student could not be reloaded."""
    with torch.device("meta"):
        rebuilt = type(student)(copy.deepcopy(student.config))
    shapes = [{name: value.shape for name, value in m.state_dict().items()} for m in (student, rebuilt)]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"{key}: layers {kept} alternate between kinds in a way that {type(student.config).__name__} cannot "
            "describe; keep the teacher's rhythm of layers"
        )
