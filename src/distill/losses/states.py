"""Hidden states as losses on them read them: normalised, and in a precision that a mean over tokens needs."""

from torch import Tensor, nn
from torch.nn import functional as F

from distill.models.precision import full_precision


def apply(head: nn.Module, states_ND: Tensor) -> Tensor:
    """A probe or projection of normalised states, which are in fp32 even where the heads are in half precision."""
    output: Tensor = head(states_ND.to(next(head.parameters()).dtype))
    return output


def normalise(x: Tensor) -> Tensor:
    """Layer norm without affine over the last dimension, in fp32 or wider.

    The epsilon is far below any real variance: a target's size must not depend on the teacher's scale.
    """
    x = full_precision(x)
    return F.layer_norm(x, x.shape[-1:], eps=1e-20)
