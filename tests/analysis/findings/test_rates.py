"""Learning rates that are zero or whose schedule does not fit the run."""

import pytest

from distill.commands.diagnose import diagnose
from helpers.diagnosis import judge, names, plant_schedule


def test_learning_rate_zero(finding, monkeypatch):
    plant_schedule(monkeypatch, factor=0.0)
    found = finding("learning rate zero")
    assert "12 of 12 logged values" in found.title
    assert "step 0: train/lr 0" in found.evidence[0]


@pytest.mark.filterwarnings("ignore:model.warmup_steps")
def test_warm_up_outlasts_the_run(finding):
    found = finding("schedule horizon", "--model.warmup_steps", "500")
    assert "warm-up of 500 steps outlasts the run of 12" in found.title


@pytest.mark.parametrize(
    ("times", "title"),
    [(4.0, "at step 11 of 12 it is still"), (0.25, "it is at its floor from step")],
    ids=["horizon", "stepping"],
)
def test_schedule_counted_in_micro_batches(finding, monkeypatch, times, title):
    plant_schedule(monkeypatch, times)
    found = finding("schedule horizon", "--trainer.accumulate_grad_batches", "4", "--trainer.val_check_interval", "48")
    assert title in found.title
    assert "counted in micro-batches: accumulate_grad_batches is 4" in found.cause
    assert "count optimizer steps" in found.fix


def test_a_bar_that_shows_a_rate_of_zero(tmp_path):
    bars = "\n".join(f"Epoch 0: 1%| {step}/75000 [v_num=0, loss=15.5, lr=0.00e+00]" for step in range(3))
    assert names(judge(bars, tmp_path)) == ["learning rate zero"]
    assert names(judge(bars + " lr=7.960e-06", tmp_path)) == []


@pytest.mark.parametrize(
    ("ratio", "first", "rate_of"),
    [
        (0.0, 180, lambda step: 1e-3 * (1 - step / 220)),  # resumed, so that the peak is not to be seen
        (0.5, 0, lambda step: 1e-3 * (0.5 + 0.5 * (1 - step / 200))),
    ],
)
def test_a_rate_that_ends_high_for_a_reason_is_in_order(tmp_path, ratio, first, rate_of):
    rows = [f"0,{step},{3 - step / 200},{rate_of(step)},2.0" for step in range(first + 2, 200, 2)]
    header = "epoch,step,train/kd_loss,train/lr,val/kl_div_T1\n"
    (tmp_path / "metrics.csv").write_text(header + "\n".join(rows) + "\n")
    options = f"model: {{warmup_steps: 0, min_learning_rate_ratio: {ratio}}}\n"
    (tmp_path / "config.yaml").write_text("trainer: {max_steps: 200}\n" + options)
    assert "schedule horizon" not in names(diagnose(str(tmp_path)))
    assert ("loss flat" in names(diagnose(str(tmp_path)))) == (first == 0)  # resumed runs are not judged
