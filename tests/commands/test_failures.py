"""What the system, torch or Lightning lack or break off with is one line, with an exit code, and no traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.fabric.utilities.spike import TrainingSpikeException
from torch._inductor.exc import InductorError

from distill.checkpoints.files import check_writable
from distill.cli import main
from distill.commands.failures import explained
from distill.errors import AuditError, RunError, UserError
from distill.training.callbacks import text
from distill.training.module import DistillationModule


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (
            PermissionError(13, "Permission denied", "/run/x"),
            RunError,
            "^/run/x can't be read or written .Permission",
        ),
        (
            OSError(28, "No space left on device"),
            RunError,
            "^a file of the run can't be .*No space.*--ckpt_path l",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
            RunError,
            "batch_size: out of memory",
        ),
        (
            TrainingSpikeException(6),
            RunError,
            "^trainer.callbacks: SpikeDetection has stopped .*batch 6.*--ckpt_path l",
        ),
        (
            PermissionError(30, "Read-only file system", os.path.expanduser("~/.cache/huggingface")),
            UserError,
            "^HOME: .*huggingface can't be read or written .Read-only file system.; set XDG_CACHE_HOME to a folder",
        ),
        (
            ValueError("-1 is not in bounds, numpy accepts from 0 to 9"),
            UserError,
            "^seed_everything: -1 .*give 0 to 9",
        ),
        (ModuleNotFoundError("Requirement 'wandb>=0.12' not met."), UserError, "^trainer: Requirement 'wandb>=0.12'"),
        (InductorError(RuntimeError("no compiler"), None), UserError, "^model.torch_compile: .*no compiler.*to false$"),
    ],
)
def test_sentences(error, kind, told):
    found = explained(error)
    assert type(found) is kind
    with pytest.raises(kind, match=told):
        raise found


@pytest.mark.parametrize("error", [AuditError("gradient"), ValueError("a bug"), KeyError("a"), BrokenPipeError(32, "")])
def test_what_is_known_already_or_a_bug_stays_as_it_is(error):
    assert explained(error) is None


@pytest.mark.parametrize("limit", [0, 1.0])
def test_a_metric_to_stop_by_that_is_never_measured(config, distill, limit):
    """Where no validation before training has told."""
    config["trainer"] |= {"num_sanity_val_steps": 0, "limit_val_batches": limit, "max_steps": 1}
    config["early_stopping"] = {"class_path": "EarlyStopping", "init_args": {"monitor": "val/kl_dv_T1"}}
    near = r"did you mean 'val/kl_div_T1'\?" if limit else "nothing is validated, see trainer.limit_val_batches"
    with pytest.raises(UserError, match=rf"^early_stopping.monitor: val/kl_dv_T1 is not among what .*; {near}$"):
        distill("fit", config)


def test_a_metric_to_choose_by_that_is_never_measured(config, distill):
    config["trainer"] |= {"num_sanity_val_steps": 0, "max_steps": 1}
    config["checkpoint"] = {"class_path": "ModelCheckpoint", "init_args": {"monitor": "val/los"}}
    near = r"did you mean 'val/loss'\?"
    with pytest.raises(UserError, match=rf"^checkpoint.monitor: val/los is not among what this run measures; {near}$"):
        distill("fit", config)


def test_callbacks_with_enumerations_among_their_defaults(config, distill):
    """`Timer` has one, which no YAML represents."""
    timer = {"class_path": "lightning.pytorch.callbacks.Timer", "init_args": {"duration": "00:01:00:00"}}
    config["trainer"] |= {"max_steps": 1, "limit_val_batches": 0, "callbacks": [timer]}
    run = distill("fit", config | {"checkpoint": None})
    written = yaml.safe_load(Path(run.trainer.log_dir, "config.yaml").read_text())
    assert written["trainer"]["callbacks"][0]["init_args"]["interval"] == "step"


def test_a_log_that_can_no_longer_be_written_stops_the_run_in_one_line(config, distill, monkeypatch, tmp_path):
    def full(directory, block):
        if "Step 2" in block:
            raise OSError(28, "No space left on device", f"{directory}/training.log")

    monkeypatch.setattr(text, "write", full)
    with pytest.raises(RunError, match=r"version_0/training.log can't be read or written \(No space left .*--ckpt_p"):
        distill("fit", config)
    assert (tmp_path / "lightning_logs" / "version_0" / "config.yaml").exists(), "it had begun"


def test_a_run_that_breaks_before_its_first_step_leaves_no_directory(config, distill, monkeypatch, tmp_path):
    def compile_none(self, *args, **kwargs):
        raise InductorError(RuntimeError("No working C++ compiler"), None)

    monkeypatch.setattr(DistillationModule, "losses", compile_none)
    with pytest.raises(UserError, match=r"model.torch_compile: torch cannot compile here"):
        distill("fit", config)
    assert not list(tmp_path.glob("lightning_logs/version_*"))


def test_other_commands_end_in_one_line_too(monkeypatch, capsys):
    def fail(arguments):
        raise PermissionError(13, "Permission denied", "r.html")

    monkeypatch.setattr("distill.commands.report.main", fail)
    monkeypatch.setattr("sys.argv", ["distill", "report", "run"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    assert capsys.readouterr().err == "error: r.html: Permission denied; put that right and try again\n"


def test_a_reader_that_has_seen_enough_is_no_error():
    program = "import sys, distill.cli as c, distill.commands.report as r; sys.argv = ['distill', 'report', 'x']\n"
    program += "r.main = lambda arguments: print('line\\n' * 100_000)\nc.main()"
    command = f'{sys.executable} -c "{program}" | head -1; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("line\n141\n", "")


def test_trying_a_directory_leaves_nothing_in_it(tmp_path):
    check_writable(tmp_path / "deep" / "down", "key")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("x")
    for place in ("file", "file/below", f"{'n' * 300}/below"):
        with pytest.raises(UserError, match=r"^key: .* can't be written \(.*\); name another place"):
            check_writable(tmp_path / place, "key")
