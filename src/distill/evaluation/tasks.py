"""Tasks of lm-evaluation-harness on models that are loaded already; an extra, since it brings two dozen packages.

Prompts are as the task files have them, without a chat template, for teacher and student alike. Several processes are
not used: the models are on one device.
"""

import importlib.util
import io
import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import Any, TextIO

from transformers import PreTrainedModel

from distill.errors import UserError, did_you_mean
from distill.models.quiet import quiet_transformers

SEED = 1234  # of few-shot examples, as the harness's own command has it


def open_tasks(
    tasks: Sequence[str], folder: str | None = None, keys: tuple[str, str] = ("--tasks", "--task_folder")
) -> tuple[Any, list[str]]:
    """The harness's index of tasks, once it is sure that it has these and their data: before any model is loaded.

    Args:
        tasks: names of tasks or groups, the harness's own or those of `folder`.
        folder: with task files of one's own.
        keys: what error messages call the two.

    Returns:
        The index, and the names of all tasks and groups that these stand for.

    Raises:
        UserError: the harness is not installed, no such task or folder, or data that can't be had.
    """
    if missing := [name for name in ("lm_eval", "accelerate") if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"{keys[0]}: needs {' and '.join(missing)}; run `pip install 'student-aware-distillation[tasks]'`"
        )
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"{keys[1]}: {folder} is no folder; correct the path")
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of a model that is loaded already
    manager = TaskManager(include_path=folder)
    if unknown := [name for name in tasks if name not in manager.all_tasks]:
        near = did_you_mean(unknown[0], manager.all_tasks)
        raise UserError(
            f"{keys[0]}: {unknown[0]!r} is no task; {near if near.startswith('did') else 'see `lm_eval --tasks list`'}"
        )
    names: list[str] = []
    for name in tasks:
        try:
            loaded = manager.load([name])
        except Exception as error:  # of the hub's client, of datasets, or of a task's own code
            why = " ".join(str(error).split())
            raise UserError(
                f"{keys[0]}: {name} can't be loaded ({why}); connect to the hub, or put the task right"
            ) from error
        names += [*loaded["tasks"], *loaded["groups"]]
    return manager, names


def run_tasks(
    manager: Any,
    models: Mapping[str, PreTrainedModel],
    tokenizers: Mapping[str, Any],
    tasks: Sequence[str],
    limit: int | None = None,
    batch_size: int = 4,
    bars: TextIO | None = None,
) -> dict[str, dict[str, dict[str, float]]]:
    """Every model's results on every task.

    Args:
        manager: of `open_tasks`.
        models: name -> model in eval mode.
        tokenizers: name -> its tokenizer.
        tasks: names of tasks or groups.
        limit: examples per task; all when None.
        batch_size: rows at a time.
        bars: what the harness's bars are written to where there is no terminal; nothing when None.

    Returns:
        Task -> model -> metric -> value, standard errors as `METRIC_stderr` where the harness has them.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    found: dict[str, dict[str, dict[str, float]]] = {}
    elsewhere = nullcontext() if sys.stderr.isatty() else redirect_stderr(bars or io.StringIO())
    with elsewhere, quiet_transformers():
        for name, model in models.items():
            wrapped = HFLM(pretrained=model, tokenizer=tokenizers[name], batch_size=batch_size)
            loaded = manager.load(list(tasks))
            for task in loaded["tasks"].values():
                task.set_fewshot_seed(seed=SEED)
            results = evaluate(wrapped, loaded, limit=limit, bootstrap_iters=0, log_samples=False)
            assert results is not None  # on one process
            for name_of_task, values in results["results"].items():
                found.setdefault(name_of_task, {})[name] = {
                    metric.removesuffix(",none"): float(value)
                    for metric, value in values.items()
                    if isinstance(value, int | float) and not metric.startswith("sample_")
                }
    return found
