"""The reader of a run's folder."""

import pytest

from distill.analysis import run_files


@pytest.mark.parametrize(
    ("max_steps", "progress", "expected"),
    [
        (60, [(0, 0.0), (9, 0.15)], 60),
        (60, [(9, 0.3)], 30),  # an epoch ended the run before max_steps
        (-1, [(9, 0.15)], 60),
        (75_000, [(9, 0.0), (2500, 0.033)], 75_000),  # the log rounds progress
        (None, [], None),
        (20, [], 20),
    ],
)
def test_horizon_is_the_configured_one_where_the_log_agrees(max_steps, progress, expected):
    assert run_files.horizon_of({"trainer": {"max_steps": max_steps}}, progress) == expected
