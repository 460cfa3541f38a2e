"""Where tokens lie in their text, to the character.

Letters: T tokens of one text.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from tokenizers import processors


@contextmanager
def whole_offsets(tokenizer: Any) -> Iterator[None]:
    """A fast tokenizer whose offsets are not trimmed: by default many leave out blanks at either end of a token."""
    trimming = list(_trimming(tokenizer.backend_tokenizer.post_processor))
    for processor in trimming:
        processor.trim_offsets = False
    try:
        yield
    finally:
        for processor in trimming:
            processor.trim_offsets = True


def _trimming(processor: Any) -> Iterator[Any]:
    if isinstance(processor, processors.Sequence):
        for index in range(100):
            try:
                yield from _trimming(processor[index])
            except IndexError:
                return
    elif getattr(processor, "trim_offsets", False):
        yield processor


def covered(offsets_T2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First character of each token, and the one behind it; a token without a width has what lies before it.

    What a tokenizer drops on purpose, such as line breaks before a token of some width, belongs to none.

    Args:
        offsets_T2: as tokenizers return them, int64 [T, 2].

    Returns:
        int64 [T] each.

    Example:
        >>> covered(np.array([[0, 2], [5, 5], [6, 8]]))
        (array([0, 2, 6]), array([2, 5, 8]))
    """
    starts_T, ends_T = offsets_T2.T
    reached_T = np.concatenate([[0], np.maximum.accumulate(ends_T)[:-1]]) if len(ends_T) else ends_T
    return np.where(starts_T == ends_T, np.minimum(starts_T, reached_T), starts_T), ends_T
