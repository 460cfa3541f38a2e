"""How a model turns its last hidden state into logits, read from the model so that no loss has to call its forward.

A linear map is not the whole story: some families scale or soft-cap. What each family does is a row of a table here.
A new family with a new trick must be added; `check_lm_head` finds that out with one tiny forward pass.

Shapes: N tokens, D hidden width, V vocabulary.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial
from torch.nn.functional import linear
from transformers import PreTrainedModel

from distill.errors import UserError

_PART_BYTES = 16 << 20  # of a sum, where products must be widened afterwards

# (model type starts with, config entry, multiplies the logits or divides them)
_SCALES = (
    ("granite", "logits_scaling", "divides"),
    ("minicpm3", "logits_scaling", "divides"),
    ("hyperclovax", "logits_scaling", "multiplies"),
    ("cohere", "logit_scale", "multiplies"),
    ("falcon_h1", "lm_head_multiplier", "multiplies"),
    ("muse", "output_multiplier", "multiplies"),
)


@dataclass(frozen=True, eq=False)
class LMHead:
    """logits = softcap(scale * (hidden W^T + bias)).

    Args:
        weight: W, (V, D); the module's own parameter, so that gradients reach it. May be a DTensor.
        bias: (V) or None.
        scale: factor on the linear map.
        softcap: c in c tanh(. / c), or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def vocab_size(self) -> int:
        """V, padding included."""
        return self.weight.shape[0]

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits the plain way, (N, D) -> (N, V): for a few tokens only."""
        logits_NV = linear(hidden_ND, self.weight, self.bias) * self.scale
        return logits_NV if self.softcap is None else self.softcap * torch.tanh(logits_NV / self.softcap)

    def finish_(self, linear_NV: Tensor) -> Tensor:
        """Logits from hidden W^T, in place: bias, scale and soft-cap."""
        if self.bias is not None:
            linear_NV.add_(self.bias.detach())
        if self.scale != 1:
            linear_NV.mul_(self.scale)
        if self.softcap is not None:
            linear_NV.div_(self.softcap).tanh_().mul_(self.softcap)
        return linear_NV

    def whole(self) -> "LMHead":
        """The same head with its shards gathered; gradients return to the shards as the mean over ranks."""
        return LMHead(
            _gathered(self.weight), None if self.bias is None else _gathered(self.bias), self.scale, self.softcap
        )


@cache
def widens(device: str) -> bool:
    """Whether a type of device multiplies 16-bit matrices into fp32 ones; tried once, for not every build of torch can.

    A sum kept in 16 bits would lose what small gradients add.
    """
    if device != "cuda":
        return False
    total, ones = (torch.zeros(16, 16, device=device, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return True


def logits_dtype(compute: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of logits: CUDA widens 16-bit products on the fly, elsewhere they are rounded to `compute`."""
    return torch.float32 if compute.itemsize < 4 and widens(device.type) else compute


def mm_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out = left @ right, widened on the fly where the device can."""
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    elif widens(left.device.type):
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:
        out.copy_(torch.mm(left, right))


def addmm_into(total: Tensor, left: Tensor, right: Tensor, factor: float) -> None:
    """total += factor * left @ right, accumulated in the dtype of `total`."""
    if left.dtype == total.dtype:
        total.addmm_(left, right, alpha=factor)
    elif widens(left.device.type):
        torch.addmm(total, left, right, out_dtype=total.dtype, alpha=factor, out=total)
    else:  # in parts: product and widened product of the whole would be two more tensors as large as the head
        rows = max(1, _PART_BYTES // (right.shape[1] * total.element_size()))
        for start in range(0, len(total), rows):
            part = slice(start, start + rows)
            total[part].add_(torch.mm(left[part], right), alpha=factor)


def lm_head_of(model: PreTrainedModel) -> LMHead:
    """The output head of a causal LM as data.

    Args:
        model: any transformers causal LM with a linear output embedding.

    Raises:
        UserError: the model has no such head.
    """
    module = model.get_output_embeddings()
    if module is None or not isinstance(getattr(module, "weight", None), Tensor):
        raise UserError(f"model: {type(model).__name__} has no linear output head; name a causal language model")
    config = model.config.get_text_config(decoder=True)
    scale = 1.0
    for prefix, entry, effect in _SCALES:
        if config.model_type.startswith(prefix) and getattr(config, entry, None):
            scale = float(getattr(config, entry)) ** (1 if effect == "multiplies" else -1)
    softcap = getattr(config, "final_logit_softcapping", None)
    return LMHead(module.weight, getattr(module, "bias", None), scale, None if softcap is None else float(softcap))


def check_lm_head(model: PreTrainedModel, head: LMHead, tolerance: float = 2e-2) -> None:
    """Compares the head with the model's own logits on four tokens, one forward.

    Args:
        model: the model that `head` was read from.
        head: what `lm_head_of` returned.
        tolerance: allowed difference relative to the largest logit; bf16 products differ by about 1e-2.

    Raises:
        UserError: the model does something to its logits that `LMHead` does not know.
    """
    ids_1T = torch.arange(4, device=model.device)[None] % head.vocab_size
    training = model.training
    model.eval()  # dropout would make two forward passes differ
    with torch.no_grad():
        theirs_NV = model(input_ids=ids_1T, use_cache=False).logits[0].float()
        hidden_ND = model.get_decoder()(input_ids=ids_1T, use_cache=False).last_hidden_state[0]
        ours_NV = head.logits(hidden_ND).float()
    model.train(training)
    if theirs_NV.shape != ours_NV.shape or (theirs_NV - ours_NV).abs().max() > tolerance * theirs_NV.abs().max():
        raise UserError(
            f"model: {model.config.model_type} computes its logits in a way that distill does not know; "
            "add its scale to the table in distill/models/head.py"
        )


def _gathered(parameter: Tensor) -> Tensor:
    """A plain tensor, all-gathered if sharded; its gradient is averaged over the mesh and handed back as shards."""
    if not isinstance(parameter, DTensor):
        return parameter
    mesh = parameter.device_mesh
    # Gradients of ranks are summed on their way back; data parallelism means their mean, which is taken of the shards.
    scaled: DTensor = _ScaleGradient.apply(parameter, 1 / mesh.size())
    return scaled.full_tensor(grad_placements=[Partial()] * mesh.ndim)


class _ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by a constant."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, tensor: Tensor, factor: float) -> Tensor:
        ctx.factor = factor  # type: ignore[attr-defined]
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None  # type: ignore[attr-defined]
