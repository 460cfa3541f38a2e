"""The loss that CONTRIBUTING.md builds, added to a copy of the source as it is written there."""

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_loss_is_a_file_and_three_lines(assets, tmp_path):
    text = (ROOT / "CONTRIBUTING.md").read_text()
    blocks = {kind: re.search(rf"^```{kind}\n(.*?)^```", text, re.MULTILINE | re.DOTALL) for kind in ("python", "diff")}
    source, lines = (block.group(1) for block in blocks.values())
    assert len(re.findall(r"^\+[^+]", lines, re.MULTILINE)) == 3
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "src/distill/losses/size.py").write_text(source)
    subprocess.run(["git", "apply"], cwd=tmp_path, input=lines, text=True, check=True)

    def distill(*arguments: str, codes: tuple[int, ...] = (0,)) -> str:
        environment = os.environ | {"PYTHONPATH": str(tmp_path / "src"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "distill.cli", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode in codes, done.stderr[-3000:]
        return done.stdout

    keys = {"model.teacher": assets / "llama", "model.student_layers": 2, "model.student_fit": "null"}
    keys |= {"model.size": "{}", "curriculum.size": 0.5, "data.dataset": assets / "text.txt"}
    keys |= {"data.sequence_length": 32, "trainer.max_steps": 4, "trainer.accelerator": "cpu"}
    keys |= {"trainer.log_every_n_steps": 1}
    flags = [f"--{key}={value}" for key, value in keys.items()]
    assert "size_loss" in distill("check", *flags, codes=(0, 1))  # 1: it says that a random teacher knows nothing
    distill("fit", *flags)
    run = tmp_path / "lightning_logs/version_0"
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    trained = [row for row in rows if row["train/size_loss"]]
    for row in trained:
        assert float(row["train/size_loss_scaled"]) == pytest.approx(0.5 * float(row["train/size_loss"]), rel=1e-6)
    assert len(trained) == 4
    assert any(row["val/size_loss"] for row in rows)
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["distill"]["settings"]["model.size"] == {"coefficient": 1.0}
    assert "size_loss" in (run / "training.log").read_text()
    distill("export", str(run / "checkpoints/last.ckpt"), "student")
    distill("report", str(run))
