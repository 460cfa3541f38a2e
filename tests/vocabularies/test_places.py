"""Places against a search by hand."""

import numpy as np
import pytest

from distill.vocabularies.places import places


@pytest.mark.parametrize("seed", range(20))
def test_the_place_is_the_last_boundary_at_or_before(seed):
    draw = np.random.default_rng(seed)
    teacher, student = (np.cumsum(draw.integers(1, 5, 30)) for _ in range(2))
    expected = [max((k for k, end in enumerate(teacher) if end <= c), default=-1) for c in student]
    assert places(teacher, student).tolist() == expected


def test_tokens_without_bytes_are_matched_in_order():
    # bos hello | turn turn | there eos; the teacher has a bos of its own and one token less between the two
    student, teacher = np.array([0, 5, 5, 5, 11, 11]), np.array([0, 2, 5, 5, 11, 11])
    assert places(teacher, student).tolist() == [0, 2, 3, 3, 4, 5]


def test_a_token_without_bytes_within_a_token_of_the_teacher_has_no_place():
    assert places(np.array([0, 6]), np.array([0, 3, 3, 6])).tolist() == [0, -1, 0, 1]


def test_there_may_be_none_at_all():
    assert places(np.array([], dtype=np.int64), np.array([1, 2])).tolist() == [-1, -1]
    assert places(np.array([1]), np.array([], dtype=np.int64)).tolist() == []
