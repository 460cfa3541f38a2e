"""Schedules at points computed by hand, and the errors of bad ones."""

import pytest

from distill.curriculum import check_schedule, leaves_zero, peak, round_half_up, value_at
from distill.errors import UserError
from distill.training.callbacks.curriculum import Curriculum


@pytest.mark.parametrize(
    ("progress", "value"), [(0.0, 0.0), (0.3, 0.0), (0.375, 0.025), (0.45, 0.05), (0.6, 0.1), (1.0, 0.1)]
)
def test_ramp_at_hand_computed_points(progress, value):
    assert value_at([[0.3, 0.0], [0.6, 0.1]], progress) == pytest.approx(value, abs=1e-15)


def test_knots_are_met_exactly_and_segments_may_fall():
    schedule = [[0.0, 4.0], [0.5, 1.0], [0.75, 2.0]]
    assert [value_at(schedule, x) for x in (0.0, 0.25, 0.5, 0.625, 0.75, 0.9)] == [4.0, 2.5, 1.0, 1.5, 2.0, 2.0]


@pytest.mark.parametrize(("value", "rounded"), [(0.49, 0), (0.5, 1), (1.5, 2), (2.5, 3), (2.4999, 2)])
def test_experts_round_half_up(value, rounded):
    assert round_half_up(value) == rounded


def test_three_phases_by_hand():
    curriculum = Curriculum()
    table = {  # step of 1000: kd, lm, feature, attention, layerwise, contrastive
        0: (0.7, 0.3, 0, 0, 0, 0),
        299: (0.7, 0.3, 0, 0, 0, 0),
        450: (0.7, 0.3, 0.05, 0.05, 0, 0),
        600: (0.7, 0.3, 0.1, 0.1, 0, 0),
        800: (0.7, 0.3, 0.1, 0.1, 0.025, 0.025),
        1000: (0.7, 0.3, 0.1, 0.1, 0.05, 0.05),
        2000: (0.7, 0.3, 0.1, 0.1, 0.05, 0.05),
    }
    for step, expected in table.items():
        state = curriculum.state_at(step, 1000)
        assert tuple(state.weights.values()) == pytest.approx(expected, abs=1e-12)
        assert state.progress == min(step / 1000, 1.0)


def test_two_knots_at_one_progress_are_a_jump():
    curriculum = Curriculum(feature=[[0.0, 1.0], [0.3, 1.0], [0.3, 0.0]], kd=[[0.5, 0.2], [0.5, 0.8], [1.0, 1.0]])
    of_step = {step: curriculum.state_at(step, 1000).weights for step in (0, 299, 300, 499, 500, 750, 1000)}
    assert [weights["feature"] for weights in of_step.values()] == [1, 1, 0, 0, 0, 0, 0]
    assert [weights["kd"] for weights in of_step.values()] == pytest.approx([0.2, 0.2, 0.2, 0.2, 0.8, 0.9, 1.0])


@pytest.mark.parametrize(
    ("schedule", "place", "highest"),
    [
        (0.0, None, 0.0),
        (0.7, 0.0, 0.7),
        ([[0.3, 0.0], [0.6, 0.1]], 0.3, 0.1),
        ([[0.3, 1.0], [0.3, 0.0]], 0.0, 1.0),
        ([[0.3, 0.0], [0.3, 2.0], [0.5, 1.0]], 0.3, 2.0),
        ([[0.2, 0.0], [0.4, 0.0]], None, 0.0),
    ],
)
def test_where_a_schedule_leaves_zero_and_how_high_it_gets(schedule, place, highest):
    assert leaves_zero(schedule) == place
    assert peak(schedule) == highest


def test_progressive_experts_follow_the_step():
    curriculum = Curriculum(top_k_experts=[[0.0, 1], [1.0, 3]])
    assert [curriculum.state_at(step, 100).top_k_experts for step in (0, 24, 25, 74, 75, 100)] == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ([[0.6, 0.1], [0.3, 0.0]], "curriculum.feature: knots out of order"),
        ([[0.3, 0.1], [0.3, 0.0], [0.3, 0.2]], "knots out of order"),
        ([[0.3, 0.1], [1.3, 0.0]], "progress must ascend within"),
        ([[0.3, 0.1, 2.0]], "is not a schedule"),
        ([], "is not a schedule"),
        (-0.1, "curriculum.feature: -0.1 is out of range: give values at least 0"),
        (float("nan"), "out of range"),
    ],
)
def test_bad_schedules_are_refused(schedule, message):
    with pytest.raises(UserError, match=message):
        check_schedule("feature", schedule)


def test_temperature_must_be_above_zero():
    with pytest.raises(UserError, match=r"curriculum.temperature: 0.0 is out of range: give values above 0"):
        Curriculum(temperature=0.0)
