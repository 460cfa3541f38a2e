"""Lightning's Trainer with what a run of this program has by default: one run directory and whole checkpoints.

Any Lightning logger takes the place of the two default ones; the log, the configuration and the checkpoints then lie in
the directory that the logger's name and version make. With several loggers the first one decides.
"""

import os
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins import _PLUGIN_INPUT, AsyncCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn

from distill.checkpoints.files import AtomicCheckpointIO, check_writable
from distill.errors import UserError
from distill.training.lightning_internals import print_same_results_once
from distill.version import __version__


class DistillTrainer(L.Trainer):
    """Lightning's Trainer with two loggers in one run directory; our sampler does the distribution over ranks.

    Args:
        logger: null = CSV and TensorBoard in one directory, `lightning_logs/version_N`; false = none.
        use_distributed_sampler: must stay false, the datamodule distributes the rows itself.
        plugins: as Lightning's; checkpoints are written by ours where none of them does.
        kwargs: of `lightning.Trainer`.
    """

    def __init__(
        self,
        *args: Any,
        logger: Logger | list[Logger] | bool | None = None,
        use_distributed_sampler: bool = False,
        plugins: _PLUGIN_INPUT | list[_PLUGIN_INPUT] | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("barebones"):
            raise UserError(
                "trainer.barebones: true has neither loggers, nor checkpoints, nor what the audit reads; leave it out, "
                "and switch off what is not wanted by its key, such as trainer.logger: false"
            )
        check_numbers(kwargs)
        if isinstance(root := kwargs.get("default_root_dir"), str | Path):
            kwargs["default_root_dir"] = os.path.expanduser(root)
        self.asked: dict[str, Any] = kwargs  # for `check`, which plans for more devices than it runs on
        self.fresh_directory: str | None = None  # where nothing was before this trainer
        # Students that are cut: made, or read where they were made before, or blank, since a checkpoint fills them.
        self.students: Literal["made", "read", "blank"] = "made"
        if logger is None or logger is True:
            root = kwargs.get("default_root_dir") or os.getcwd()
            csv = CSVLogger(root, name="lightning_logs")
            plots = TensorBoardLogger(root, name="lightning_logs", version=csv.version, default_hp_metric=False)
            logger = [csv, plots]
            self.fresh_directory = None if Path(csv.log_dir).exists() else csv.log_dir
        chosen = list(plugins) if isinstance(plugins, list) else [plugins] if plugins is not None else []
        if any(isinstance(plugin, AsyncCheckpointIO) for plugin in chosen):
            raise UserError(
                "trainer.plugins: AsyncCheckpointIO has written a checkpoint some time after the run says so, and not "
                "to its end where the run is killed; leave it out"
            )
        if not any(isinstance(plugin, CheckpointIO) for plugin in chosen):
            chosen.append(AtomicCheckpointIO())
        sampler = use_distributed_sampler
        try:
            super().__init__(*args, logger=logger, use_distributed_sampler=sampler, plugins=chosen, **kwargs)
        except ImportError as error:  # of a precision, a profiler, an environment
            key = "trainer.precision" if "transformer" in str(kwargs.get("precision")) else "trainer"
            raise UserError(f"{key}: {' '.join(str(error).split())}") from error
        print_same_results_once(self)

    def check_directories(self) -> None:
        """Tries the directories that a run will write to, before anything is loaded for it.

        Raises:
            UserError: one can't be made or written.
        """
        places = [("trainer.logger", logger.save_dir) for logger in self.loggers]
        if self.fresh_directory is not None:
            places = [("trainer.default_root_dir", self.fresh_directory)]
        elif self.checkpoint_callbacks and not self.loggers:
            places = [("trainer.default_root_dir", self.default_root_dir)]
        places += [("checkpoint.dirpath", getattr(callback, "dirpath", None)) for callback in self.checkpoint_callbacks]
        for key, place in places:
            if self.is_global_zero and place is not None and _is_local_file_protocol(place):
                check_writable(Path(place), key)

    def _run(self, model: L.LightningModule, ckpt_path: Any = None, weights_only: bool | None = None) -> Any:
        """Lightning's own, which all its commands end in; models are configured before it looks at the checkpoint."""
        key = {TrainerFn.VALIDATING: "limit_val_batches", TrainerFn.TESTING: "limit_test_batches"}.get(
            self.state.fn or TrainerFn.FITTING
        )
        if key is not None and getattr(self, key) == 0:
            raise UserError(f"trainer.{key}: 0 leaves nothing to measure; give at least 1, or leave it out")
        self.students = "made" if ckpt_path is None else "blank"
        return super()._run(model, ckpt_path=ckpt_path, weights_only=weights_only)

    @property
    def log_dir(self) -> str | None:
        """The run's directory. Loggers that name none of their own get the one that holds the checkpoints."""
        logger = self.loggers[0] if self.loggers else None
        if logger is None or isinstance(logger, CSVLogger | TensorBoardLogger | DummyLogger):
            return super().log_dir
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        directory = os.path.join(logger.save_dir or self.default_root_dir, str(logger.name), version)
        return self.strategy.broadcast(directory)


def check_numbers(options: Mapping[str, Any]) -> None:
    """Refuses what Lightning divides by, or turns a gradient around with.

    Args:
        options: of a trainer, by name.

    Raises:
        UserError: names key, value and remedy.
    """
    for key in ("accumulate_grad_batches", "check_val_every_n_epoch"):
        if isinstance(number := options.get(key), int) and number < 1:
            raise UserError(f"trainer.{key}: {number}; give at least 1")
    if options.get("val_check_interval") in (0, 0.0):
        raise UserError(
            "trainer.val_check_interval: 0; give micro-batches or a share of an epoch, or switch validation off by "
            "trainer.limit_val_batches: 0"
        )
    clip = options.get("gradient_clip_val")
    if clip is not None and not clip >= 0:  # nan too
        raise UserError(f"trainer.gradient_clip_val: {clip} must be above 0 (null = not clipped)")


def environment(trainer: L.Trainer) -> dict[str, str | int]:
    """What a run ran on and with, for the report."""
    names = ("torch", "lightning", "transformers", "datasets")
    device = trainer.strategy.root_device
    resumed: dict[str, str | int] = {}
    if trainer.ckpt_path is not None:
        resumed["resumed_from"] = str(Path(trainer.ckpt_path).absolute())
    return resumed | {
        "command": " ".join(sys.argv),
        "python": platform.python_version(),
        "distill": __version__,
        **{name: version(name) for name in names},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type,
        "processes": trainer.world_size,
        "threads": torch.get_num_threads(),
    }
