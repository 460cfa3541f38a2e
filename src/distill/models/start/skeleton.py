"""The student before its neurons are chosen: a model of another shape that holds whatever of the teacher fits.

A dense student of a MoE teacher is a model of the family's dense twin where transformers has one, else of the same
class with its switch for dense layers, else of the same class with a single expert that every token goes to, which
computes the same as a dense FFN. So each student loads with transformers alone.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from distill.errors import UserError
from distill.models.blocks import moe_layers, router_of
from distill.models.cut import cut_config, cut_layers
from distill.models.layers import decoder_layers
from distill.models.start.ffn import ffn_of
from distill.models.start.shape import Shape

KEY = "model.student_intermediate_size"
TWINS = {"qwen3_moe": "qwen3", "mixtral": "mistral", "granitemoe": "granite"}  # same attention, norms, multipliers
WIDTHS = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "moe_intermediate_size")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
TWIN_OWN = {"model_type", "architectures", "transformers_version", "layer_types", "auto_map", "dtype"}


def student_config(teacher: PreTrainedModel, kept: list[int], width: int | None, hidden: int | None) -> Any:
    """The configuration of a student of another shape.

    Args:
        teacher: on any device, meta included.
        kept: its layers that the student has.
        width: neurons of each FFN, which are dense then; None = the teacher's blocks.
        hidden: width of the residual stream; None = the teacher's.

    Raises:
        UserError: the family's configuration has no word for it.
    """
    config: Any = copy.deepcopy(teacher.config)
    if config.get_text_config(decoder=True) is not config:
        raise UserError(f"{KEY}: {type(teacher).__name__} is more than a language model; leave the key out")
    cut_config(config, len(decoder_layers(teacher)), kept)
    if width is not None:
        if moe_layers(teacher):
            config = _dense(config)
        names = [name for name in WIDTHS if hasattr(config, name)]
        if not names:
            raise UserError(f"{KEY}: {type(config).__name__} has no width of FFNs by a known name; leave the key out")
        for name in names:
            setattr(config, name, width)
    if hidden is not None:
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        config.head_dim, config.hidden_size, config.tie_word_embeddings = head, hidden, False
    config.use_cache = False
    return config


def build(config: Any, teacher: PreTrainedModel) -> PreTrainedModel:
    """A model of a configuration in fp32, with random weights, on the device that is the default."""
    options = {"dtype": torch.float32, "attn_implementation": teacher.config._attn_implementation}
    same = type(config) is type(teacher.config)
    model: PreTrainedModel = (type(teacher)._from_config if same else AutoModelForCausalLM.from_config)(
        config, **options
    )
    model.generation_config = copy.deepcopy(teacher.generation_config)  # where it stops, among others
    return model


def unmade_student(teacher: PreTrainedModel, shape: Shape) -> PreTrainedModel:
    """A student of a shape before it is made: what is copied is copied, the rest random.

    For what only needs to know the model: a checkpoint that fills it, an estimate without memory.

    Args:
        teacher: on any device, meta included.
        shape: of the student.

    Raises:
        UserError: a family that cannot be cut so.
    """
    if shape.intermediate_size is None and shape.hidden_size is None:
        return cut_layers(teacher, shape.layers)
    student = build(student_config(teacher, shape.layers, shape.intermediate_size, shape.hidden_size), teacher)
    if shape.hidden_size is None and teacher.device.type != "meta":
        copy_shared(student, teacher, shape.layers)
    return student.requires_grad_(True).train()


@torch.no_grad()
def copy_shared(student: PreTrainedModel, teacher: PreTrainedModel, kept: list[int]) -> None:
    """Copies everything but the FFNs; a student's layer gets the weights of the teacher's layer that it stands for.

    Raises:
        UserError: the student has something that the teacher has not, so it would start at random.
    """
    theirs = teacher.state_dict()
    ffns = ffn_names(student)
    for name, value in student.state_dict().items():
        if name.startswith(ffns):
            continue
        source = theirs.get(teacher_name(name, student, kept))
        if source is None or source.shape != value.shape:
            raise UserError(f"{KEY}: {type(student).__name__} has {name}, which the teacher cannot fill; leave it out")
        value.copy_(source)
    for layer in decoder_layers(student):
        router = router_of(ffn_of(layer))
        for parameter in router.parameters() if router is not None else ():
            parameter.zero_()  # of one expert: its gate is 1 whatever it says


def ffn_names(student: PreTrainedModel) -> tuple[str, ...]:
    """What the names of all weights in FFNs begin with."""
    names = {id(module): name for name, module in student.named_modules()}
    return tuple(f"{names[id(ffn_of(layer))]}." for layer in decoder_layers(student))


def teacher_name(name: str, student: PreTrainedModel, kept: list[int]) -> str:
    """The teacher's name of the weight that stands behind one of the student's."""
    stack = stack_name(student)
    if not name.startswith(f"{stack}."):
        return name
    index, rest = name.removeprefix(f"{stack}.").split(".", 1)
    return f"{stack}.{kept[int(index)]}.{rest}"


def stack_name(model: PreTrainedModel) -> str:
    """The name of the list of layers."""
    stack: nn.Module = decoder_layers(model)
    return next(name for name, module in model.named_modules() if module is stack)


def _dense(config: Any) -> PreTrainedConfig:
    """The configuration of the same model with dense FFNs."""
    twin = TWINS.get(config.model_type)
    if twin is not None:
        dense: Any = AutoConfig.for_model(twin)
        shared = {name: value for name, value in config.to_dict().items() if name not in TWIN_OWN}
        known = {name: value for name, value in shared.items() if hasattr(dense, name)}
        built: PreTrainedConfig = type(dense)(**known)
        return built
    if hasattr(config, "first_k_dense_replace"):
        config.first_k_dense_replace = config.num_hidden_layers
    elif hasattr(config, "mlp_only_layers"):
        config.mlp_only_layers = list(range(config.num_hidden_layers))
    else:
        names = [name for name in EXPERTS if hasattr(config, name)]
        if not names:
            raise UserError(f"{KEY}: {type(config).__name__} has no dense FFNs that are known here; leave the key out")
        config.num_experts_per_tok = 1
        for name in names:
            setattr(config, name, 1)
    return config
