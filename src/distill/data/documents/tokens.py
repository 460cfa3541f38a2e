"""Rows that are tokenised already: which of their ids are text, where documents begin, and which are targets.

Honoured are the columns of TRL, transformers and axolotl, see docs/data.md: a row may be padded on either side, and may
hold several documents that are told apart by their positions, by their lengths or by numbers in the attention mask.

Letters: T tokens of one row.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from distill.batch import IGNORE
from distill.data.documents.forms import COUNTING, nested
from distill.errors import DocumentError


def tokens_of(row: dict[str, Any], known: int, completion_only_loss: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids and labels, int32, of each document of a row.

    Args:
        row: input_ids and what is said of them; null is the same as missing.
        known: ids of the tokenizer.
        completion_only_loss: whether completion_mask and assistant_masks choose the targets.

    Raises:
        DocumentError: columns disagree in length, or hold what they cannot hold.
    """
    ids_T = _numbers("input_ids", row.get("input_ids"))
    if ids_T is None or not len(ids_T):
        return []
    columns = {name: _numbers(name, value) for name, value in row.items() if name not in ("input_ids", "seq_lengths")}
    for name, values_T in columns.items():
        if values_T is not None and len(values_T) != len(ids_T):
            raise DocumentError(
                f"{len(ids_T)} input_ids and {len(values_T)} {name}",
                f"give one label per token, {IGNORE} where it is no target"
                if name == "labels"
                else "give one per token",
            )
    labels_T = _labels(ids_T, columns, completion_only_loss)
    _check_ids(ids_T, labels_T, known)
    starts_T = _starts(columns, _numbers("seq_lengths", row.get("seq_lengths")), len(ids_T))
    mask_T = columns.get("attention_mask")
    text_T = np.ones(len(ids_T), dtype=bool) if mask_T is None else mask_T > 0
    documents = []
    for here in np.split(np.arange(len(ids_T)), np.flatnonzero(starts_T)[1:]):
        here = here[text_T[here]]
        if len(here):
            documents.append((ids_T[here].astype(np.int32), labels_T[here].astype(np.int32)))
    return documents


def _numbers(name: str, value: Any) -> np.ndarray | None:
    """A column's numbers, int64 [T]."""
    if value is None:
        return None
    given = nested(value, list) if isinstance(value, str) else value
    if not isinstance(given, Sequence | np.ndarray) or not all(isinstance(n, int | np.integer) for n in given):
        raise DocumentError(f"its {name} are no list of numbers", "repair or remove it")
    return np.asarray(given, dtype=np.int64)


def _labels(ids_T: np.ndarray, columns: dict[str, np.ndarray | None], completion_only_loss: bool) -> np.ndarray:
    """The ids where they are targets by all that is said, else IGNORE."""
    given_T = columns.get("labels")
    labels_T = (ids_T if given_T is None else given_T).copy()
    chosen = COUNTING - {"labels"} if completion_only_loss else {"loss_mask"}
    for name in chosen:
        if (mask_T := columns.get(name)) is not None:
            if not np.isin(mask_T, (0, 1)).all():
                raise DocumentError(f"its {name} holds other numbers than 0 and 1", "repair or remove it")
            labels_T[mask_T == 0] = IGNORE
    return labels_T


def _starts(columns: dict[str, np.ndarray | None], lengths: np.ndarray | None, size: int) -> np.ndarray:
    """Where documents begin, bool [T]."""
    starts_T = np.zeros(size, dtype=bool)
    starts_T[0] = True
    mask_T, positions_T = columns.get("attention_mask"), columns.get("position_ids")
    if lengths is not None:
        if (lengths < 1).any() or lengths.sum() > size:
            raise DocumentError(f"its seq_lengths add up to {lengths.sum()} of {size} input_ids", "repair or remove it")
        ends = np.cumsum(lengths)
        starts_T[ends[ends < size]] = True
    if mask_T is not None:
        if (mask_T < 0).any():
            raise DocumentError("its attention_mask holds numbers below 0", "repair or remove it")
        starts_T[1:] |= (mask_T[1:] != mask_T[:-1]) & (mask_T[1:] > 0) & (mask_T[:-1] > 0)
    if positions_T is not None:
        text_T = np.ones(size, dtype=bool) if mask_T is None else mask_T > 0
        both_T = text_T[1:] & text_T[:-1]
        starts_T[1:] |= both_T & (positions_T[1:] != positions_T[:-1] + 1)
    return starts_T


def _check_ids(ids_T: np.ndarray, labels_T: np.ndarray, known: int) -> None:
    wrong = [
        *ids_T[(ids_T < 0) | (ids_T >= known)],
        *labels_T[(labels_T >= known) | ((labels_T < 0) & (labels_T != IGNORE))],
    ]
    if wrong:
        raise DocumentError(
            f"the id {wrong[0]} is none of the tokenizer's {known}", "tokenise with the teacher's tokenizer"
        )
