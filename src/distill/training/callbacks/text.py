"""Blocks of plain text for people and for grep: on stdout above the bar, and in the run's `training.log`."""

from collections.abc import Iterable
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

RULE = "=" * 60


def block(heading: str, lines: Iterable[str]) -> str:
    """A ruled block with an empty line before and after it."""
    return "\n".join(["", RULE, heading, RULE, *lines, RULE, ""])


def emit(trainer: L.Trainer, directory: str | None, text: str) -> None:
    """Prints `text` above a live progress bar and appends it to `training.log`; on rank zero only."""
    if not trainer.is_global_zero:
        return
    bar = trainer.progress_bar_callback
    if isinstance(bar, RichProgressBar) and bar.progress is not None:
        bar.progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
    elif isinstance(bar, TQDMProgressBar):
        bar.print(text)
    else:
        print(text, flush=True)
    write(directory, text)


def write(directory: str | None, text: str) -> None:
    """Appends `text` to a run's `training.log`; for rank zero."""
    if directory is not None:
        Path(directory).mkdir(parents=True, exist_ok=True)
        with Path(directory, "training.log").open("a", encoding="utf-8") as log:
            log.write(text + "\n")


def run_directory(trainer: L.Trainer) -> str | None:
    """The run's log directory, None without a logger. Collective: call it on all ranks."""
    return trainer.log_dir if trainer.loggers else None
