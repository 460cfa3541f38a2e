"""Runs of the program in a process of their own, on one rank or two, and what they left."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from helpers.training_log import parse

OF_THE_MACHINE = {"train/tokens_per_s", "train/peak_memory_gib"}


def fit(config: dict, folder: Path, *args: str) -> tuple[list[dict], dict[str, torch.Tensor], str]:
    """Runs `distill fit` as a program; rows of metrics.csv, final weights, training.log."""
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    command = [sys.executable, "-m", "distill.cli", "fit", "--config", "config.yaml", *args]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "sync_dist" not in done.stderr
    (run,) = folder.glob("lightning_logs/version_*")
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    weights = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return rows, weights, (run / "training.log").read_text()


def assert_same(one: tuple, other: tuple, same_blocks: bool = True) -> None:
    """Metrics of every step, final weights and the blocks of the log agree to fp32's rounding."""
    compared = 0
    for ours, theirs in zip(one[0], other[0], strict=True):
        for name in ours:
            compares = name.startswith(("train/", "val/", "curriculum/")) or name == "routing/gate_entropy"
            if compares and ours[name] and name not in OF_THE_MACHINE:
                assert float(theirs[name]) == pytest.approx(float(ours[name]), rel=1e-5, abs=1e-6), name
                compared += 1
    assert compared > 20 * 8
    for name, value in one[1].items():
        torch.testing.assert_close(other[1][name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    blocks = [(block.kind, block.step) for block in parse(other[2])]
    assert len(set(blocks)) == len(blocks)
    if same_blocks:
        assert blocks == [(block.kind, block.step) for block in parse(one[2])]
