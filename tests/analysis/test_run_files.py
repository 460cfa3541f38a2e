"""The reader of a run's folder."""

import math

import pytest

from distill.analysis import run_files
from distill.analysis.run_files import Point


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


def table_of(folder, text):
    (folder / "metrics.csv").write_text(text)
    return run_files.read_metrics(folder / "metrics.csv")


def test_metrics_are_read_column_by_column_with_their_lines(tmp_path):
    table = table_of(tmp_path, "epoch,step,b,a\n0,0,,1.5\n0,0,2,\n\n0,7,nan,-1e-3\n")
    assert list(table.columns) == ["b", "a"]
    assert table.columns["a"] == [Point(0, 1.5, 2), Point(7, -1e-3, 5)]
    assert table.columns["b"][0] == Point(0, 2.0, 3)
    assert math.isnan(table.columns["b"][1].value)
    assert (table.doubtful, table.fault) == (frozenset(), None)


@pytest.mark.parametrize(
    ("text", "doubtful", "fault"),
    [
        ("", (), None),
        ("step,a\n", (), None),
        ("epoch,a\n0,1\n", (), "has no column step"),
        ("step,a\n0,1\n1,2", (3,), None),  # without its newline a line may lack digits
        ("step,a\n0\n1,2,3\n2,5\n", (2, 3), None),
        ("step,a\n1.0,1\n", (2,), None),
        ("step,a\n0,1\n,1\n", (3,), "line 3 is not numbers"),
        ("step,a\n0,one\ntwo,2\n", (3,), "line 2 is not numbers"),
    ],
)
def test_damage_is_kept_for_those_who_mind_it(tmp_path, text, doubtful, fault):
    table = table_of(tmp_path, text)
    assert table.doubtful == set(doubtful)
    assert (fault is None) == (table.fault is None)
    assert fault is None or fault in table.fault


def test_a_folder_is_read_once_whatever_is_missing(tmp_path):
    files = run_files.read_folder(tmp_path)
    assert (files.metrics, files.log.blocks, files.config.values, files.names) == ({}, [], {}, frozenset())
    (tmp_path / "config.yaml").write_text("checkpoint: {class_path: C, init_args: {monitor: val/loss}}\n")
    (tmp_path / "environment.yaml").write_text("[1]\n")
    files = run_files.read_folder(tmp_path)
    assert files.monitor == files.setting("checkpoint.init_args.monitor") == "val/loss"
    assert files.setting("checkpoint.class_path.no_section") is None
    assert (files.environment.values, files.environment.text, files.environment.fault) == ({}, "[1]\n", None)
    (tmp_path / "config.yaml").write_text("a: [\n")
    assert "config.yaml is no YAML" in run_files.read_folder(tmp_path).config.fault
