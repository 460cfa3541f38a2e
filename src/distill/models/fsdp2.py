"""FSDP2 by one flag: `--trainer.strategy fsdp2` shards student, auxiliary modules and teacher over all devices.

Every parameter is at rest a shard; a layer is gathered when it runs and freed again, and the loss engine gathers the
head. Each rank reads the whole models into host memory before it keeps its part, and parameters are gathered in their
own dtype, fp32 for the student.
"""

from collections.abc import Iterable
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy, Strategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from distill.errors import UserError
from distill.models.layers import decoder_layers


@StrategyRegistry.register("fsdp2", description="student, auxiliary modules and teacher sharded over all devices")
class FSDP2(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy with data parallelism over every device and nothing else.

    Args:
        save_distributed_checkpoint: a checkpoint is a folder with a file for each rank, rather than one file.
        kwargs: of `ModelParallelStrategy`.
    """

    def __init__(self, save_distributed_checkpoint: bool = False, **kwargs: Any) -> None:
        super().__init__(save_distributed_checkpoint=save_distributed_checkpoint, **kwargs)

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()


def check_strategy(strategy: Strategy) -> None:
    """Refuses strategies that would train wrongly or not at all.

    Raises:
        UserError: FSDP1, DeepSpeed, or tensor parallelism.
    """
    name = type(strategy).__name__
    if name in ("FSDPStrategy", "DeepSpeedStrategy", "XLAFSDPStrategy"):
        raise UserError(f"trainer.strategy: {name} does not know the loss engine's sharded head; use fsdp2")
    if isinstance(strategy, ModelParallelStrategy) and strategy.device_mesh["tensor_parallel"].size() > 1:
        raise UserError(
            f"trainer.strategy: tensor_parallel_size {strategy.device_mesh['tensor_parallel'].size()} would train "
            "whole copies on part of the data; use fsdp2, which shards over all devices"
        )


def shard(
    strategy: ModelParallelStrategy,
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    auxiliaries: Iterable[nn.Module],
) -> None:
    """Shards both models, and what is trained beside the student."""
    mesh = strategy.device_mesh["data_parallel"]
    shard_model(teacher, mesh)
    shard_model(student, mesh)
    for auxiliary in auxiliaries:
        if any(True for _ in auxiliary.parameters()):
            fully_shard(auxiliary, mesh=mesh, reshard_after_forward=True)  # used through its forward, as one group


def shard_model(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Shards a causal language model, layer by layer, in place; tied weights stay tied."""
    decoder, embedding, head = model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embedding.weight
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(decoder, mesh=mesh, reshard_after_forward=True)
    _CAN_RECORD_REGISTRY[decoder] = decoder.can_record_outputs  # kept by class, and sharding has made it another
    if tied:
        head.weight = embedding.weight
    if not isinstance(head.weight, DTensor) or getattr(head, "bias", None) is not None:
        fully_shard(head, mesh=mesh)


def check_sharded(module: nn.Module) -> None:
    """Every trainable parameter must be sharded: another one would train unsynchronised, without an error."""
    whole = [name for name, p in module.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
    assert not whole, f"not sharded under FSDP2: {', '.join(whole)}"


def local_sum(parameter: Tensor) -> Tensor:
    """Sum of a parameter, of its shard here where it is sharded."""
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).sum()


def whole_norm(norm: Tensor) -> Tensor:
    """A norm over sharded gradients as a plain tensor."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
