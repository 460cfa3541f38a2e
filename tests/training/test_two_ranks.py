"""Two gloo processes through the command line do what one process does on the same global batches."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from conftest import text_of_stdlib
from helpers.training_log import parse

OF_THE_MACHINE = {"train/tokens_per_s", "train/peak_memory_gib"}


def fit(config: dict, folder: Path, *args: str) -> tuple[list[dict], dict[str, torch.Tensor], str]:
    """Runs `distill fit` as a program; rows of metrics.csv, final weights, training.log."""
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
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


@pytest.fixture
def uneven(config, tmp_path) -> dict:
    """A run of 20 steps of 8 padded rows of 4 to 32 tokens, with all nine components weighed from early on."""
    text = text_of_stdlib(30_000)
    pieces = [text[at : at + 20 + at * 7 % 160] for at in range(0, len(text) - 180, 180)]
    (tmp_path / "pieces.jsonl").write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
    config["trainer"] |= {"max_steps": 20, "val_check_interval": 10, "gradient_clip_val": 0.5}
    config["data"] |= {"dataset": str(tmp_path / "pieces.jsonl"), "packing": False, "per_device_batch_size": 8}
    config["model"] |= {"attention": {}, "layerwise": {}, "contrastive": {"tokens_per_row": 8, "queue_size": 200}}
    ramp = [[0.1, 0.0], [0.3, 0.1]]
    config["curriculum"] = dict.fromkeys(("feature", "attention", "layerwise", "contrastive"), ramp)
    return config


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


STRATEGIES = ("ddp", "fsdp2")


def test_two_ranks_equal_one_process(uneven, tmp_path):
    one = fit(uneven, tmp_path / "one")
    for key in ("feature", "attention", "layerwise", "contrastive"):
        assert max(float(row[f"curriculum/{key}"] or 0) for row in one[0]) == pytest.approx(0.1)
    uneven["data"]["per_device_batch_size"] = 4
    for strategy in STRATEGIES:
        flags = ("--trainer.strategy", strategy, "--trainer.devices", "2")
        assert_same(one, fit(uneven, tmp_path / strategy, *flags))


@pytest.mark.slow
def test_accumulation_equals_one_batch(uneven, tmp_path):
    """Without load balancing and the contrastive loss, which are statistics of a micro-batch."""
    del uneven["model"]["contrastive"], uneven["curriculum"]["contrastive"]
    names = ("feature_matching_loss", "expert_importance_loss", "attention_alignment_loss")
    uneven["model"]["routing"]["losses"] = dict.fromkeys(names, 1.0)
    one = fit(uneven, tmp_path / "one")
    uneven["data"]["per_device_batch_size"] = 4
    uneven["trainer"] |= {"accumulate_grad_batches": 2, "val_check_interval": 20}
    assert_same(one, fit(uneven, tmp_path / "accumulated"), same_blocks=False)
    uneven["data"]["per_device_batch_size"] = 2
    for strategy in STRATEGIES:
        flags = ("--trainer.strategy", strategy, "--trainer.devices", "2")
        assert_same(one, fit(uneven, tmp_path / strategy, *flags), same_blocks=False)
