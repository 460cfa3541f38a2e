"""The best checkpoint under a name that stays, `checkpoints/best.ckpt`, and in a sentence how it was chosen.

Reads: the first `ModelCheckpoint` that monitors something: its metric, best value and file. Writes: a symbolic link to
that file, in the run directory even where a resumed run's best is still the earlier run's.
"""

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, final

import lightning as L
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from distill.errors import UserError, did_you_mean
from distill.losses.engine.metrics import NAMES
from distill.training.build import vocabularies_of
from distill.training.callbacks.measured_on import key_of, monitoring
from distill.training.callbacks.text import run_directory
from distill.training.horizon import horizon_of
from distill.training.module import distilled

MORE_IS_BETTER = re.compile(r"(top\d_agreement|acceptance|acc|acc_norm|exact_match|f1|\w+_retention_percent)(,.*)?")

OF_SHARED_IDS = re.compile(r"val/([\w.-]+/)?(top\d_agreement|acceptance|teacher_\w+)")
DEFAULT_MONITOR, BETWEEN_TOKENIZERS = "val/kl_div_T1", "val/bits_per_byte"


@final
class BestLink(Checkpoint):
    """Keeps `best.ckpt`; a `Checkpoint` so that it comes after the one whose choice it follows."""

    def __init__(self) -> None:
        self.path, self.score = "", float("nan")
        self.step: int | None = None  # None = chosen by a run that did not say

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Chooses by what there is where teacher and student have different tokenizers; the data are set up by now."""
        if stage == "fit" and vocabularies_of(trainer) is not None:
            settle_monitors(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forgets an earlier run's best where `ExactResume`, which comes before, found that it does not compare."""
        kept = chooser(trainer)
        if kept is None or kept.best_model_score is None:
            self.path, self.step = "", None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            check_measured(trainer, distilled(pl_module).components)
        elif trainer.state.fn == TrainerFn.FITTING:
            self._follow(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._follow(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._follow(trainer)

    def _follow(self, trainer: L.Trainer) -> None:
        """Links what is the best now, where it has changed or is another run's."""
        kept = chooser(trainer)
        if kept is None or kept.best_model_score is None:
            return
        path, score = kept.best_model_path, float(kept.best_model_score)
        if (path, score) != (self.path, self.score):
            self.path, self.score, self.step = path, score, trainer.global_step
        link = Path(run_directory(trainer) or trainer.default_root_dir, "checkpoints", "best.ckpt")
        if trainer.is_global_zero and Path(path).exists() and not (link.exists() and link.samefile(path)):
            new = link.with_name("best.ckpt.new")
            with suppress(OSError):  # file systems without links; the closing line says which file it is
                link.parent.mkdir(parents=True, exist_ok=True)
                new.unlink(missing_ok=True)
                new.symlink_to(os.path.relpath(path, link.parent))
                new.replace(link)

    def told(self, trainer: L.Trainer) -> str | None:
        """By what the best checkpoint was chosen, and at which step; None where there is none."""
        kept = chooser(trainer)
        if kept is None or not self.path:
            return None
        extreme = "highest" if kept.mode == "max" else "lowest"
        at = f" at step {self.step:,} of {horizon_of(trainer):,}" if self.step is not None else ""
        file = f"best.ckpt ({Path(self.path).name})"
        return f"Best checkpoint: {file}, by the {extreme} {kept.monitor}, {self.score:.4f}{at}"

    def state_dict(self) -> dict[str, Any]:
        return {"path": self.path, "score": self.score, "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.path, self.score, self.step = state_dict["path"], state_dict["score"], state_dict["step"]


def chooser(trainer: L.Trainer) -> ModelCheckpoint | None:
    """The first callback that keeps the best by a metric."""
    kept = (one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint))
    return next((one for one in kept if one.monitor is not None), None)


def settle_monitors(trainer: L.Trainer) -> None:
    """Across tokenizers the default metric gives way to bits per byte, which is the same for all of them.

    Raises:
        UserError: a callback was given a metric that compares ids, which there is not.
    """
    kept = chooser(trainer)
    if kept is not None and kept.monitor == DEFAULT_MONITOR:
        kept.monitor = BETWEEN_TOKENIZERS
        rank_zero_info(f"checkpoint.monitor: {BETWEEN_TOKENIZERS}, since the student has a tokenizer of its own.")
    for one in monitoring(trainer):
        if OF_SHARED_IDS.fullmatch(monitor := str(one.monitor)):
            raise UserError(
                f"{key_of(one)}.monitor: {monitor} compares the same ids on both sides, and the student has a "
                f"tokenizer of its own; set {monitor.rpartition('/')[0]}/bits_per_byte"
            )


def check_measured(trainer: L.Trainer, components: Iterable[str]) -> None:
    """Refuses to choose or stop by what the check before training has not measured, while nothing is lost yet.

    Args:
        trainer: at the end of that check.
        components: whose losses appear with their weight.

    Raises:
        UserError: names key and remedy.
    """
    measured = [name for name in trainer.callback_metrics if name.startswith("val/")]
    later = {*components, *NAMES}  # of which a few rows may have none
    for one in monitoring(trainer):
        monitor = str(one.monitor)
        if monitor.startswith("val/") and monitor.rpartition("/")[2] not in later and monitor not in measured:
            near = did_you_mean(monitor, measured)
            raise UserError(f"{key_of(one)}.monitor: {monitor} is not among what this run measures; {near}")


def check_monitors(callbacks: Iterable[Callback], sets: Iterable[str], tasks: bool) -> None:
    """Refuses to choose or stop by what will not be there, or by the wrong end of a scale, before anything is loaded.

    Args:
        callbacks: of the trainer.
        sets: names of the validation sets.
        tasks: whether tasks are run.

    Raises:
        UserError: names key and remedy.
    """
    names = list(sets)
    for one in callbacks:
        if not isinstance(one, ModelCheckpoint | EarlyStopping) or one.monitor is None:
            continue
        key = key_of(one)
        first, *parts = one.monitor.split("/")
        if one.mode == "min" and MORE_IS_BETTER.fullmatch(one.monitor.rpartition("/")[2]):
            raise UserError(f"{key}.mode: min, but more of {one.monitor} is better; set {key}.mode: max")
        if first == "val" and len(parts) == 2 and parts[0] not in names:
            near = did_you_mean(parts[0], names) if names else "data.validation names none"
            raise UserError(f"{key}.monitor: {one.monitor}, but no validation set is called {parts[0]}; {near}")
        if first == "tasks" and not tasks:
            raise UserError(f"{key}.monitor: {one.monitor}, but no task is run; name it in harness.tasks")


def check_tasks(trainer: L.Trainer, tasks: Iterable[str]) -> None:
    """Refuses to choose or stop by a task that is not run.

    Args:
        trainer: whose callbacks choose or stop.
        tasks: all that are run, groups among them.

    Raises:
        UserError: names key and remedy.
    """
    names = list(tasks)
    for one in monitoring(trainer):
        task = re.fullmatch(r"tasks/(.+)/[^/]+", str(one.monitor))
        if task is not None and task[1] not in names:
            raise UserError(
                f"{key_of(one)}.monitor: {one.monitor}, but no task {task[1]} is run; {did_you_mean(task[1], names)}"
            )
