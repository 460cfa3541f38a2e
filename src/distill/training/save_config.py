"""The callback that writes config.yaml and environment.yaml once a run is known to start."""

import shutil
from enum import Enum
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import SaveConfigCallback

from distill.errors import RunError
from distill.training.callbacks.text import run_directory
from distill.training.trainer import environment


def plain(value: Any) -> Any:
    """A configuration whose enumerations, as the defaults of some of Lightning's callbacks are, have become text.

    Example:
        >>> from lightning.pytorch.callbacks.timer import Interval
        >>> plain([{"interval": Interval.step}])
        [{'interval': 'step'}]
    """
    if isinstance(value, Namespace):
        return Namespace(**{key: plain(inner) for key, inner in vars(value).items()})
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return value.value if isinstance(value, Enum) else value


class SaveConfig(SaveConfigCallback):
    """Writes the run's config.yaml once everything was checked; a run refused before its first step leaves nothing."""

    ours = False  # whether the run directory is known to be this run's
    began = False  # whether it has trained on a batch

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Nothing yet: Lightning's callback would write here, before the models were looked at."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.loggers:
            self.config = plain(self.config)
            super().setup(trainer, pl_module, "fit")
            self.ours = True
        directory = run_directory(trainer)
        if trainer.is_global_zero and directory is not None:
            Path(directory, "environment.yaml").write_text(yaml.safe_dump(environment(trainer), sort_keys=False))

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.began = True

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Gives the loggers the configuration but their own part of it, which may hold the key to a service."""
        config = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        del config["trainer"]["logger"]
        for logger in trainer.loggers:
            logger.log_hyperparams(config)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        fresh = getattr(trainer, "fresh_directory", None)
        if fresh is not None and not self.ours and Path(fresh, "config.yaml").exists():
            return  # of another run, which has taken the same number since
        refused = isinstance(exception, Exception) and not isinstance(exception, RunError) and not self.began
        if refused and fresh is not None and trainer.is_global_zero:
            shutil.rmtree(fresh, ignore_errors=True)
