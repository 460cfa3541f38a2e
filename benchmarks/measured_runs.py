"""What the benchmarks share that train many small students: results that survive a stop, and a quiet trainer.

Results are read again before each is written, so that several processes may add to one file.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

from distill.training.trainer import DistillTrainer


def load(path: Path) -> dict[str, Any]:
    """What was measured so far."""
    return json.loads(path.read_text()) if path.exists() else {"facts": {}, "runs": []}


def save(path: Path, results: dict[str, Any]) -> None:
    """Whole or not at all, one line per run, so that a difference can be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    runs = ",\n  ".join(json.dumps(record) for record in results["runs"])
    partial = path.with_suffix(".partial")
    partial.write_text(f'{{\n"facts": {json.dumps(results["facts"])},\n"runs": [\n  {runs}\n]\n}}\n')
    os.replace(partial, path)


def quiet_trainer(steps: int, root: str, callbacks: Sequence[Callback]) -> DistillTrainer:
    """Trains on one CPU and validates once, at the end; writes nothing."""
    return DistillTrainer(
        default_root_dir=root,
        logger=False,
        callbacks=list(callbacks),
        max_steps=steps,
        check_val_every_n_epoch=None,
        val_check_interval=steps,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
