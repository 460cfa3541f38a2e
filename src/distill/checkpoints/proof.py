"""Logits of one row, kept in every checkpoint, by which a student that is loaded again proves to be the one of the run.

Merging adapters, tying weights and rebuilding a configuration can each give a model that loads without a word and is
another one. The row is the first of the run's validation rows, since what a run has learned shows on its own tokens. A
checkpoint holds 16 token ids of it and a few kilobytes of logits, and costs one forward pass of 16 tokens.

Letters: T tokens, K ids of the vocabulary.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import lightning as L
import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.errors import UserError
from distill.models.head import lm_head_of
from distill.models.precision import full_precision, whole_products

LENGTH = 16  # tokens of the row
SPREAD = 48  # ids evenly over the vocabulary, beside the row's own
# Largest root mean square difference, as a share of the logits' own spread: rounding in that dtype, not another model.
ALLOWED = {"float64": 1e-6, "float32": 1e-3, "bfloat16": 0.1, "float16": 0.1}


def proof_row(data: L.LightningDataModule | None) -> list[int]:
    """The first tokens of a datamodule's first validation row; none where there is no such row."""
    rows = getattr(data, "validation_rows", None)
    return rows[0]["input_ids"][:LENGTH].tolist() if rows else []


def proof(student: PreTrainedModel, row: list[int]) -> dict[str, Any]:
    """What `prove` compares with.

    Collective where the student is sharded. Neither modes nor random numbers are changed.

    Args:
        student: as it is trained, on its device.
        row: token ids; empty = ids from all over the vocabulary.

    Returns:
        `input_ids` (T), `vocabulary` (K), `logits` [T, K + 1], whose last column is the log-sum-exp over all ids, and
        the name of the weights' `dtype`.
    """
    with torch.no_grad():
        head = lm_head_of(student).whole()
    spread = torch.linspace(0, head.vocab_size - 1, SPREAD, dtype=torch.float64).long().tolist()
    ids = row or spread[:LENGTH]
    chosen = sorted({*spread, *ids})
    decoder = student.get_decoder()
    modes = [(module, module.training) for module in student.modules()]
    ids_1T = torch.tensor([ids], device=head.weight.device)
    compiled = getattr(decoder, "_compiled_call_impl", None) is not None
    # Another length of rows would make a compiled decoder compile anew, and its steps would round otherwise.
    stance = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    try:
        student.eval()
        with torch.no_grad(), whole_products(), torch.autocast(ids_1T.device.type, enabled=False), stance:
            seen = decoder(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T), use_cache=False)
            logits = _figures(head.logits(seen.last_hidden_state[0]), chosen)
    finally:
        for module, training in modes:
            module.training = training
    return {"input_ids": ids, "vocabulary": chosen, "logits": logits, "dtype": _name(head.weight.dtype)}


@torch.no_grad()
def prove(model: PreTrainedModel, expected: Mapping[str, Any], key: str = "student") -> None:
    """Compares a plain model with what the run's own student said to the same row.

    Args:
        model: in eval mode, in any dtype.
        expected: what `proof` returned.
        key: what error messages call the model.

    Raises:
        UserError: its logits are others, or not finite.
    """
    ids_1T = torch.tensor([expected["input_ids"]], device=model.device)
    with whole_products():  # as `proof` has them, whatever `matmul_precision` the run was given
        logits_TV = model(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T), use_cache=False).logits[0]
    found = _figures(logits_TV, expected["vocabulary"]).double()
    theirs = expected["logits"].double()
    if not found.isfinite().all():
        remedy = "give --dtype bfloat16 or float32" if theirs.isfinite().all() else "take an earlier checkpoint"
        raise UserError(f"{key}: its logits are not finite in {_name(model.dtype)}; {remedy}")
    spread = (theirs - theirs.mean(-1, keepdim=True)).square().mean().sqrt()
    difference = float((found - theirs).square().mean().sqrt() / spread.clamp(min=1e-12))
    allowed = max(ALLOWED[_name(model.dtype)], ALLOWED[expected["dtype"]])
    if not difference <= allowed:
        raise UserError(
            f"{key}: loaded again, it is another model than the one that was trained (its logits on a row of the run "
            f"differ by {difference:.2g} of their spread, {allowed:g} allowed); load it with the versions in the run's "
            "environment.yaml"
        )


def _figures(logits_TV: Tensor, chosen: list[int]) -> Tensor:
    """Logits of the chosen ids and the log-sum-exp of all, [T, K + 1], on the CPU."""
    wide_TV = full_precision(logits_TV)
    return torch.cat([wide_TV[:, chosen], wide_TV.logsumexp(-1, keepdim=True)], -1).cpu()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
