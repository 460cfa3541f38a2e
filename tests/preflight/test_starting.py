"""What a check says of a student that a run will make, and that it makes none."""

import re

import pytest

from distill.models.start import estimate as estimates
from distill.models.start.make import CPU, make_student
from distill.models.start.shape import Shape, StudentFit
from distill.models.start.walk import Rows
from helpers import tiny


@pytest.fixture
def moe(config, assets, tmp_path, monkeypatch) -> dict:
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    config["model"] |= {
        "teacher": str(assets / "qwen3_moe"),
        "student_intermediate_size": 24,
        "student_fit": {"tokens": 512, "steps": 4},
    }
    config["trainer"]["max_steps"] = 2
    del config["progress"]
    return config


def checked(distill, config, capsys) -> str:
    with pytest.raises(SystemExit):
        distill("check", {key: value for key, value in config.items() if key != "progress"})
    return capsys.readouterr().out


def test_a_check_tells_what_is_made_and_makes_nothing(moe, distill, tmp_path, capsys):
    said = checked(distill, moe, capsys)
    assert "Student: 2 of 4 layers, FFNs of 24 of the teacher's neurons; made before the first step from 512" in said
    assert re.search(r"and 4 steps a layer in about [\d,]+ s, \d+% of the run, once", said)
    assert "closed form on 512 tokens" in said
    rows = re.findall(r"│ +(\d) +│ +(\d) +│ +0\.\d+ +│", said.partition("Error of each layer")[2])
    assert rows == [("0", "0"), ("1", "3")]
    assert not list((tmp_path / "cache").glob("students/*/model.safetensors"))
    made = distill("fit", moe).model.made
    again = checked(distill, moe, capsys)
    assert "FFNs of 24 of the teacher's neurons, made before in" in again
    for layer in made["layers"]:
        assert f"{layer['after']:.3f}" in again


@pytest.mark.parametrize("length", [256, 2048, 8192])
def test_the_estimate_adds_up_what_rows_and_steps_take(monkeypatch, length):
    """On a clock of 1 s a student, 0.1 s a row, as much where there are steps, 2 s a step and 9 s at first."""
    now, made = [0.0], []

    def make(teacher, shape, rows, fit, place):
        now[0] += 1.0 + (0.2 if fit.steps else 0.1) * len(rows.ids_RL) + 2.0 * fit.steps + 9.0 * (not made)
        made.append(shape)
        return None, []

    monkeypatch.setattr(estimates, "make_student", make)
    monkeypatch.setattr(estimates.time, "perf_counter", lambda: now[0])
    rows = Rows.of(tiny.torch.zeros(50, length, dtype=tiny.torch.long))
    for steps in (1, 3, 60):
        seconds, _ = estimates.estimate(None, Shape([0, 2]), rows, StudentFit(steps=steps), CPU)
        assert seconds == pytest.approx(1 + 0.2 * 50 + 2 * steps)
    assert made[0].layers == [0]
    closed_s, _ = estimates.estimate(None, Shape([0, 2]), rows, StudentFit(steps=0), CPU)
    assert closed_s == pytest.approx(1 + 0.1 * 50)
    assert estimates.estimate(None, Shape([0]), rows.first(1), StudentFit(steps=0), CPU)[0] == pytest.approx(1.1)
    assert make_student is not make
