"""Where the decoder layers of a model are; transformers has no name for them that all families share."""

from torch import nn
from transformers import PreTrainedModel

from distill.errors import UserError


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers: the first module list that is as long as the configuration says.

    Raises:
        UserError: the model has no such list.
    """
    depth = model.config.get_text_config().num_hidden_layers
    for module in model.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise UserError(
        f"model.teacher: {type(model).__name__} has no list of {depth} layers; routing losses cannot read it"
    )


def layer_stack(model: PreTrainedModel, key: str) -> nn.ModuleList:
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    stacks = [child for child in model.get_decoder().children() if isinstance(child, nn.ModuleList)]
    stacks = [stack for stack in stacks if len(stack) == count]
    if len(stacks) != 1:
        raise UserError(f"{key}: cannot find the layers of {type(model).__name__}; give a student by its config")
    return stacks[0]
