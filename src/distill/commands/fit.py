"""LightningCLI with curriculum, dumps, audit, bar, checkpoints and loggers on without being listed.

Each default callback is a top-level key of the YAML, since dotted overrides cannot reach into the callbacks list;
`--train_debug null` switches one off.
"""

import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping, ModelCheckpoint
from lightning.pytorch.callbacks import ProgressBar as LightningBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from distill.checkpoints.files import earlier_runs, find_last, is_whole
from distill.commands.failures import explained
from distill.commands.parser import Parser, shorten, told
from distill.commands.quiet import quieten
from distill.data.datamodule import DistillationDataModule
from distill.errors import UserError, did_you_mean
from distill.evaluation.harness import Harness
from distill.preflight.callback import Preflight
from distill.training.callbacks.audit import LossAudit
from distill.training.callbacks.best import DEFAULT_MONITOR, BestLink, check_monitors
from distill.training.callbacks.curriculum import Curriculum
from distill.training.callbacks.evaluation import Evaluation
from distill.training.callbacks.gradients import Gradients
from distill.training.callbacks.last_checkpoint import LastCheckpoint
from distill.training.callbacks.progress import ProgressBar
from distill.training.callbacks.progress_lines import ProgressLines
from distill.training.callbacks.resume import ExactResume
from distill.training.callbacks.step_dumps import CurriculumDump, KDLossDump, RoutingLossesDump
from distill.training.callbacks.train_debug import TrainDebug
from distill.training.module import DistillationModule
from distill.training.save_config import SaveConfig
from distill.training.trainer import DistillTrainer

# Key -> class of the callbacks, in the order in which they print; on by default but for those of OFF.
CALLBACKS: dict[str, type[Callback]] = {
    "progress": ProgressBar,
    "progress_lines": ProgressLines,
    "preflight": Preflight,
    "audit": LossAudit,
    "train_debug": TrainDebug,
    "curriculum_dump": CurriculumDump,
    "kd_loss_dump": KDLossDump,
    "routing_losses_dump": RoutingLossesDump,
    "evaluation": Evaluation,
    "gradients": Gradients,
    "harness": Harness,
}
OFF = {"gradients", "harness"}


class ProgramTrainer(DistillTrainer):
    """The trainer of the command line, whose methods are its subcommands."""

    def check(
        self,
        model: DistillationModule,
        datamodule: DistillationDataModule,
        weights: bool = True,
        devices: int | None = None,
        device_memory_gib: float | None = None,
        tflops: float | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Shows what a run would read, compute and need before it is started, and what looks wrong about it.

        Exit code 1 where something does.

        Args:
            model: its models need not be built.
            datamodule: not set up.
            weights: whether to load the models and run a few rows; without, configurations alone are read.
            devices: to estimate memory for; null = those of `trainer`.
            device_memory_gib: of each device; null = this machine's.
            tflops: that a device reaches, in 10^12 operations a second; null = measured here, 100 for GPUs elsewhere.
            ckpt_path: not looked into; taken so that a run's own config.yaml serves.
            weights_only: the same.
        """
        from distill.preflight.check import check  # half a second that the other commands need not wait for
        from distill.preflight.plan import Plan

        wanted = {**Plan.asked_by(self.asked), "devices": devices} if devices else Plan.asked_by(self.asked)
        plan = Plan(**wanted, weights=weights, device_memory_gib=device_memory_gib, tflops=tflops)
        if check(self, model, datamodule, plan):
            raise SystemExit(1)

    def cache(
        self,
        model: DistillationModule,
        datamodule: DistillationDataModule,
        output: str,
        encoding: str | None = None,
        dtype: str | None = None,
        states: bool = False,
        max_rows: int | None = None,
        shard_rows: int | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Writes the teacher's targets for the rows of a configuration, which `model.teacher: FOLDER` learns from.

        Run again after a kill it goes on, and after data grew it adds the new rows.

        Args:
            model: its models need not be built.
            datamodule: not set up.
            output: folder.
            encoding: hidden, top_k or sampled; null = what `model.kd_loss` learns from.
            dtype: that hidden states are rounded to, float32 or bfloat16; null = the teacher's own.
            states: whether to write what the configured losses on layers look at, too.
            max_rows: of training and of validation rows, the first ones, to try it; null = all.
            shard_rows: rows of a file; null = about 64 MiB.
            ckpt_path: not looked into; taken so that a run's own config.yaml serves.
            weights_only: the same.
        """
        from distill.commands.cache import build  # which the other commands need not wait for
        from distill.training.cache_request import Request

        build(self, model, datamodule, Request(output, encoding, dtype, states, max_rows, shard_rows))


class DistillCLI(LightningCLI):
    """LightningCLI of the one module and the one datamodule."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = kwargs.get("args")
        self.called = (sys.argv[1:] if given is None else given)[:1]
        super().__init__(*args, **kwargs)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The subcommand that is called, or all where none is: each parser takes a third of a second to build."""
        known = {name: LightningCLI.subcommands()[name] for name in ("fit", "validate", "test")}
        known["check"] = known["cache"] = {"model", "datamodule"}
        return {name: skip for name, skip in known.items() if self.called == [name]} or known

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(Curriculum, "curriculum")
        for key, callback in CALLBACKS.items():
            parser.add_argument(f"--{key}", type=callback | None, default=None if key in OFF else {})
        parser.add_argument(
            "--checkpoint",
            type=ModelCheckpoint | None,
            default={
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {
                    "monitor": DEFAULT_MONITOR,
                    "mode": "min",
                    "filename": "step={step}",
                    "auto_insert_metric_name": False,
                },
            },
        )
        parser.add_argument("--last_checkpoint", type=LastCheckpoint | None, default={})
        parser.add_argument("--early_stopping", type=EarlyStopping | None, default=None)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            super().parse_arguments(parser, args)
        except UnicodeDecodeError as error:
            raise UserError(f"config: a configuration is no UTF-8 text ({error}); save it as UTF-8") from error
        except UserError as error:
            misspelt = re.search(r"does not accept option '([\w.]+)'|[Uu]nrecognized arguments: --([\w.]+)", str(error))
            if misspelt is None:
                raise
            keys = {action.dest for sub in self._subcommand_parsers.values() for action in sub._actions}
            keys |= {key.rsplit(".", 1)[0] for key in keys}
            key = misspelt[1] or misspelt[2]
            raise UserError(f"{key}: there is no such key; {did_you_mean(key, sorted(keys))}") from None

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand] if self.subcommand else {}
        path = config.get("ckpt_path")
        if path not in (None, "last", "best", "hpc", "registry"):
            if not Path(path).exists():
                raise UserError(f"ckpt_path: {path} does not exist: give a .ckpt file of a run's checkpoints folder")
            if not is_whole(Path(path)):
                raise UserError(f"ckpt_path: {path} is truncated, damaged or no checkpoint: take an earlier one")

    def _find_last(self, root: str, logger: Any) -> None:
        """Puts the newest checkpoint where the configuration has `ckpt_path: last`."""
        if (last := find_last(earlier_runs(root, logger))) is None and self.subcommand != "fit":
            raise UserError(
                "ckpt_path: last, but no run of this configuration's logger has a checkpoint: give a .ckpt file"
            )
        for config in (self.config, self.config_init):  # the first of a chain of jobs starts anew
            config[self.subcommand]["ckpt_path"] = str(last) if last is not None else None

    def _parse_ckpt_path(self) -> None:
        """The configuration beats the checkpoint: nothing is read back into it."""

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        keys = [*CALLBACKS, "checkpoint", "last_checkpoint", "early_stopping"]
        chosen = [self._get(self.config_init, key) for key in keys]
        kept = keys.index("checkpoint")
        best, trains = chosen[kept], self._get(self.config_init, "trainer", default={})
        if trains.get("limit_val_batches") == 0 and (getattr(best, "monitor", None) or "").startswith("val/"):
            chosen[kept] = None  # which Lightning would ask for in vain after each epoch
        if isinstance(chosen[kept], ModelCheckpoint):
            chosen.insert(kept + 1, BestLink())  # before last_checkpoint, which holds its state
        extra = [self._get(self.config_init, "curriculum"), *(callback for callback in chosen if callback is not None)]
        extra.append(ExactResume())
        config = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        listed = config.get("callbacks") or []
        own_bars = [c for c in (listed if isinstance(listed, list) else [listed]) if isinstance(c, LightningBar)]
        if own_bars or config.get("enable_progress_bar") is False:
            extra = [callback for callback in extra if not isinstance(callback, ProgressBar)]
        if not own_bars and not any(isinstance(callback, ProgressBar) for callback in extra):
            config["enable_progress_bar"] = False
        if config.get("enable_checkpointing") is False:
            extra = [callback for callback in extra if not isinstance(callback, Checkpoint)]
        if self._get(self.config_init, "ckpt_path") == "last" and self.subcommand not in ("check", "cache"):
            self._find_last(os.path.expanduser(config.get("default_root_dir") or os.getcwd()), config.get("logger"))
        if self.subcommand in ("validate", "test", "cache") and config.get("logger") is None:
            config["logger"] = False  # they print what they measure; a run directory would hold nothing else
        here = {"accelerator": "auto", "devices": 1, "num_nodes": 1, "strategy": "auto", "logger": False}
        checks = self.subcommand == "check"
        try:
            trainer = self._instantiate_trainer(config | here if checks else config, extra)
        except (TypeError, ValueError) as error:
            if "lightning" not in traceback.extract_tb(error.__traceback__)[-1].filename:
                raise
            raise UserError(f"trainer: {shorten(str(error))}") from error  # of what only Lightning itself can tell
        if self.subcommand in ("fit", "check"):
            trainer.check_directories()  # type: ignore[attr-defined]
        if self.subcommand == "fit":
            names = [one.name for one in self.datamodule.validation_sets if one.name]
            callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
            check_monitors(callbacks, names, any(isinstance(callback, Harness) for callback in callbacks))
        if checks:
            trainer.asked = config  # type: ignore[attr-defined]
        return trainer


def run(args: list[str] | None = None) -> DistillCLI:
    """Parses the command line (or `args`) and runs its subcommand.

    Raises:
        UserError: bad input, in one line.
        RunError: what stopped the run, in one line.
    """
    quieten()
    try:
        return DistillCLI(
            DistillationModule,
            DistillationDataModule,
            save_config_callback=SaveConfig,
            trainer_class=ProgramTrainer,
            trainer_defaults={"log_every_n_steps": 10, "enable_model_summary": False},
            seed_everything_default=0,
            parser_class=Parser,
            parser_kwargs={"prog": "distill", "allow_abbrev": False},  # no misspelt key is taken for another
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=args,
        )
    except Exception as error:
        if (known := explained(error)) is None:
            raise
        raise known from (None if known is told(error) else error)
