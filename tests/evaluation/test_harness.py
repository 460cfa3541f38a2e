"""Tasks within a run: when they are measured, what is logged of them, and that nothing else of the run changes."""

import csv
import importlib.util
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from distill.commands import export
from distill.errors import UserError
from distill.evaluation import harness, tasks
from distill.models.load import load_model, load_tokenizer
from helpers import local_task


@pytest.fixture
def run(config, distill, monkeypatch):
    """A run of eight steps and four validations on tasks whose scores are made up; the models that were measured."""
    measured: list[str] = []
    scores = iter([0.3, 0.9, 0.6, 0.5, 0.4])

    def run_tasks(manager, models, tokenizers, tasks, limit, batch_size, bars):
        (model,) = models.values()
        torch.rand(3)  # a task may draw
        teacher = not any(p.requires_grad for p in model.parameters())
        measured.append("teacher" if teacher else "student")
        bars.write("\rRunning loglikelihood requests:  50%|#####     | 3/6 [00:00<00:00, 61.2it/s]")
        acc = 0.8 if teacher else next(scores)
        return {"toy": {"model": {"acc": acc, "acc_stderr": 0.01, "exact_match,strict": acc / 2, "byte_nll": 3.0}}}

    monkeypatch.setattr(harness, "open_tasks", lambda tasks, folder, keys: (object(), tasks))
    monkeypatch.setattr(harness, "run_tasks", run_tasks)
    config["trainer"] |= {"max_steps": 8, "val_check_interval": 2, "num_sanity_val_steps": 0}

    def call(*args: str, **given):
        changed = config | given
        return distill("fit", changed, *args), measured

    call.config = config
    return call


def rows_of(cli) -> list[dict[str, str]]:
    with Path(cli.trainer.log_dir, "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["val/loss"]]


def scores_of(cli) -> list[float | None]:
    return [round(float(row["tasks/toy/acc"]), 6) if row["tasks/toy/acc"] else None for row in rows_of(cli)]


TOY = {"tasks": ["toy"], "every_n_validations": 2}
BY_TASK = {"monitor": "tasks/toy/acc", "mode": "max", "filename": "step={step}", "auto_insert_metric_name": False}
BY_TASK = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": BY_TASK}


def test_first_every_second_and_last_validation_and_the_teacher_once(run, capsys):
    cli, measured = run(harness=TOY, checkpoint=BY_TASK)
    assert measured == ["student", "teacher", "student", "student"]
    assert scores_of(cli) == [0.3, None, 0.9, 0.6]  # of validations at steps 2, 4, 6 and 8, the last one
    last = rows_of(cli)[-1]
    assert float(last["tasks/toy/teacher_acc"]) == pytest.approx(0.8)
    assert float(last["tasks/toy/acc_retention_percent"]) == pytest.approx(75)
    assert float(last["tasks/toy/exact_match_retention_percent,strict"]) == pytest.approx(75)
    assert not any("byte_nll_retention" in name or "teacher_acc_stderr" in name for name in last)
    out = capsys.readouterr().out
    assert "Best checkpoint: best.ckpt (step=6.ckpt), by the highest tasks/toy/acc, 0.9000 at step 6 of 8" in out
    (row,) = (line for line in out.splitlines() if re.match(r"│ tasks/toy/acc +│", line))
    assert re.split(r"\s*│\s*", row)[2:-1] == ["0.3000", "0.6000", "0.8000"]


def test_scores_before_training_begin_the_chart(run):
    run.config["trainer"]["num_sanity_val_steps"] = -1
    cli, measured = run(harness=TOY)
    assert measured == ["student", "teacher", *["student"] * 3]
    assert scores_of(cli) == [0.3, 0.9, None, 0.6, 0.5]


def test_nothing_else_of_the_run_changes(run):
    """Not even where each step draws random numbers."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_dropout": 0.3}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    del run.config["model"]["student_layers"], run.config["model"]["student_fit"]
    run.config["model"]["student_config"] = {"model_type": "llama", **sizes, **heads}
    plain = {name: value.clone() for name, value in run()[0].model.state_dict().items()}
    measured = run(harness=TOY | {"every_n_validations": 1})[0].model.state_dict()
    assert all(torch.equal(measured[name], value) for name, value in plain.items())


def test_a_resumed_run_goes_on_counting_and_chooses_the_same(run):
    cli, measured = run(harness=TOY, checkpoint=BY_TASK)
    folder = Path(cli.trainer.log_dir, "checkpoints")
    content = torch.load(folder / "previous.ckpt", weights_only=True)
    assert content["callbacks"]["Harness"]["validations"] == 3
    best = cli.trainer.checkpoint_callback.best_model_path
    before = len(measured)
    resumed, _ = run("--ckpt_path", str(folder / "previous.ckpt"), harness=TOY, checkpoint=BY_TASK)
    assert measured[before:] == ["student"]  # the last validation, and no teacher again
    assert resumed.trainer.checkpoint_callback.best_model_path == best


def test_refusals(run):
    for given, told in (
        ({"tasks": []}, "harness.tasks: []; name at least one task"),
        ({"tasks": ["toy"], "limit": 0}, "harness.limit: 0; give 1 or more"),
    ):
        with pytest.raises(UserError, match=re.escape(told)):
            run(harness=given)


@pytest.mark.parametrize("key", ["checkpoint", "early_stopping"])
def test_a_task_that_is_not_run_cannot_choose(run, key):
    name = "ModelCheckpoint" if key == "checkpoint" else "EarlyStopping"
    how = {
        "class_path": f"lightning.pytorch.callbacks.{name}",
        "init_args": {"monitor": "tasks/toi/acc", "mode": "max"},
    }
    told = f"{key}.monitor: tasks/toi/acc, but no task toi is run; did you mean 'toy'?"
    with pytest.raises(UserError, match=re.escape(told)):
        run(harness=TOY, **{key: how})


def test_a_score_that_no_task_has_is_named_beside_those_that_are_there(run):
    how = BY_TASK | {"init_args": BY_TASK["init_args"] | {"monitor": "tasks/toy/akk"}}
    told = "checkpoint.monitor: tasks/toy/akk is not among what this run measures; did you mean 'tasks/toy/acc'?"
    with pytest.raises(UserError, match=re.escape(told)):
        run(harness=TOY, checkpoint=how)


def test_a_line_where_no_terminal_shows_the_bars_of_tasks(run, capsys):
    run(harness=TOY, progress_lines={"every_seconds": 1e-9})
    out = capsys.readouterr().out
    assert "Step 2 of 8, tasks of the student: 3 of 6 requests" in out
    assert "Step 2 of 8, tasks of the teacher: 3 of 6 requests" in out


def test_tasks_whose_data_are_out_of_reach_are_told_before_a_model_is_loaded(monkeypatch):
    class Index:
        all_tasks = ("arc_easy",)

        def __init__(self, include_path):
            pass

        def load(self, names):
            raise ConnectionError(f"Couldn't reach the data of {names[0]}\non the hub")

    for name in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(TaskManager=Index))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    told = (
        "harness.tasks: arc_easy can't be loaded (Couldn't reach the data of arc_easy on the hub); connect to the hub"
    )
    with pytest.raises(UserError, match=re.escape(told)):
        tasks.open_tasks(["arc_easy"], None, ("harness.tasks", "harness.task_folder"))


def test_what_to_install_is_said_before_a_model_is_loaded(config, distill, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "lm_eval" else found(name, *more)
    )
    with pytest.raises(UserError, match=r"harness.tasks: needs lm_eval; run `pip install 'student-aware-dist"):
        distill("fit", config | {"harness": {"tasks": ["arc_easy"]}})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the harness and what it brings
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra `tasks`")
def test_a_local_task_scores_as_the_harness_scores_the_exported_student(config, distill, tmp_path):
    local_task.write(tmp_path)
    config["trainer"] |= {"max_steps": 4, "val_check_interval": 2, "num_sanity_val_steps": -1}
    how = {"tasks": [local_task.NAME], "task_folder": str(tmp_path), "limit": 3}
    cli = distill("fit", config | {"harness": how})
    logged = {name: float(value) for name, value in cli.trainer.callback_metrics.items() if name.startswith("tasks/")}
    exported = tmp_path / "exported"
    assert export.main([str(Path(cli.trainer.log_dir, "checkpoints", "last.ckpt")), str(exported)]) in (0, None)
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tmp_path))
    for path, name in ((exported, "acc"), (config["model"]["teacher"], "teacher_acc")):
        result = simple_evaluate(
            "hf",
            model_args=f"pretrained={path},dtype=float32",
            tasks=[local_task.NAME],
            task_manager=manager,
            device="cpu",
        )
        score = result["results"][local_task.NAME]["acc,none"]
        assert logged[f"tasks/{local_task.NAME}/{name}"] == pytest.approx(score, abs=1e-6)
        ours = local_task.accuracy(load_model(str(path)), load_tokenizer(str(path)))
        assert score == pytest.approx(ours, abs=1e-6)
