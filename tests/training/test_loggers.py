"""Any Lightning logger takes the place of the default ones: the same names, and everything else in one directory."""

import csv
import os
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distill.checkpoints.files import earlier_runs, find_last, write
from distill.errors import UserError
from distill.training.callbacks.curriculum import Curriculum
from helpers.recorder import Recorder
from helpers.training_log import parse

ALWAYS = {"train/loss", "train/kd_loss", "curriculum/kd", "train/grad_norm", "val/loss", "val/kl_div_T1", "val/ece"}


def logger(path: str, **init_args) -> dict:
    return {"class_path": path, "init_args": init_args}


def run_of(distill, config, directory: str):
    """A short run, and its directory, in which nothing may be missing and beside which nothing may lie."""
    config["trainer"] |= {"max_steps": 3}
    cli = distill("fit", config)
    run = Path(directory)
    kinds = {block.kind for block in parse((run / "training.log").read_text())}
    assert kinds == {"TRAIN DEBUG", "CURRICULUM", "KD LOSS", "ROUTING LOSSES", "Eval"}
    assert (run / "config.yaml").exists()
    assert list((run / "checkpoints").glob("*.ckpt"))
    assert not Path("lightning_logs").exists()
    return cli


@pytest.mark.filterwarnings("ignore:.* exists and is not empty")  # Lightning's, before we refuse it
def test_last_is_looked_for_where_this_logger_writes(distill, config, caplog):
    config["trainer"]["max_steps"] = 1
    del config["model"]["routing"]
    config["train_debug"] = None
    other = distill("fit", config)
    assert distill("fit", config, "--ckpt_path", "last").trainer.ckpt_path.startswith(other.trainer.log_dir)
    csv = logger("lightning.pytorch.loggers.CSVLogger", save_dir="logs", name="mine")
    config["trainer"]["logger"] = csv
    first = distill("fit", config, "--ckpt_path", "last")
    assert (first.trainer.ckpt_path, first.trainer.log_dir) == (None, "logs/mine/version_0")
    caplog.clear()
    again = distill("fit", config, "--ckpt_path", "last").trainer
    assert (again.ckpt_path, again.log_dir) == ("logs/mine/version_0/checkpoints/last.ckpt", "logs/mine/version_1")
    told = f"last is {again.ckpt_path} (teacher {config['model']['teacher']}, data {config['data']['dataset']})"
    assert told in caplog.text
    assert yaml.safe_load(Path("logs/mine/version_1/environment.yaml").read_text())["resumed_from"] == str(
        Path(again.ckpt_path).absolute()
    )
    csv["init_args"]["version"] = "fixed"
    assert distill("fit", config, "--ckpt_path", "last").trainer.ckpt_path is None
    assert earlier_runs(".", CSVLogger("logs", "mine", "fixed")) == [Path("logs/mine/fixed")]
    with pytest.raises(UserError, match=r"trainer.logger: its directory holds a run already; leave the version out"):
        distill("fit", config, "--ckpt_path", "last")
    for other in ("other", 7):  # versions of their own go on from nobody else's
        assert find_last(earlier_runs(".", CSVLogger("logs", "mine", other))) is None


def test_a_logger_that_numbers_runs_otherwise_goes_by_time(tmp_path):
    for age, name in enumerate(("old", "new")):
        write({}, tmp_path / "recorder" / name / "checkpoints" / "last.ckpt")
        os.utime(tmp_path / "recorder" / name / "checkpoints", (age, age))
    found = earlier_runs(tmp_path, Recorder(version="mine"))
    assert [run.name for run in found] == ["new", "old"]


def test_validation_leaves_nothing_behind_unless_a_logger_is_asked_for(distill, config, tmp_path):
    config["data"]["max_validation_sequences"] = 4
    before = set(tmp_path.rglob("*"))
    distill("validate", config)
    assert {path.name for path in set(tmp_path.rglob("*")) - before} == {"config.yaml"}  # which the test wrote
    distill("validate", config, "--trainer.logger", "true")
    assert Path("lightning_logs/version_0/metrics.csv").exists()


@pytest.mark.parametrize(("version", "folder"), [("abc", "abc"), (None, "version_3")])
def test_a_logger_without_a_directory_gets_one_by_its_name_and_version(distill, config, version, folder):
    config["trainer"]["logger"] = logger("helpers.recorder.Recorder", version=version)
    names = run_of(distill, config, f"recorder/{folder}").trainer.logger.names
    assert names >= ALWAYS


def test_own_loggers_are_given_the_names_of_the_default_ones(distill, config):
    config["trainer"]["logger"] = [
        logger("lightning.pytorch.loggers.CSVLogger", save_dir="logs", name="mine"),
        logger("helpers.recorder.Recorder"),
    ]
    first, second = run_of(distill, config, "logs/mine/version_0").trainer.loggers
    assert isinstance(first, CSVLogger)
    with Path(first.log_dir, "metrics.csv").open() as file:
        header = set(next(csv.reader(file)))
    assert header - {"step"} == second.names
    assert second.names >= ALWAYS


def test_loggers_are_given_the_configuration_but_their_own(distill, config):
    own = logger("lightning.pytorch.loggers.CSVLogger", save_dir="logs", name="mine")
    config["trainer"]["logger"] = [own, logger("helpers.recorder.Recorder")]
    params = run_of(distill, config, "logs/mine/version_0").trainer.loggers[1].params
    assert params["model"]["student_layers"] == 2
    assert params["curriculum"]["kd"] == 0.7
    assert params["trainer"]["max_steps"] == 3
    assert "logger" not in params["trainer"]
    assert yaml.safe_load(Path("logs/mine/version_0/hparams.yaml").read_text()) == params


def test_the_default_plots_have_no_curve_of_hyperparameters(distill, config):
    config["trainer"] |= {"max_steps": 2}
    run = distill("fit", config).trainer.log_dir
    events = EventAccumulator(run).Reload()
    assert "train/loss" in events.Tags()["scalars"]
    assert "hp_metric" not in events.Tags()["scalars"]


ONE_AFTER_THE_OTHER = {
    "kd": [[0.0, 1.0], [0.25, 0.5]],
    "lm": [[0.5, 0.0], [0.5, 0.4]],
    "layerwise": [[0.25, 0.2], [0.25, 0.0], [0.75, 0.0], [0.75, 0.3]],
    "feature": [[0.1, 0.1], [0.5, 0.0]],
    "attention": 0.0,
}


@pytest.mark.parametrize("every", [1, 3])
def test_every_row_of_every_logger_adds_up(distill, config, every):
    """Components that come and go within an epoch; a stop at a step of which the loggers take nothing."""
    recorder = logger("helpers.recorder.Recorder")
    csv_logger = logger("lightning.pytorch.loggers.CSVLogger", save_dir="logs", name="mine")
    config["model"]["layerwise"] = {}
    config["curriculum"] = ONE_AFTER_THE_OTHER
    stop = {"class_path": "helpers.stops.Stop", "init_args": {"hook": "on_train_batch_end", "batch": 20}}
    config["trainer"] |= {"max_steps": 16, "accumulate_grad_batches": 2, "log_every_n_steps": every}
    config["trainer"] |= {"logger": [csv_logger, recorder], "callbacks": [stop, {"class_path": "helpers.stops.Logs"}]}
    cli = distill("fit", config)
    assert cli.trainer.global_step == 11
    curriculum = next(callback for callback in cli.trainer.callbacks if isinstance(callback, Curriculum))
    with Path(cli.trainer.loggers[0].log_dir, "metrics.csv").open() as file:
        from_csv = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    for rows, step in ((from_csv, "step"), (cli.trainer.loggers[1].rows, "at")):
        trained = {int(row[step]): row for row in rows if "train/loss" in row}
        assert list(trained) == list(range(every - 1, 11, every))
        for at, row in trained.items():
            scaled = {name.removesuffix("_scaled"): value for name, value in row.items() if name.endswith("_scaled")}
            assert sum(scaled.values()) == pytest.approx(row["train/loss"], rel=1e-6)
            assert {f"train/{name}" for name in cli.model.components} & row.keys() == scaled.keys()
            weights = curriculum.state_at(at, 16).weights
            assert ("train/layerwise_loss" in scaled) == (weights["layerwise"] > 0), at
            assert row["own/each_step"] == at
        assert len([row for row in rows if "own/each_step" in row]) in (len(trained), len(trained) + 1)  # and the last
        (mean,) = {row["own/mean"] for row in rows if "own/mean" in row}
        assert mean == pytest.approx(10.5), "of all 22 micro-batches"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mlflow_keeps_the_same_names_in_its_local_store(distill, config, monkeypatch, tmp_path):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    options = {"experiment_name": "tried", "save_dir": "mlruns"}
    config["trainer"]["logger"] = logger("lightning.pytorch.loggers.MLFlowLogger", **options)
    config["trainer"] |= {"max_steps": 3}
    cli = distill("fit", config)
    run = tmp_path / "mlruns" / cli.trainer.logger.experiment_id / cli.trainer.logger.run_id
    assert parse((run / "training.log").read_text())
    metrics = run / "metrics"
    names = {str(path.relative_to(metrics)) for path in metrics.rglob("*") if path.is_file()}
    assert names >= ALWAYS
    recorded = float((metrics / "val" / "kl_div_T1").read_text().split()[1])
    assert recorded == pytest.approx(float(cli.trainer.callback_metrics["val/kl_div_T1"]), rel=1e-6)
    assert not (tmp_path / "lightning_logs").exists()


def test_a_tilde_is_the_home_of_a_run_too(config, distill, monkeypatch, tmp_path):
    """As of models, data and exports; no shell expands it behind `=` or in YAML."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    config["trainer"] |= {"max_steps": 1, "limit_val_batches": 0, "default_root_dir": "~/runs"}
    run = distill("fit", config | {"checkpoint": None})
    assert run.trainer.log_dir == str(tmp_path / "home" / "runs" / "lightning_logs" / "version_0")
    again = distill("fit", config | {"checkpoint": None}, "--ckpt_path", "last")
    assert str(again.trainer.ckpt_path).startswith(str(tmp_path / "home"))
    assert not (tmp_path / "~").exists()
