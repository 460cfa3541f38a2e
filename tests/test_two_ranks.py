"""Two gloo processes through the command line do what one process does on the same global batches."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from training_log import parse

OF_THE_MACHINE = {"train/tokens_per_s", "train/peak_memory_gib"}


def fit(config: dict, folder: Path, *args: str) -> tuple[list[dict], dict[str, torch.Tensor], str]:
    """Runs `distill fit` as a program; rows of metrics.csv, final weights, training.log."""
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "distill.cli", "fit", "--config", "config.yaml", *args]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = folder.glob("lightning_logs/version_*")
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    weights = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return rows, weights, (run / "training.log").read_text()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_equal_one_process(config, tmp_path, strategy):
    config["trainer"] |= {"max_steps": 12, "val_check_interval": 6, "gradient_clip_val": 0.5}
    config["model"] |= {"attention": {}, "layerwise": {}, "contrastive": {"tokens_per_row": 8, "queue_size": 200}}
    config["curriculum"] = {"feature": [[0.2, 0.0], [0.5, 0.1]], "attention": [[0.5, 0.0], [0.6, 0.1]]}
    config["curriculum"] |= {"layerwise": [[0.3, 0.0], [0.5, 0.1]], "contrastive": [[0.3, 0.0], [0.5, 0.1]]}
    config["data"]["per_device_batch_size"] = 4
    one = fit(config, tmp_path / "one")
    config["data"]["per_device_batch_size"] = 2
    two = fit(config, tmp_path / "two", "--trainer.strategy", strategy, "--trainer.devices", "2")
    compared = 0
    for ours, theirs in zip(one[0], two[0], strict=True):
        for name in ours:
            if name.startswith(("train/", "val/", "curriculum/")) and ours[name] and name not in OF_THE_MACHINE:
                assert float(theirs[name]) == pytest.approx(float(ours[name]), rel=1e-5, abs=1e-6), name
                compared += 1
    assert compared > 12 * 8
    for name, value in one[1].items():
        torch.testing.assert_close(two[1][name], value, rtol=1e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    blocks = [(block.kind, block.step) for block in parse(two[2])]
    assert blocks == [(block.kind, block.step) for block in parse(one[2])]
    assert len(set(blocks)) == len(blocks)
