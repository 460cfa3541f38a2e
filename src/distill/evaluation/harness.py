"""Tasks of lm-evaluation-harness while a run trains, since a KL on text like the training text can't see what is lost.

Every process runs all requests: the others would only wait for the first one, longer than collectives may take, and a
sharded student needs them all. What is drawn meanwhile leaves the run's random numbers as they were. A signal to stop
waits for the end of the tasks.

Reads: both models, the datamodule's tokenizer. Logs: `tasks/TASK/METRIC` of the student, `tasks/TASK/teacher_METRIC`,
measured once a run, and `tasks/TASK/METRIC_retention_percent`, the student's score in percent of the teacher's.
"""

import copy
import io
import random
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, final

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from transformers import PreTrainedModel

from distill.errors import UserError
from distill.evaluation.tasks import SEED, open_tasks, run_tasks
from distill.training.callbacks.best import MORE_IS_BETTER, check_tasks
from distill.training.callbacks.progress_lines import ProgressLines
from distill.training.callbacks.resume import random_state, set_random_state
from distill.training.horizon import horizon_of
from distill.training.lightning_internals import callbacks_of
from distill.training.module import DistillationModule, distilled

Scores = dict[str, dict[str, float]]  # task -> metric -> value


@final
class Harness(Callback):
    """Measures student and teacher on tasks with the first validation, every so many after it, and the last one.

    Before training too, where `trainer.num_sanity_val_steps` is -1, which makes that check a whole validation. Between
    two measurements the last scores count for whatever monitors them.

    Args:
        tasks: names of tasks or groups of lm-evaluation-harness.
        every_n_validations: between two measurements.
        limit: examples per task; null = all.
        task_folder: with task files of your own.

    Raises:
        UserError: no task is named, or a number is not above zero; later, no such task or no harness.
    """

    def __init__(
        self,
        tasks: list[str],
        every_n_validations: int = 1,
        limit: int | None = None,
        task_folder: str | None = None,
    ) -> None:
        if not tasks:
            raise UserError("harness.tasks: []; name at least one task, or set harness: null")
        for key, value in (("every_n_validations", every_n_validations), ("limit", limit)):
            if value is not None and value < 1:
                raise UserError(f"harness.{key}: {value}; give 1 or more")
        self.tasks, self.every_n_validations = tasks, every_n_validations
        self.limit, self.task_folder = limit, task_folder
        self.manager: Any = None
        self.validations = 0
        self.teacher: Scores | None = None
        self.figures: dict[str, float] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Finds the tasks before any model is loaded."""
        if stage == "fit":
            keys = ("harness.tasks", "harness.task_folder")
            self.manager, names = open_tasks(self.tasks, self.task_folder, keys)
            check_tasks(trainer, names)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if trainer.sanity_checking:
            due = trainer.num_sanity_val_steps == float("inf")
        else:
            due = self.validations % self.every_n_validations == 0 or trainer.global_step >= horizon_of(trainer)
            self.validations += 1
        if due:
            self.figures = self._measure(trainer, distilled(pl_module))
            pl_module.log_dict(self.figures)
        elif not trainer.sanity_checking:
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in self.figures.items()})

    def _measure(self, trainer: L.Trainer, module: DistillationModule) -> dict[str, float]:
        """Figures of this moment, by their names in the log; collective."""
        assert module.student is not None
        assert module.teacher is not None
        with _undisturbed(trainer, module.options.torch_compile):
            student = self._scores(trainer, module.student)
            if self.teacher is None:
                meta = module.teacher.model.device.type == "meta"  # a source without weights
                self.teacher = {} if meta else self._scores(trainer, module.teacher.model, of_teacher=True)
        figures = {}
        for task, scores in student.items():
            for name, value in scores.items():
                figures[f"tasks/{task}/{name}"] = value
                goal = self.teacher.get(task, {}).get(name)
                if goal is None or "_stderr" in name:
                    continue
                figures[f"tasks/{task}/teacher_{name}"] = goal
                if goal > 0 and MORE_IS_BETTER.fullmatch(name):
                    metric, comma, selection = name.partition(",")
                    figures[f"tasks/{task}/{metric}_retention_percent{comma}{selection}"] = 100 * value / goal
        return trainer.strategy.broadcast(figures)

    def _scores(self, trainer: L.Trainer, model: PreTrainedModel, of_teacher: bool = False) -> Scores:
        """A model's results on every task, with its side's tokenizer."""
        data: Any = getattr(trainer, "datamodule", None)
        if getattr(data, "tokenizer", None) is None:
            raise UserError("harness.tasks: need a datamodule with a tokenizer; give a DistillationDataModule")
        random.seed(SEED), np.random.seed(SEED), torch.manual_seed(SEED)
        own = getattr(data, "tokenizers", None)
        tokenizer = own.teacher if of_teacher and own is not None else data.tokenizer
        tokenizers = {"model": copy.deepcopy(tokenizer)}  # the harness gives it a token that pads
        rows, bars = data.per_device_batch_size, _Bars(trainer, "teacher" if of_teacher else "student")
        found = run_tasks(self.manager, {"model": model}, tokenizers, self.tasks, self.limit, rows, bars)
        return {task: by_model["model"] for task, by_model in found.items()}

    def state_dict(self) -> dict[str, Any]:
        asked = {"tasks": self.tasks, "limit": self.limit}
        return {"validations": self.validations, "teacher": self.teacher, "figures": self.figures, "asked": asked}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["asked"] == {"tasks": self.tasks, "limit": self.limit}:
            self.validations, self.teacher = state_dict["validations"], state_dict["teacher"]
            self.figures = state_dict["figures"]


class _Bars(io.StringIO):
    """What the harness's bars say, as lines of `ProgressLines`, where there is no terminal for them."""

    def __init__(self, trainer: L.Trainer, of: str) -> None:
        super().__init__()
        self.trainer, self.of = trainer, of

    def write(self, text: str) -> int:
        if (at := re.search(r"requests:.*\| (\d+)/(\d+) \[", text)) is not None:
            for lines in callbacks_of(self.trainer, ProgressLines):
                lines.tell(self.trainer, f"tasks of the {self.of}: {at[1]} of {at[2]} requests")
        return len(text)


@contextmanager
def _undisturbed(trainer: L.Trainer, compiled: bool) -> Iterator[None]:
    """Within it random numbers may be drawn, the trainer's bar makes room, and no shape of a prompt is compiled for."""
    bar, before = trainer.progress_bar_callback, random_state()
    live = bar.progress if isinstance(bar, RichProgressBar) else None
    with ExitStack() as stack:
        stack.callback(set_random_state, before)
        if live is not None and live.live.is_started:
            live.stop()
            stack.callback(live.start)
        if compiled:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
