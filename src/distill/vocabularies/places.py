"""Where the student's positions lie between the teacher's, from the bytes behind their tokens.

Letters: T tokens of the teacher, S of the student.
"""

import numpy as np


def places(teacher_ends_T: np.ndarray, student_ends_S: np.ndarray) -> np.ndarray:
    """The teacher's position that predicts on from the last boundary at or before each of the student's, int64 [S].

    Before text it is the last one there. Tokens without bytes, such as the end of a document, may follow each other at
    one byte: before the j-th of them it is the j-th position there.

    Args:
        teacher_ends_T: byte behind each token of the teacher, ascending, int64.
        student_ends_S: behind each of the student's.

    Returns:
        Indices; -1 where there is none.

    Example:
        >>> places(np.array([2, 5, 5]), np.array([1, 2, 3, 5, 5]))  # both end their document with a token of no bytes
        array([-1,  0,  0,  1,  2])
    """
    places_S = np.searchsorted(teacher_ends_T, student_ends_S, side="right") - 1
    empty = np.flatnonzero(np.diff(student_ends_S) == 0)  # positions whose next token has no bytes
    ends = student_ends_S[empty]
    nth = np.searchsorted(teacher_ends_T, ends) + empty - np.searchsorted(student_ends_S, ends)
    there = nth < len(teacher_ends_T)
    there[there] = teacher_ends_T[nth[there]] == ends[there]
    places_S[empty] = np.where(there, nth, -1)
    return places_S
