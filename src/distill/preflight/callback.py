"""The short form of `distill check`, before the first step of every fit: a line, and what is suspicious.

It uses what fit has loaded and runs one row through the teacher; a run is never stopped by it, since a teacher that
looks bad may be meant. It costs that row's forward pass, on every rank.

Reads: both models, tokenizer and validation rows. Writes: what is suspicious, into training.log, so that a diagnosis
knows of it.
"""

from typing import final

import lightning as L
from lightning.pytorch.callbacks import Callback

from distill.preflight.quick import quick_findings
from distill.training.callbacks.text import run_directory, write
from distill.training.module import distilled


@final
class Preflight(Callback):
    """Prints one line about the run before its first step, and one for each thing that looks wrong."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module = distilled(pl_module)
        if trainer.ckpt_path is not None:  # it was looked at when the run began
            return
        if module.teacher is not None:
            module.teacher.to(module.device)
        findings, line = quick_findings(trainer, module, getattr(trainer, "datamodule", None))
        directory = run_directory(trainer)
        if trainer.is_global_zero:
            print(line, flush=True)
            for finding in findings:
                print(f"Suspicious: {finding}", flush=True)
                write(directory, f"Suspicious: {finding}")
