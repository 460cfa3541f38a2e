"""A run's folder as series over its steps."""

import shutil

from distill.analysis.report import runs
from helpers.written_run import METRICS, read, write


def test_log_fills_what_the_metrics_lack(folder):
    run = read(folder)
    assert run.series["train/kd_loss"].steps.tolist() == [0, 1, 3, 5]
    assert run.series["train/kd_loss"].values.tolist() == [9.0, 4.0, 2.0, 1.0]
    assert run.series["train/routing_feature_matching_loss"].values.tolist() == [1.25]
    assert run.series["val/loss"].values.tolist() == [9.5, 2.0, 1.75]
    assert run.series["val/kd_loss_scaled"].values.tolist() == [7.5]
    assert "val/routing_feature_matching_loss" not in run.series  # nan: not measured
    assert "curriculum/layerwise" not in run.series  # printed, but not configured
    assert run.horizon == 6
    assert run.name == "version_0"


def test_exact_value_beats_the_rounded_one(tmp_path):
    exact = METRICS.replace("0.5,0.25,0,1,4.0,", "0.5,0.25,0,0,9.00004,")
    assert read(write(tmp_path / "run", exact)).series["train/kd_loss"].values.tolist() == [9.00004, 2.0, 1.0]


def test_a_killed_run_is_read_up_to_its_last_whole_line(tmp_path):
    run = read(write(tmp_path / "run", METRICS + ",,0,7,0.2"))
    assert run.series["train/kd_loss"].steps[-1] == 5
    assert read(write(tmp_path / "empty", "")).absent[0] == "metrics.csv holds no values yet."


def test_a_resumed_run_is_read_behind_the_one_it_went_on_from(tmp_path):
    header = "step,train/loss,val/loss\n"
    first = write(tmp_path / "version_0", f"{header}0,5.0,\n2,4.0,9.0\n4,3.0,\n", log="", config=None)
    second = write(tmp_path / "version_1", f"{header}3,2.5,\n5,2.0,\n", log="", config=None)
    checkpoint = first / "checkpoints" / "last.ckpt"
    (second / "environment.yaml").write_text(f"resumed_from: {checkpoint}\n")
    found = read(second).series
    assert (found["train/loss"].steps.tolist(), found["train/loss"].values.tolist()) == ([0, 2, 3, 5], [5, 4, 2.5, 2])
    assert found["val/loss"].steps.tolist() == [2]
    shutil.rmtree(first)
    assert read(second).series["train/loss"].steps.tolist() == [3, 5]


def test_of_a_step_logged_twice_the_last_value_counts():
    series = runs.make_series([3, 1, 3], [1.0, 2.0, 4.0])
    assert series.steps.tolist() == [1, 3]
    assert series.values.tolist() == [2.0, 4.0]


def test_names_tell_runs_apart_without_the_folder_they_share(tmp_path):
    found = runs.read_runs([write(tmp_path / side / "lightning_logs" / "version_0") for side in ("a", "b")])
    assert [run.name for run in found] == ["a/version_0", "b/version_0"]
