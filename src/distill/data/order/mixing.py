"""Several sources in one run: which there are, and how many rows of each an epoch has.

Weights are shares of rows. Packed rows are as good as full, so there they are shares of tokens; without packing they
are shares of sequences. An epoch has exactly those shares: as many rows as the scarcest source allows. The others go on
in the next epoch where they stopped, so that every row of a source comes once before any comes again, but one epoch
does not see all of their rows.

Letters: R rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distill.errors import UserError


def quotas(rows: Sequence[int], weights: Sequence[float], limit: int | None = None) -> list[int]:
    """Rows of each source in one epoch, in the shares of the weights.

    Args:
        rows: that each source has.
        weights: positive, in any unit.
        limit: of all sources together.

    Example:
        >>> quotas([100, 1000], [1, 3])
        [100, 300]
    """
    shares = [weight / sum(weights) for weight in weights]
    total = min(count / share for count, share in zip(rows, shares, strict=True))
    total = min(total, limit or total)
    return [max(1, min(count, int(total * share + 1e-9))) for count, share in zip(rows, shares, strict=True)]


def draw(rows: Sequence[int], taken: Sequence[int], seed: int, epoch: int) -> np.ndarray:
    """Rows of one epoch in a random order, int64; each source goes on where its epoch before stopped.

    Args:
        rows: that each source has, one source behind the other.
        taken: rows of each source per epoch.
        seed: with `epoch`, all that the result depends on.
        epoch: from 0.
    """
    chosen, first = [], 0
    for source, (count, quota) in enumerate(zip(rows, taken, strict=True)):
        at, end = epoch * quota, (epoch + 1) * quota
        while at < end:
            passes, start = divmod(at, count)
            order_R = np.random.default_rng([seed, passes, source + 1]).permutation(count)
            chosen.append(first + order_R[start : start + end - at])
            at += len(chosen[-1])
        first += count
    rows_R = np.concatenate(chosen)
    return rows_R[np.random.default_rng([seed, epoch]).permutation(len(rows_R))]


@dataclass(frozen=True)
class Split:
    """Which rows a run has, all sources behind each other.

    Args:
        train: rows to train on, int64.
        validation: rows held out, or rows of the tables that are for validation alone, int64.
        parts: rows of each source in `train`, and how many of them an epoch has; None = one source, or no weights.
    """

    train: np.ndarray
    validation: np.ndarray
    parts: tuple[list[int], list[int]] | None


def split_rows(
    rows: Sequence[int],
    held_out: Sequence[int] | float,
    weights: Sequence[float] | None,
    seed: int,
    limits: tuple[int | None, int | None] = (None, None),
    key: str = "data.validation_split",
) -> Split:
    """Training and validation rows, chosen by `seed` within each source before the sources are mixed.

    Args:
        rows: that each source has; one source where there are no weights.
        held_out: share of them for validation, or the rows of each source that are for validation alone.
        weights: of the sources; None = all rows.
        seed: of the choice.
        limits: most rows to train on and to validate on.
        key: YAML key of `held_out`.

    Raises:
        UserError: a source has no rows left to train on.
    """
    generator = np.random.default_rng(seed)
    train, validation = [], []
    for source, count in enumerate(rows):
        order_R = generator.permutation(count)
        if isinstance(held_out, float):
            last = max(1, round(count * held_out))
            order_R, kept_R = order_R[last:], order_R[:last]
        else:
            kept_R = generator.permutation(held_out[source]) if source < len(held_out) else order_R[:0]
        if not len(order_R):
            raise UserError(
                f"{key}: {held_out} of {count} rows leaves none to train on and to validate on; give "
                "more text or a smaller data.sequence_length"
            )
        train.append(order_R)
        validation.append(kept_R)
    parts = None
    if weights is None:
        train = [kept[: limits[0]] for kept in train]
    else:
        taken = quotas([len(kept) for kept in train], weights, limits[0])
        if limits[0] is not None:
            train = [kept[:quota] for kept, quota in zip(train, taken, strict=True)]
        parts = ([len(kept) for kept in train], taken)
    if weights is not None and all(len(kept) for kept in validation):
        taken = quotas([len(kept) for kept in validation], weights, limits[1])
        validation = [kept[:quota] for kept, quota in zip(validation, taken, strict=True)]
    else:
        validation = [kept[: limits[1]] for kept in validation]
    sizes = rows if isinstance(held_out, float) else held_out
    return Split(_behind(train, rows), _behind(validation, sizes), parts)


def _behind(chosen: Sequence[np.ndarray], sizes: Sequence[int]) -> np.ndarray:
    """Rows of several tables as rows of their concatenation, sorted within each."""
    firsts = np.cumsum([0, *sizes])
    return np.concatenate([first + np.sort(rows_R) for first, rows_R in zip(firsts, chosen, strict=False)])
