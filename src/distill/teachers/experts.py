"""The teacher's experts, read where its own forward pass has already been: hooks, never a second pass.

Two views with the same methods. `MoeView` finds `experts` and their router by structure and calls the family's own code
for anything beyond the captured routing, so biased, transposed or interleaved weights need no adapter. `DenseView`
takes the input of an FFN's last matrix, the neurons, and cuts it into E contiguous slices whose outputs add up to the
FFN's output. What was guessed from the structure (which function of the logits the gate is, that the last matrix is the
FFN's last act) is checked on a few made-up tokens when the view is built; a family that fails is refused by name.
What the hooks keep lives until the losses are done: D + E numbers a token for a MoE layer, I for a dense one.

Shapes: T rows of the batch (B * L, padding included), N chosen rows, D teacher width, E experts, K experts per token,
I FFN neurons.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from distill.models.precision import full_precision

Capture = dict[str, Tensor]  # what the hooks of one layer kept, detached
CHUNK_BYTES = 32 * 2**20  # of one block of expert outputs [E, n, D]
CHUNK_BYTES_ELSEWHERE = 512 * 2**20  # on an accelerator, where a small block does not keep the device busy


@dataclass
class Routed:
    """Where a layer's tokens went.

    Args:
        gates_NE: the teacher's gate over all experts, rows sum to 1.
        index_NK: chosen experts.
        mixture_ND: their gate-weighted sum; None where it was not asked for.
        gap_NK: the student's error on each chosen expert, for the valid tokens that were looked at; None for none.
    """

    gates_NE: Tensor
    index_NK: Tensor
    mixture_ND: Tensor | None = None
    gap_NK: Tensor | None = None


def flat(x: Tensor) -> Tensor:
    """Detached, one row per token."""
    return x.detach().flatten(0, -2)


def chunks(num_rows: int, row_bytes: int, device: torch.device) -> Iterator[slice]:
    """Slices of rows that stay within the bytes that a block may take on a device."""
    step = max(1, (CHUNK_BYTES if device.type == "cpu" else CHUNK_BYTES_ELSEWHERE) // row_bytes)
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))


@dataclass(eq=False)
class MoeView:
    """The experts of one MoE block.

    Args:
        layer: 0-based layer index.
        router: module that returns (logits [T, E], weights [T, K], indices [T, K]) and has `top_k`.
        experts: module called with (states [T, D], indices [T, K], weights [T, K]).
        sigmoid: the gate is sigmoid scores over their sum (DeepSeek) rather than a softmax.
    """

    layer: int
    router: nn.Module
    experts: nn.Module
    num_experts: int
    native_k: int
    width: int
    sigmoid: bool

    def hooks(self, capture: Capture) -> list[RemovableHandle]:
        """Handles of the hooks that fill `capture` during the teacher's forward pass."""

        def after_router(module: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
            capture["router_input_TD"] = flat(args[0])
            for name, value in zip(("logits_TE", "weights_TK", "index_TK"), output[:3], strict=True):
                capture[name] = flat(value)

        def after_experts(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            capture["input_TD"], capture["mixture_TD"] = flat(args[0]), flat(output)

        return [
            self.router.register_forward_hook(after_router),
            self.experts.register_forward_hook(after_experts),
        ]

    def gates(self, capture: Capture, rows_N: Tensor) -> Tensor:
        """The teacher's gate over all experts [N, E], without any selection bias."""
        return gate_of_logits(capture["logits_TE"].index_select(0, rows_N), self.sigmoid)

    @torch.no_grad()
    def route(self, capture: Capture, rows_N: Tensor, k: int, mixture: bool) -> Routed:
        """The teacher's own routing with k experts per token.

        At the k of the recorded forward pass, the native one unless `teacher_top_k` says otherwise, these are the
        captured weights and the captured sum of the outputs, bit for bit, and cost nothing. Any other k runs the
        family's own selection again with that k on the same states, and its experts on the rows asked for.
        """
        gates_NE = self.gates(capture, rows_N)
        if k == capture["index_TK"].shape[-1]:
            kept = capture["mixture_TD"].index_select(0, rows_N) if mixture else None
            return Routed(gates_NE, capture["index_TK"].index_select(0, rows_N), kept)
        _, weights_NK, index_NK = call_router(self.router, capture["router_input_TD"].index_select(0, rows_N), k)
        if not mixture:
            return Routed(gates_NE, index_NK)
        input_ND, experts = capture["input_TD"].index_select(0, rows_N), self.whole().experts
        mixture_ND = torch.empty_like(input_ND)
        for part in chunks(len(rows_N), k * self.width * input_ND.element_size(), rows_N.device):
            mixture_ND[part] = experts(input_ND[part], index_NK[part], weights_NK[part])
        return Routed(gates_NE, index_NK, mixture_ND)

    def whole(self) -> "MoeView":
        """The same view with its experts' shards gathered. All ranks must call it equally often: it communicates."""
        return replace(self, experts=unsharded(self.experts))

    @torch.no_grad()
    def outputs(self, capture: Capture, rows_N: Tensor) -> Tensor:
        """Output of every expert [E, N, D], by the family's own code on E copies of the rows, one expert each.

        Of a whole view.
        """
        input_ND = capture["input_TD"].index_select(0, rows_N)
        copies = input_ND.expand(self.num_experts, *input_ND.shape).reshape(-1, self.width)
        index = torch.arange(self.num_experts, device=rows_N.device).repeat_interleave(len(rows_N))[:, None]
        ones = torch.ones(len(copies), 1, dtype=capture["weights_TK"].dtype, device=rows_N.device)
        output: Tensor = self.experts(copies, index, ones)
        return output.view(self.num_experts, len(rows_N), self.width)

    def log_share(self, gates_NE: Tensor) -> Tensor:
        """Log of the weight [N, E] of an expert in the teacher's own mixture, up to a constant per token."""
        return gates_NE.log()


@dataclass(eq=False)
class DenseView:
    """E contiguous slices of a dense FFN's neurons as experts [MoEfication, arXiv 2110.01786].

    A slice's output is its neurons times its rows of the last matrix (a bias is shared out equally), so the slices add
    up to the FFN's output exactly. The gate is the slice's share of the summed squared output norms: a weak signal. On
    SmolLM2-135M with 8 slices it differs from its own mean by only 0.06-0.11 nats a token.

    Args:
        layer: 0-based layer index.
        down: the FFN's last matrix, `nn.Linear` or GPT-2's `Conv1D`.
        num_experts: number of slices; divides the number of neurons.
        native_k: slices per token where no schedule says more.
    """

    layer: int
    down: nn.Module
    num_experts: int
    native_k: int
    width: int

    def hooks(self, capture: Capture) -> list[RemovableHandle]:
        """Handles of the hooks that fill `capture` during the teacher's forward pass."""

        def before_down(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            capture["neurons_TI"] = flat(args[0])

        return [self.down.register_forward_pre_hook(before_down)]

    def gates(self, capture: Capture, rows_N: Tensor) -> Tensor:
        """Share [N, E] of each slice in the summed squared output norms."""
        return self.route(capture, rows_N, self.native_k, mixture=False).gates_NE

    @torch.no_grad()
    def route(self, capture: Capture, rows_N: Tensor, k: int, mixture: bool) -> Routed:
        """The k slices with the largest gates and the plain sum of their outputs."""
        view, row_bytes = self.whole(), self.num_experts * self.width * capture["neurons_TI"].element_size()
        parts = [
            view._route(capture, rows_N[part], k, mixture) for part in chunks(len(rows_N), row_bytes, rows_N.device)
        ] or [view._route(capture, rows_N, k, mixture)]
        sums = [part.mixture_ND for part in parts if part.mixture_ND is not None]
        return Routed(
            torch.cat([part.gates_NE for part in parts]),
            torch.cat([part.index_NK for part in parts]),
            torch.cat(sums) if sums else None,
        )

    def _route(self, capture: Capture, rows_N: Tensor, k: int, mixture: bool) -> Routed:
        outputs_END = self.outputs(capture, rows_N)
        gates_NE = norm_share(outputs_END)
        index_NK = gates_NE.topk(k).indices
        return Routed(gates_NE, index_NK, mix(outputs_END, index_NK) if mixture else None)

    def whole(self) -> "DenseView":
        """The same view with its matrix's shards gathered. All ranks must call it equally often: it communicates."""
        return replace(self, down=unsharded(self.down))

    @torch.no_grad()
    def outputs(self, capture: Capture, rows_N: Tensor) -> Tensor:
        """Output of every slice [E, N, D]; of a whole view."""
        neurons_NI = capture["neurons_TI"].index_select(0, rows_N)
        neurons_ENi = neurons_NI.unflatten(1, (self.num_experts, -1)).transpose(0, 1)
        down: Any = self.down
        weight_ID = down.weight if isinstance(down, Conv1D) else down.weight.T
        weight_EiD = weight_ID.unflatten(0, (self.num_experts, -1))
        if down.bias is None:
            return torch.bmm(neurons_ENi, weight_EiD)
        bias_END = (down.bias / self.num_experts).expand(self.num_experts, 1, self.width)
        return torch.baddbmm(bias_END, neurons_ENi, weight_EiD)

    def log_share(self, gates_NE: Tensor) -> Tensor:
        """Log of the weight [N, E] of a slice in the teacher's own mixture: a plain sum, so the same for all."""
        return torch.zeros_like(gates_NE)


View = MoeView | DenseView


def gate_of_logits(logits_NE: Tensor, sigmoid: bool) -> Tensor:
    """Gate [N, E] over all experts: softmax of the router's logits, or sigmoid scores over their sum."""
    logits_NE = full_precision(logits_NE)
    if not sigmoid:
        return logits_NE.softmax(-1)
    scores_NE = logits_NE.sigmoid()
    return scores_NE / scores_NE.sum(-1, keepdim=True)


def norm_share(outputs_END: Tensor) -> Tensor:
    """Each expert's share [N, E] of the summed squared output norms; equal shares where all outputs are zero."""
    norms_NE = torch.linalg.vector_norm(full_precision(outputs_END), dim=-1).square().T
    tiny = torch.finfo(norms_NE.dtype).tiny
    return (norms_NE + tiny) / (norms_NE + tiny).sum(-1, keepdim=True)


def mix(outputs_END: Tensor, index_NK: Tensor, weights_NK: Tensor | None = None) -> Tensor:
    """Weighted sum [N, D] of each token's chosen experts; without weights the plain sum."""
    chosen_KND = outputs_END.take_along_dim(index_NK.T[:, :, None], dim=0)
    if weights_NK is not None:
        chosen_KND = chosen_KND * weights_NK.T[:, :, None].to(chosen_KND.dtype)
    return chosen_KND.sum(0)


def unsharded(module: nn.Module) -> Any:
    """The module with whole parameters: itself, or under FSDP2 a shallow copy that has gathered its own."""
    if not any(isinstance(parameter, DTensor) for parameter in module.parameters(recurse=False)):
        return module
    whole = copy.copy(module)
    whole._parameters = {
        name: parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        for name, parameter in module._parameters.items()
    }
    return whole


def call_router(router: nn.Module, input_ND: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, weights, indices) of the family's own selection with k experts; the router itself is left alone."""
    other = copy.copy(unsharded(router))
    other.top_k = k
    logits_NE, weights_NK, index_NK = type(router).forward(other, input_ND)[:3]
    return logits_NE, weights_NK, index_NK
