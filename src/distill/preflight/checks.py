"""What can be seen to be wrong before the first step: pure checks of tokenizer, batch, teacher and curriculum.

Each returns sentences that name what is suspicious and why; none means that nothing was found. A healthy run must pass
in silence, so only gross faults are named: a teacher that is worse than counting tokens, ids without logits, labels
that are not the next token.

Shapes: B rows, L positions, V ids.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.batch import IGNORE, Batch
from distill.curriculum import Schedule, value_at
from distill.data.datamodule import DistillationDataModule
from distill.models.blocks import moe_layers
from distill.models.precision import product_dtype, teacher_dtype
from distill.training.options import ModelOptions

FEW_ROWS = 8  # fewer to validate on by a fraction were hardly meant
AROUND = 3  # positions shown on either side of a place of interest
BARS = " ▁▂▃▄▅▆▇█"
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Vocabulary:
    """The ids of one side.

    Args:
        name: tokenizer, teacher or student.
        size: ids that it knows; of a model the rows of its head, padding included.
        special: `bos_token_id`, `eos_token_id` and `pad_token_id` as its configuration says, None where it does not.
    """

    name: str
    size: int
    special: Mapping[str, Any]

    def ids(self, key: str) -> list[int]:
        """A special token's ids; some configurations list several ends."""
        value = self.special.get(key)
        return [] if value is None else list(value) if isinstance(value, list | tuple) else [int(value)]


def special_ids(owner: object) -> dict[str, Any]:
    """The special ids that a tokenizer or a configuration names."""
    return {key: getattr(owner, key, None) for key in SPECIAL}


def vocabulary_findings(tokenizer: Vocabulary, models: Sequence[Vocabulary]) -> list[str]:
    """What does not fit between the ids of the text and those of the models."""
    found = []
    odd: dict[str, list[str]] = {}
    for model in models:
        if model.size < tokenizer.size:
            found.append(
                f"{model.name}: its head has {model.size:,} ids and the tokenizer {tokenizer.size:,}: they do not "
                "belong together"
            )
        for key in SPECIAL[:2]:  # which id pads does not matter, padding is masked
            own, theirs = tokenizer.ids(key), model.ids(key)
            if own and theirs and not set(own) & set(theirs):
                what = f"{key} is {theirs[0]} in the configuration and {own[0]} in the tokenizer"
                odd[what] = [*odd.get(what, []), model.name]
    for what, names in odd.items():
        found.append(f"{' and '.join(names)}: {what}: an exported student would not know where a text begins or ends")
    if not tokenizer.ids("eos_token_id"):
        found.append("tokenizer: it has no end-of-sequence id, so the student never learns to stop")
    return found


def batch_findings(batch: Batch, vocab_size: int) -> list[str]:
    """Whether labels, masks and positions of a batch say what the losses take them to say.

    Args:
        batch: what the datamodule's loader yields, on any device.
        vocab_size: ids of the smaller head.
    """
    tokens = batch.student.to("cpu")
    ids_BL, labels_BL, mask_BL = tokens.input_ids, tokens.labels, tokens.attention_mask
    starts_BL = (tokens.position_ids == 0) & (mask_BL == 1)
    target_BL = labels_BL != IGNORE
    found = []
    if bool((labels_BL[target_BL] != ids_BL[target_BL]).any()):
        found.append(
            "labels: some differ from the token at their own position: the losses shift them by one themselves"
        )
    if bool((target_BL & starts_BL).any()):
        found.append("labels: a document's first token has a label, which only the document before it could predict")
    if bool((target_BL & (mask_BL == 0)).any()):
        found.append("labels: padding has labels")
    valid = (target_BL[:, 1:]).nonzero()
    expected = (valid[:, 0] * ids_BL.shape[1] + valid[:, 1]).tolist()
    if tokens.positions.tolist() != expected:
        found.append("positions: they are not those whose next token has a label")
    if not expected:
        found.append("labels: no position has one, nothing would be learnt from this batch")
    highest = int(ids_BL.max())
    if highest >= vocab_size:
        found.append(f"tokens: id {highest} occurs, but a model has only {vocab_size:,} ids")
    return found


def alignment_rows(batch: Batch, tokenizer: Any, limit: int = 12) -> list[tuple[str, ...]]:
    """The first row of a batch, token by token: how it begins, where targets first begin and end, and documents.

    Returns:
        Rows of position, token, token to predict (empty = none), whether it counts, document and place within it; one
        of dots where positions are left out.
    """
    tokens = batch.student
    ids_L, labels_L, mask_L, places_L = (
        states_BL[0].tolist()
        for states_BL in (tokens.input_ids, tokens.labels, tokens.attention_mask, tokens.position_ids)
    )
    valid = {int(position) for position in tokens.positions.tolist() if position < len(ids_L)}
    document_L = np.cumsum([place == 0 for place in places_L]).tolist()
    later = range(1, len(ids_L))
    begins = next((t for t in later if t in valid and t - 1 not in valid), None)
    ends = next((t for t in later if t > (begins or 0) and t not in valid and t - 1 in valid), None)
    document = next((t for t in later if places_L[t] == 0), None)
    shown = set(range(min(limit, len(ids_L))))
    for place in (begins, ends, document):
        if place is not None:
            shown |= set(range(max(0, place - AROUND), min(len(ids_L), place + AROUND + 1)))
    rows: list[tuple[str, ...]] = []
    for t in sorted(shown):
        if t and t - 1 not in shown:
            rows.append(("...", "", "", "", ""))
        predicted = labels_L[t + 1] if t + 1 < len(ids_L) and labels_L[t + 1] != IGNORE else None
        rows.append(
            (
                str(t),
                f"{ids_L[t]} {tokenizer.decode([ids_L[t]])!r}",
                "" if predicted is None else f"{predicted} {tokenizer.decode([predicted])!r}",
                "yes" if t in valid else "no",
                f"{document_L[t]}:{places_L[t]}" if mask_L[t] else "padding",
            )
        )
    return rows


def unigram_nll(counted: Tensor, predicted: Tensor, vocab_size: int) -> float:
    """Nats per token of predicting each token by how often it occurs in other text, with one more count for each id.

    Args:
        counted: ids of the other text, one axis.
        predicted: ids to predict, one axis.
        vocab_size: V.
    """
    counts_V = torch.bincount(counted, minlength=vocab_size).double() + 1
    return float(-(counts_V / counts_V.sum()).log()[predicted].mean())


def teacher_findings(teacher_nll: float, unigram: float, vocab_size: int) -> list[str]:
    """Whether the teacher knows anything about this text.

    Args:
        teacher_nll: nats per token on validation text.
        unigram: nats per token of `unigram_nll` on the same tokens.
        vocab_size: V, to which an untrained model's perplexity is close.
    """
    if not math.isfinite(teacher_nll):
        return [
            f"teacher: its negative log-likelihood on the data is {teacher_nll}: its weights or precision are broken"
        ]
    if teacher_nll <= unigram:
        return []
    perplexity, counting = math.exp(min(teacher_nll, 700)), math.exp(unigram)
    cause = (
        "ids mean other tokens to it, or its weights are random"
        if perplexity > vocab_size / 4
        else "a chat template or a start token that it expects may be missing, or the text is of another kind"
    )
    return [
        f"teacher: its perplexity on the data is {perplexity:,.1f}, worse than counting tokens ({counting:,.1f}): "
        f"{cause}"
    ]


def schedule_findings(warmup_steps: int, horizon: int, learning_rate: float) -> list[str]:
    """Whether the learning rate gets anywhere."""
    found = []
    if warmup_steps >= horizon:
        found.append(f"model.warmup_steps: {warmup_steps} outlasts the run of {horizon} optimizer steps")
    if learning_rate > 0.05:
        found.append(f"model.learning_rate: {learning_rate} is far above what AdamW bears")
    return found


def precision_findings(precision: str, device: str) -> list[str]:
    """Whether a device multiplies in the trainer's precision.

    Args:
        precision: of the trainer.
        device: cpu, cuda, ...
    """
    name = precision.partition("-")[0]
    dtype = {"bf16": torch.bfloat16, "16": torch.float16}.get(name)
    if dtype is None or product_dtype(dtype, device) == dtype:
        return []
    return [
        f"trainer.precision: {precision}, but this CPU has no units for it: the student's layers run many times slower "
        "than with 32-true"
    ]


def gpu_findings(options: ModelOptions, precision: str, device: str, teacher: PreTrainedModel) -> list[str]:
    """Where a CUDA device works many times slower than it could.

    Args:
        options: of the run.
        precision: of the trainer.
        device: cpu, cuda, ...
        teacher: on any device, the meta device too.
    """
    if device != "cuda":
        return []
    found, whole = [], precision in ("32-true", "32")
    if whole and options.matmul_precision == "highest":
        found.append(
            f"trainer.precision: {precision} multiplies fp32 matrices, which a GPU does about ten times slower than "
            "bf16 ones: set bf16-mixed, or model.matmul_precision to high, which is TF32"
        )
    if precision == "16-mixed" and options.teacher_dtype == "auto":
        found.append(
            "trainer.precision: 16-mixed casts the head of the teacher, which stays in bf16, in every micro-batch: set "
            "bf16-mixed, or model.teacher_dtype to float16 for a teacher whose states stay below 65,504"
        )
    if precision in ("bf16-mixed", "16-mixed") and options.teacher_dtype == "float32":
        found.append(
            f"model.teacher_dtype: float32 under {precision} leaves the product with the teacher's head in the "
            "trainer's 16 bits, and its layers about ten times slower: set auto"
        )
    if moe_layers(teacher) and teacher_dtype(options.teacher_dtype, precision, device) != torch.bfloat16:
        found.append(
            "model.teacher_dtype: experts have grouped matrix products on GPUs in bf16 alone; in another dtype the "
            "host waits for the device in every MoE layer: set bfloat16"
        )
    return found


def held_out_findings(datamodule: DistillationDataModule) -> list[str]:
    """Whether a fraction has left enough rows to validate on, where nobody asked for fewer."""
    one = next((one for one in datamodule.validation_sets if one.share is not None), None)
    if one is None:
        return []
    rows, most = len(datamodule.held_out[one.name]), datamodule.max_validation_sequences
    if rows >= FEW_ROWS or (most is not None and rows >= most):
        return []
    every = f" of {rows + len(datamodule.train_rows)}" if datamodule.train_rows is not None else ""
    return [
        f"{one.key}: {one.share} leaves {rows} row{'s' * (rows > 1)}{every} to validate on, whose figures "
        "say little: give a larger fraction, or a file of its own"
    ]


def knots_of(schedules: Iterable[Schedule | None]) -> list[float]:
    """Progress at which any schedule bends, with start and end, ascending."""
    places = {0.0, 1.0}
    for schedule in schedules:
        if isinstance(schedule, list):
            places |= {float(knot[0]) for knot in schedule}
    return sorted(places)


def sparkline(schedule: Schedule, width: int = 20) -> str:
    """A schedule drawn in one line of `width` characters; empty ones are zero, full ones its highest value."""
    values = [value_at(schedule, i / (width - 1)) for i in range(width)]
    highest, top = max(*values, 1e-12), len(BARS) - 1
    return "".join(BARS[max(1, round(v / highest * top)) if v > 0 else 0] for v in values)
