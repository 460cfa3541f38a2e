"""FSDP2 by one flag: `--trainer.strategy fsdp2` shards student, auxiliary modules and teacher over all devices.

Every parameter is at rest a shard; a layer is gathered when it runs and freed again, and the loss engine gathers the
head. One rank reads the models and deals them out (`first_rank.py`). Under a mixed precision layers are gathered in its
16 bits, and so freed again behind the forward pass: autocast alone would keep a copy of each until the backward pass.
"""

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
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


def policy_of(precision: str) -> MixedPrecisionPolicy:
    """In what a student's layers are gathered and their gradients reduced, for a trainer's precision.

    Inputs and outputs of layers stay as autocast has them; gradients are summed in fp32.
    """
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    return MixedPrecisionPolicy(dtype, None if dtype is None else torch.float32, cast_forward_inputs=False)


def shard(
    mesh: DeviceMesh,
    teacher: PreTrainedModel | None,
    student: PreTrainedModel,
    auxiliaries: Iterable[nn.Module],
    policy: MixedPrecisionPolicy,
) -> None:
    """Shards both models, and what is trained beside the student.

    Args:
        mesh: of one dimension.
        teacher: frozen, gathered in its own dtype; None where there is none here.
        student: gathered as the policy says.
        auxiliaries: gathered in their own dtype.
        policy: see `policy_of`.
    """
    if teacher is not None:
        shard_model(teacher, mesh)
    shard_model(student, mesh, policy)
    for auxiliary in auxiliaries:
        if any(True for _ in auxiliary.parameters()):
            fully_shard(auxiliary, mesh=mesh, reshard_after_forward=True)  # used through its forward, as one group


def shard_model(
    model: PreTrainedModel,
    mesh: DeviceMesh,
    policy: MixedPrecisionPolicy = MixedPrecisionPolicy(),  # noqa: B008
) -> None:
    """Shards a causal language model, layer by layer, in place; tied weights stay tied."""
    decoder, embedding, head = model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embedding.weight
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
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
