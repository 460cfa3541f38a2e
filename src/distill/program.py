"""LightningCLI with curriculum, dumps, audit, bar, checkpoints and loggers on without being listed.

Each default callback is a top-level key of the YAML, since dotted overrides cannot reach into the callbacks list;
`--train_debug null` switches one off. The price is a signature that names them all.
"""

import logging
import os
import re
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import yaml
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping, ModelCheckpoint
from lightning.pytorch.callbacks import ProgressBar as LightningBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from distill.callbacks.audit import LossAudit
from distill.callbacks.curriculum import Curriculum
from distill.callbacks.evaluation import Evaluation
from distill.callbacks.gradients import Gradients
from distill.callbacks.last_checkpoint import LastCheckpoint
from distill.callbacks.preflight import Preflight
from distill.callbacks.progress import ProgressBar
from distill.callbacks.resume import ExactResume
from distill.callbacks.step_dumps import CurriculumDump, KDLossDump, RoutingLossesDump
from distill.callbacks.text import run_directory
from distill.callbacks.train_debug import TrainDebug
from distill.checkpoint_files import find_last, is_whole
from distill.data.datamodule import DistillationDataModule
from distill.errors import RunError, UserError, did_you_mean
from distill.module import DistillationModule
from distill.optim import check_validation_interval
from distill.trainer import DistillTrainer, earlier_runs, environment

# Key -> class of the callbacks, in the order in which they print; on by default but for those of OFF.
CALLBACKS: dict[str, type[Callback]] = {
    "progress": ProgressBar,
    "preflight": Preflight,
    "audit": LossAudit,
    "train_debug": TrainDebug,
    "curriculum_dump": CurriculumDump,
    "kd_loss_dump": KDLossDump,
    "routing_losses_dump": RoutingLossesDump,
    "evaluation": Evaluation,
    "gradients": Gradients,
}
OFF = {"gradients"}


class SaveConfig(SaveConfigCallback):
    """Writes the run's config.yaml once everything was checked; a run refused before its first step leaves nothing."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Nothing yet: Lightning's callback would write here, before the models were looked at."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.loggers:
            super().setup(trainer, pl_module, "fit")
        directory = run_directory(trainer)
        if trainer.is_global_zero and directory is not None:
            Path(directory, "environment.yaml").write_text(yaml.safe_dump(environment(trainer), sort_keys=False))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        fresh = getattr(trainer, "fresh_directory", None)
        started = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        refused = isinstance(exception, ValueError | MisconfigurationException) and not started
        if refused and fresh is not None and trainer.is_global_zero:
            shutil.rmtree(fresh, ignore_errors=True)


class OptionError(UserError):
    """A key or value that a parser does not take; the parser of the section it stands in adds the section's name."""


class Parser(LightningArgumentParser):
    """A parser whose errors are one line with the whole key, not the usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        section = re.match(r'Parser key "([\w.]+)"', str(message))
        inner = told(ex)
        if section and isinstance(inner, OptionError):
            raise OptionError(f"{section[1]}.{inner}")
        if inner:
            raise inner
        if misspelt := re.match(r"Option '([\w.]+)' is not accepted", str(message)):
            keys = [action.dest for action in self._actions if action.dest != "help"]
            raise OptionError(f"{misspelt[1]}: there is no such key; {did_you_mean(misspelt[1], keys)}")
        raise OptionError(shorten(str(message)))


def told(error: BaseException | None) -> UserError | None:
    """The UserError that an exception was raised from, which jsonargparse wraps in messages of its own."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def shorten(message: str) -> str:
    """One line of a jsonargparse message; of an optional class what its own keys say, not what null would be."""
    text = " ".join(message.split())
    union = re.search(
        r"Does not validate against any of the Union subtypes .*?Errors: - (.*?) Given value type: .*", text
    )
    if union:
        errors = [error for error in union[1].split(" - ") if "NoneType" not in error]
        errors = [error for error in errors if not error.startswith("Expected a <class '")] or errors
        given = text.rpartition("Given value: ")[2]
        text = text[: union.start()] + ", or ".join(errors) + f" (given: {given})"
    text = re.sub(r"Parser key \"([\w.]+)\"", r"\1", text)
    text = re.sub(r"^([\w.]+): - .*a dot import path string: (\S+).*", r"\1: \2 is no section; give its keys", text)
    return re.sub(r"Expected a typing.Literal\[(.*?)\]\. Got value: (\S+)", r"\2 is not one of \1", text)


class DistillCLI(LightningCLI):
    """LightningCLI of the one module and the one datamodule."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = kwargs.get("args")
        self.called = (sys.argv[1:] if given is None else given)[:1]
        super().__init__(*args, **kwargs)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The one that is called, or all where it is none: the parser of each takes a third of a second to build."""
        known = {name: LightningCLI.subcommands()[name] for name in ("fit", "validate", "test")}
        known["check"] = {"model", "datamodule"}
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
                    "monitor": "val/kl_div_T1",
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
        except UserError as error:
            misspelt = re.search(r"does not accept option '([\w.]+)'|[Uu]nrecognized arguments: --([\w.]+)", str(error))
            if misspelt is None:
                raise
            keys = {action.dest for sub in self._subcommand_parsers.values() for action in sub._actions}
            keys |= {key.rsplit(".", 1)[0] for key in keys}
            raise UserError(f"{error}: {did_you_mean(misspelt[1] or misspelt[2], sorted(keys))}") from None

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
        if self._get(self.config_init, "ckpt_path") == "last" and self.subcommand != "check":
            self._find_last(config.get("default_root_dir") or os.getcwd(), config.get("logger"))
        if self.subcommand in ("validate", "test") and config.get("logger") is None:
            config["logger"] = False  # they print what they measure; a run directory would hold nothing else
        if self.subcommand != "check":
            return self._instantiate_trainer(config, extra)
        here = {"accelerator": "auto", "devices": 1, "num_nodes": 1, "strategy": "auto", "logger": False}
        trainer = self._instantiate_trainer(config | here, extra)
        trainer.asked = config  # type: ignore[attr-defined]
        return trainer


def run(args: list[str] | None = None) -> DistillCLI:
    """Parses the command line (or `args`) and runs its subcommand.

    Raises:
        UserError: bad input, in one line.
    """
    quieten()
    try:
        return DistillCLI(
            DistillationModule,
            DistillationDataModule,
            save_config_callback=SaveConfig,
            trainer_class=DistillTrainer,
            trainer_defaults={"log_every_n_steps": 10, "enable_model_summary": False},
            seed_everything_default=0,
            parser_class=Parser,
            parser_kwargs={"prog": "distill"},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=args,
        )
    except (ValueError, MisconfigurationException) as error:
        if (ours := told(error)) is not None:
            raise ours from None
        if rare := re.search(r"`val_check_interval` \((\d+)\) must be less .* batches \((\d+)\)", str(error)):
            check_validation_interval(int(rare[1]), int(rare[2]))
        if isinstance(error, MisconfigurationException) or re.search("val_check_interval|Does not vali", str(error)):
            raise UserError(f"trainer: {shorten(str(error))}") from error
        raise
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            raise RunError(
                f"data.num_workers: {str(error).splitlines()[0]} Killed from outside, or out of memory: go on with "
                "--ckpt_path last, with fewer workers if it happens again"
            ) from error
        if "by peer" in str(error):  # gloo's words
            raise RunError(
                "trainer.devices: another process of this run has died, see what it said last; go on with "
                "--ckpt_path last"
            ) from error
        raise


def quieten() -> None:
    """Silences what libraries print that a user of a default run can do nothing about."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # LightningCLI's calls
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message="The dirpath has changed from")  # every run has a directory of its own
    warnings.filterwarnings("ignore", message="Precision .* is not supported by the model summary")
    chatter = re.compile(
        r"Tip:|^[GTHI]PU available|^Seed set|^Using .* Precision|^`Trainer\.\w+` stopped|^Loading `train_dataloader`"
        r"|^`weights_only` was not set"
    )
    names = ("pytorch.utilities.rank_zero", "fabric.utilities.rank_zero", "fabric.utilities.seed")
    for name in (*names, "pytorch.trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"lightning.{name}").addFilter(lambda record: not chatter.search(record.getMessage()))
