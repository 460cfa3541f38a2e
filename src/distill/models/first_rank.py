"""Models that the first rank alone reads and checks, and that come to the others without their weights.

Under FSDP2 every rank keeps a share of each weight, so none but the first needs the whole: the others get the models as
they are but for their parameters, which have shapes and no memory, and all are sharded in that form. Then the first
rank deals each weight out in shares and lets go of it.
"""

import pickle
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from distill.errors import UserError

Made = TypeVar("Made")
PATIENCE = timedelta(hours=12)  # of the ranks that wait while the first one reads


def made_by_first_rank(
    make: Callable[[], Made], models: Callable[[Made], Sequence[nn.Module]]
) -> tuple[Made, list[Tensor]]:
    """What `make` returns on the first rank, on all ranks; the parameters of its models are on the meta device.

    A sentence that the first rank refuses something with reaches all of them, as does the state of torch's random
    numbers. Collective.

    Args:
        make: called on the first rank alone; its result must be picklable, of classes that every rank can import.
        models: of the result, whose parameters are many; what else it holds is sent as it is.

    Returns:
        The result, and on the first rank the weights of its models, each of them once, in the models' order.
    """
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    sent: list[Any] = [None]
    made: Made | None = None
    weights: list[Tensor] = []
    if dist.get_rank() == 0:
        try:
            made = make()
            weights = [weight for model in models(made) for weight in _emptied(model)]
            sent = [(pickle.dumps(made), torch.get_rng_state())]
        except UserError as error:
            sent = [error]
    dist.broadcast_object_list(sent, src=0, group=group)
    dist.destroy_process_group(group)
    if isinstance(sent[0], UserError):
        raise sent[0]
    content, random_state = sent[0]
    if made is None:
        made = pickle.loads(content)
        torch.set_rng_state(random_state)
    assert made is not None
    return made, weights


def deal_out(models: Sequence[nn.Module], weights: list[Tensor], mesh: DeviceMesh, device: torch.device) -> None:
    """Gives the parameters of sharded models memory on a device, and their shares of the first rank's weights.

    Args:
        models: those of `made_by_first_rank`, sharded over the mesh.
        weights: of the first rank; let go of one after the other.
        mesh: of one dimension.
        device: of this rank.
    """
    weights.reverse()
    for model in models:
        for empty in _unique(model):
            assert isinstance(empty, DTensor)
            filled = nn.Parameter(torch.empty_like(empty, device=device), requires_grad=empty.requires_grad)
            _receive(filled, weights.pop() if weights else None, mesh)
            for module in model.modules():
                for name, parameter in module._parameters.items():
                    if parameter is empty:
                        module._parameters[name] = filled


def _emptied(model: nn.Module) -> Iterator[Tensor]:
    """The weights of a model, each once; in their places stand parameters without memory, tied where these were."""
    for parameter in _unique(model):
        yield parameter.data
        empty = nn.Parameter(parameter.data.to("meta"), requires_grad=parameter.requires_grad)
        for module in model.modules():
            for name, other in module._parameters.items():
                if other is parameter:
                    module._parameters[name] = empty


def _unique(model: nn.Module) -> list[nn.Parameter]:
    return list(model.parameters())  # which names shared ones once


def _receive(parameter: Any, whole: Tensor | None, mesh: DeviceMesh) -> None:
    """This rank's share of rows; all shares travel with the number of rows of the largest."""
    here = parameter.to_local().detach()
    ranks = mesh.size()
    rows = -(-parameter.shape[0] // ranks)
    share = here.new_zeros(rows, *parameter.shape[1:])
    shares: list[Tensor] | None = None
    if dist.get_rank() == 0:
        assert whole is not None
        shares = []
        for part in whole.split(rows):
            padded = torch.zeros_like(share)
            padded[: len(part)] = part
            shares.append(padded)
        shares += [torch.zeros_like(share) for _ in range(ranks - len(shares))]
    dist.scatter(share, shares, src=0, group=mesh.get_group())
    with torch.no_grad():
        here.copy_(share[: len(here)])
