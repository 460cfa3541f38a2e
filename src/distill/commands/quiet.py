"""Warnings of our libraries: ours as one sentence, theirs that no user can act on not at all."""

import logging
import os
import re
import warnings
from pathlib import Path
from typing import Any

THEIR_FORMAT = warnings.formatwarning


def sentence(message: Any, category: Any, filename: str, lineno: int, line: str | None = None) -> str:
    """A warning of ours as it reads; others with the line of code that they come from."""
    if Path(filename).is_relative_to(Path(__file__).parents[1]):
        return f"warning: {message}\n"
    return THEIR_FORMAT(message, category, filename, lineno, line)


def quieten() -> None:
    """Silences what libraries print that a user of a default run can do nothing about."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # LightningCLI's calls
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message="The dirpath has changed from")  # every run has a directory of its own
    warnings.filterwarnings("ignore", message="Precision .* is not supported by the model summary")
    # What the module logs of an epoch, and the tasks' scores, are the same on all ranks.
    warnings.filterwarnings("ignore", message="It is recommended to use .*'(train|val|test|tasks)/.*sync_dist=True")
    warnings.formatwarning = sentence
    chatter = re.compile(
        r"Tip:|^[GTHI]PU available|^Seed set|^Using .* Precision|^`Trainer\.\w+` stopped|^Loading `train_dataloader`"
        r"|^`weights_only` was not set|validation will run at the end of the training epoch"
    )
    names = ("pytorch.utilities.rank_zero", "fabric.utilities.rank_zero", "fabric.utilities.seed")
    for name in (*names, "pytorch.trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"lightning.{name}").addFilter(lambda record: not chatter.search(record.getMessage()))
