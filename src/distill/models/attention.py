"""Attention over packed rows without a mask of B L^2 entries, and without asking the device whether rows are packed.

transformers derives a dense mask from position ids, for which the host waits once in every forward pass, and with which
no flash kernel runs. Here the batch says where documents begin. Its places go through the model to each layer, where
CUDA in 16 bits runs torch's kernel for sequences of many lengths, a CPU goes from document to document, and what
neither can do is masked, by a mask made on the device.

Shapes: B rows, L positions, H query heads, G key-value heads, d width of a head, T = B L.
"""

from collections.abc import Callable
from functools import cache
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from distill.batch import Documents, Tokens
from distill.errors import UserError

NAME = "distill_varlen"
KINDS = {"full_attention", "sliding_attention"}  # of layers


def attend(
    module: nn.Module,
    query_BHLd: Tensor,
    key_BGLd: Tensor,
    value_BGLd: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    documents: Documents | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within documents, [B, H, L, d] -> [B, L, H, d], under the interface of transformers.

    Args:
        module: the layer's.
        query_BHLd, key_BGLd, value_BGLd: after positions and norms.
        attention_mask: none.
        dropout: share of the weights set to 0.
        scaling: of the dot products; None = d^-1/2.
        sliding_window: positions that a token sees, itself included; None = all.
        documents: where they begin; None = each row is one.
        options: what the family hands over beyond that, unused; see `settle_attention`.
    """
    window = None if sliding_window is None or sliding_window >= query_BHLd.shape[2] else sliding_window
    if documents is not None and query_BHLd.device.type == "cpu" and window is None:
        return _one_by_one(module, query_BHLd, key_BGLd, value_BGLd, dropout, scaling, documents), None
    if documents is not None and dropout == 0 and (kernel := _kernel(query_BHLd, value_BGLd)) is not None:
        return _varlen(kernel, query_BHLd, key_BGLd, value_BGLd, scaling, window, documents), None
    mask = allowed(query_BHLd, documents, window)
    out, _ = sdpa_attention_forward(module, query_BHLd, key_BGLd, value_BGLd, mask, dropout, scaling, is_causal=True)
    return out, None


def allowed(query_BHLd: Tensor, documents: Documents | None, sliding_window: int | None) -> Tensor | None:
    """What a position may look at, bool, broadcasts to [B, 1, L, L]; None = every earlier position of its row."""
    length = query_BHLd.shape[2]
    window = None if sliding_window is None or sliding_window >= length else sliding_window
    if documents is not None:
        return documents.mask(len(query_BHLd), window)
    if window is None:
        return None
    places_L = torch.arange(length, device=query_BHLd.device)
    behind_LL = places_L[:, None] - places_L
    return ((behind_LL >= 0) & (behind_LL < window))[None, None]


def _one_by_one(
    module: nn.Module, query_BHLd: Tensor, key_BGLd: Tensor, value_BGLd: Tensor, dropout: float,
    scaling: float | None, documents: Documents,
) -> Tensor:  # fmt: skip
    length, starts = query_BHLd.shape[2], documents.starts.tolist()
    parts = []
    for first, last in pairwise(starts):
        row, place = first // length, slice(first % length, first % length + last - first)
        query, key, value = (states[row : row + 1, :, place] for states in (query_BHLd, key_BGLd, value_BGLd))
        parts.append(sdpa_attention_forward(module, query, key, value, None, dropout, scaling, is_causal=True)[0])
    return torch.cat(parts, dim=1).view(len(query_BHLd), length, *parts[0].shape[2:])


def _varlen(
    kernel: Callable[..., Any], query_BHLd: Tensor, key_BGLd: Tensor, value_BGLd: Tensor, scaling: float | None,
    window: int | None, documents: Documents,
) -> Tensor:  # fmt: skip
    dtype = _compute_dtype(query_BHLd)
    query_THd, key_TGd, value_TGd = (
        states.transpose(1, 2).flatten(0, 1).to(dtype) for states in (query_BHLd, key_BGLd, value_BGLd)
    )
    out_THd: Tensor = kernel(
        query_THd, key_TGd, value_TGd, documents.starts, documents.starts, documents.longest, documents.longest,
        scale=scaling, window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query_THd.shape[1] != key_TGd.shape[1],
    )  # fmt: skip
    return out_THd.unflatten(0, (len(query_BHLd), -1))


def _compute_dtype(states: Tensor) -> torch.dtype:
    """Of products: autocast knows torch's own attention but not this one."""
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


def _kernel(query_BHLd: Tensor, value_BGLd: Tensor) -> Callable[..., Any] | None:
    """torch's attention for sequences of many lengths, where it takes such states."""
    width = query_BHLd.shape[-1]
    fits = width == value_BGLd.shape[-1] <= 256 and width % 8 == 0
    if not query_BHLd.is_cuda or not fits or _compute_dtype(query_BHLd).itemsize != 2:
        return None
    return _varlen_attn() if torch.cuda.get_device_capability(query_BHLd.device) >= (8, 0) else None


@cache
def _varlen_attn() -> Callable[..., Any] | None:
    """None where this torch has none, or one without windows and grouped heads."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if {"window_size", "enable_gqa", "scale"} <= signature(varlen_attn).parameters.keys() else None


ALL_ATTENTION_FUNCTIONS.register(NAME, attend)  # and no mask: a name without one has transformers make none


def settle_attention(model: PreTrainedModel, wanted: str, device: str, key: str) -> None:
    """Gives a model the attention that a run asks for.

    Args:
        model: on the host, not sharded.
        wanted: auto = varlen on CUDA where the family allows it, else what transformers chose; varlen; or a name of
            transformers' own.
        device: cpu, cuda, ..., where the model will run.
        key: YAML key that error messages name.

    Raises:
        UserError: the family does not allow what was asked for.
    """
    if wanted == "auto" and device != "cuda":
        return
    if wanted not in ("auto", "varlen"):
        try:
            model.set_attn_implementation(wanted)
        except (ValueError, ImportError) as error:
            why = str(error).splitlines()[0]
            raise UserError(f"model.attn_implementation: {wanted} for {key} fails ({why}); set auto") from error
        return
    reason = _why_not(model)
    if reason is None:
        model.set_attn_implementation(NAME)
    elif wanted == "varlen":
        raise UserError(f"model.attn_implementation: varlen is nothing for {key}, since {reason}; set auto")


@torch.no_grad()
def _why_not(model: PreTrainedModel) -> str | None:
    """Why `attend` cannot take the place of a model's attention; None = it can, as tried on a few made-up tokens."""
    decoder, config = model.get_decoder(), model.config.get_text_config(decoder=True)
    before = decoder.config._attn_implementation
    if before != "sdpa":
        return f"it runs with {before} attention"
    kinds = getattr(config, "layer_types", None) or []
    if getattr(config, "attention_chunk_size", None) or set(kinds) - KINDS:
        return "it has layers of other kinds than full and sliding attention"
    tokens, training = _made_up(model), model.training
    options = {"position_ids": tokens.position_ids, "use_cache": False}
    windows: dict[int, int | None] = {}

    def noting(module: nn.Module, *states: Any, **options: Any) -> Any:
        if options.get("documents") is not None and not options.keys() & {"position_bias", "s_aux", "softcap"}:
            windows[getattr(module, "layer_idx", -1)] = options.get("sliding_window")
        return attend(module, *states, **options)

    model.eval()
    expected_BLD = decoder(input_ids=tokens.input_ids, **options).last_hidden_state.float()
    model.set_attn_implementation(NAME)
    ALL_ATTENTION_FUNCTIONS[NAME] = noting
    try:
        found = decoder(input_ids=tokens.input_ids, documents=tokens.documents, **options)
    except TypeError:
        return "it takes no more than it knows"
    finally:
        del ALL_ATTENTION_FUNCTIONS[NAME]
        model.set_attn_implementation(before)
        model.train(training)
    window = getattr(config, "sliding_window", None)
    slides = [kind == "sliding_attention" for kind in kinds] or [window is not None] * config.num_hidden_layers
    if windows != {layer: window if slide else None for layer, slide in enumerate(slides)}:
        return "its attention is not all plain, causal and through transformers' interface"
    tolerance = 3e-2 if model.dtype.itemsize < 4 else 1e-4
    if (found.last_hidden_state.float() - expected_BLD).norm() > tolerance * expected_BLD.norm():
        return "its states come out otherwise"
    return None


def _made_up(model: PreTrainedModel) -> Tokens:
    """Two rows of two documents each."""
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    ids_BL = torch.arange(24, device=model.device).remainder(vocab_size).view(2, 12)
    position_ids_BL = torch.cat([torch.arange(n, device=model.device) for n in (5, 7, 3, 9)]).view(2, 12)
    return Tokens(ids_BL, ids_BL, torch.ones_like(ids_BL), position_ids_BL, ids_BL[0, :-1], packed=True)
