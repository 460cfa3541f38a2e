"""What can go wrong around a run, provoked: what is on disk afterwards, what is said, and the exit code."""

import csv
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from distill.checkpoints.files import earlier_runs, find_last, is_whole, write
from distill.errors import AuditError, RunError, UserError
from distill.training.callbacks.audit import PATIENCE
from distill.training.module import DistillationModule

QUIET = dict.fromkeys(["train_debug", "curriculum_dump", "kd_loss_dump", "routing_losses_dump", "checkpoint"])


@pytest.fixture
def small(config):
    """A configuration without blocks and best checkpoints, six steps long, whose dropout makes random numbers count."""
    sizes = {"vocab_size": 320, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_dropout": 0.3}
    del config["model"]["student_layers"], config["model"]["routing"]
    config["model"]["student_config"] = {"model_type": "llama", **sizes, **heads}
    config["trainer"] |= {"max_steps": 6, "num_sanity_val_steps": 0}
    config["data"]["max_validation_sequences"] = 4
    return config | QUIET


def last_of(cli) -> Path:
    return Path(cli.trainer.log_dir, "checkpoints", "last.ckpt")


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def assert_same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def spoil_step(monkeypatch, *steps: int, what: str = "gradient") -> None:
    """Makes the gradient, or the loss, of these steps not finite."""
    if what == "gradient":

        def spoil(self):
            if self.curriculum.step in steps:
                next(self.student.parameters()).grad[0, 0] = float("nan")

        monkeypatch.setattr(DistillationModule, "on_after_backward", spoil)
        return
    true = DistillationModule.losses

    def losses(self, *args, **kwargs):
        result = true(self, *args, **kwargs)
        if self.training and self.curriculum.step in steps:  # without a trace in the gradient of its own
            result = replace(result, total=result.total + float("inf"))
            result.breakdown.raw["kd_loss"] = result.breakdown.raw["kd_loss"] + float("inf")
        return result

    monkeypatch.setattr(DistillationModule, "losses", losses)


@pytest.mark.parametrize("what", [pytest.param("gradient", marks=pytest.mark.slow), "loss"])
def test_a_stop_leaves_weights_and_checkpoint_from_before_the_step(distill, small, monkeypatch, what, tmp_path):
    good = weights_of(last_of(distill("fit", small, "--trainer.max_steps", "6", "--trainer.val_check_interval", "3")))
    assert all(value.isfinite().all() for value in good.values())
    spoil_step(monkeypatch, 3, what=what)
    with pytest.raises(AuditError, match="gradient: not finite in training at step 3; the batch was saved to"):
        distill("fit", small, "--last_checkpoint.every_n_steps", "1")
    stopped = tmp_path / "lightning_logs" / "version_1"
    assert torch.load(stopped / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3
    assert (stopped / "nonfinite_batch.pt").exists()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert_same(weights_of(last_of(distill("fit", small, "--ckpt_path", "last"))), good)


@pytest.mark.filterwarnings("ignore:.*step skipped")
@pytest.mark.parametrize("accumulation", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_skipped_step_touches_nothing_and_is_counted(distill, small, monkeypatch, accumulation):
    small["trainer"]["accumulate_grad_batches"] = accumulation
    states = []

    def note(self, outputs, batch, batch_idx):
        optimizer = self.trainer.optimizers[0]
        moments = [value.clone() for state in optimizer.state.values() for value in state.values()]
        states.append([p.detach().clone() for p in self.parameters()] + moments)

    monkeypatch.setattr(DistillationModule, "on_train_batch_end", note)
    spoil_step(monkeypatch, 2, 3)
    with pytest.warns(UserWarning, match="gradient: not finite in training at step 3: step skipped, the 2. of this"):
        cli = distill("fit", small, "--audit.on_nonfinite", "skip", "--trainer.limit_val_batches", "0")
    ends = states[accumulation - 1 :: accumulation]
    for before, after, moved in ((1, 2, False), (2, 3, False), (3, 4, True)):
        same = all(torch.equal(a, b) for a, b in zip(ends[before], ends[after], strict=True))
        assert same != moved, (before, after)
    scheduler = cli.trainer.lr_scheduler_configs[0].scheduler
    assert (cli.trainer.global_step, scheduler.last_epoch) == (6, 4)
    with Path(cli.trainer.log_dir, "metrics.csv").open() as file:
        counted = [row["train/skipped_steps"] for row in csv.DictReader(file) if row["train/skipped_steps"]]
    known = {1: [0, 0, 0, 0, 1, 2], 2: [0, 0, 0, 1, 2, 2]}  # one micro-batch late
    assert [float(count) for count in counted] == known[accumulation]
    assert Path(cli.trainer.log_dir, "nonfinite_batch.pt").exists()


@pytest.mark.filterwarnings("ignore:.*step skipped")
def test_skipping_gives_up_where_nothing_else_happens(distill, small, monkeypatch):
    spoil_step(monkeypatch, *range(30))
    with pytest.raises(AuditError, match=f"as in the {PATIENCE - 1} steps before it"):
        distill("fit", small, "--audit.on_nonfinite", "skip", "--trainer.max_steps", "30")


@pytest.mark.parametrize(
    ("number", "code", "where"), [(signal.SIGTERM, 143, "window"), (signal.SIGINT, 130, "validation")]
)
def test_a_signal_writes_a_checkpoint_that_resumes_exactly(distill, small, monkeypatch, number, code, where, capsys):
    small["trainer"] |= {"accumulate_grad_batches": 2, "val_check_interval": 4}
    small["data"] |= {"max_validation_sequences": 12, "num_workers": 1}
    unbroken = weights_of(last_of(distill("fit", small)))
    hook = {"window": "training_step", "validation": "validation_step"}[where]
    true = getattr(DistillationModule, hook)

    def kill(self, batch, batch_idx):
        if batch_idx == (6 if where == "window" else 1) and self.trainer.global_step in (2, 3):
            for process in [os.getpid(), *(worker.pid for worker in multiprocessing.active_children())]:
                os.kill(process, number)  # as a terminal and most schedulers do
        return true(self, batch, batch_idx)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(DistillationModule, hook, kill)
        with pytest.raises(SystemExit) as stop:
            distill("fit", small)
    assert stop.value.code == code
    assert signal.getsignal(number) == before
    step = 4 if where == "window" else 2
    assert f"Stopped by {number.name} at step {step}; --ckpt_path last goes on" in capsys.readouterr().err
    assert_same(weights_of(last_of(distill("fit", small, "--ckpt_path", "last"))), unbroken)


def test_a_refused_run_leaves_the_directory_that_another_has_taken(distill, small, tmp_path, monkeypatch):
    taken = tmp_path / "lightning_logs" / "version_0"

    def refuse(self):
        taken.mkdir(parents=True, exist_ok=True)
        (taken / "config.yaml").write_text("model: {}")
        raise UserError("model.student: refused")

    monkeypatch.setattr(DistillationModule, "configure_model", refuse)
    with pytest.raises(UserError, match="refused"):
        distill("fit", small)
    assert (taken / "config.yaml").read_text() == "model: {}"


@pytest.mark.parametrize("score", [0.0, 99.0])
def test_the_best_before_a_resume_is_the_one_to_beat(distill, small, score):
    """A resumed run has a directory of its own; Lightning alone would call its first validation the best."""
    del small["checkpoint"]
    small["trainer"]["val_check_interval"] = 2
    first = distill("fit", small)
    (best,) = Path(first.trainer.log_dir, "checkpoints").glob("step=*.ckpt")
    earlier = last_of(first).with_name("previous.ckpt")
    content = torch.load(earlier, weights_only=True)
    (state,) = (value for key, value in content["callbacks"].items() if key.startswith("ModelCheckpoint"))
    value = torch.tensor(score)
    state |= {"best_model_score": value, "kth_value": value, "best_k_models": {str(best): value}}
    state |= {"best_model_path": str(best), "kth_best_model_path": str(best)}
    write(content, earlier)
    resumed = distill("fit", small, "--ckpt_path", str(earlier))
    anew = list(Path(resumed.trainer.log_dir, "checkpoints").glob("step=*.ckpt"))
    assert [str(path) for path in anew or [best]] == [resumed.trainer.checkpoint_callback.best_model_path]
    assert bool(anew) == (score > 1)
    assert best.exists()


def test_losses_are_logged_after_a_resume_with_another_validation_interval(distill, small):
    """The loggers' step of Lightning stays one behind where it finds no validation at the checkpoint's place."""
    small["trainer"] |= {"max_steps": 8, "val_check_interval": 4, "log_every_n_steps": 1}
    earlier = last_of(distill("fit", small)).with_name("previous.ckpt")
    resumed = distill("fit", small, "--ckpt_path", str(earlier), "--trainer.val_check_interval", "8")
    with Path(resumed.trainer.log_dir, "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row.get("train/loss")]
    assert steps == [4, 5, 6, 7]


def test_a_full_disk_is_one_sentence_and_leaves_the_checkpoint_before(tmp_path):
    """A limit on the size of files does what a full disk does."""
    path = tmp_path / "last.ckpt"
    write({"weights": torch.arange(10.0)}, path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(RunError, match=r"checkpoint: .*last.ckpt can't be written \(File too large, .* GiB free"):
            write({"weights": torch.zeros(1_000_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
    assert torch.equal(torch.load(path, weights_only=True)["weights"], torch.arange(10.0))


def test_a_disk_that_fills_up_stops_the_run_and_it_resumes(distill, small, monkeypatch, tmp_path):
    unbroken = weights_of(last_of(distill("fit", small)))
    true, saved = torch.save, []

    def save(content, file):
        saved.append(file)
        if len(saved) == 4:
            file.write(b"half a checkpoint")
            raise OSError(28, "No space left on device")
        true(content, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        with pytest.raises(RunError, match=r"checkpoint: .*No space left on device, .*GiB free.*--ckpt_path last"):
            distill("fit", small, "--last_checkpoint.every_n_steps", "1")
    left = sorted(path.name for path in (tmp_path / "lightning_logs/version_1/checkpoints").iterdir())
    assert left == ["last.ckpt", "previous.ckpt"]
    assert_same(weights_of(last_of(distill("fit", small, "--ckpt_path", "last"))), unbroken)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "no file"])
def test_damage_is_seen(tmp_path, damage):
    path = tmp_path / "last.ckpt"
    write({"weights": torch.arange(1000.0)}, path)
    assert is_whole(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= damage == "flipped"
    path.write_bytes(content[: {"truncated": len(content) // 2, "empty": 0}.get(damage, len(content))])
    if damage == "no file":
        path.unlink()
    assert not is_whole(path)


def test_a_damaged_last_checkpoint_is_passed_over(distill, small):
    path = last_of(distill("fit", small, "--last_checkpoint.every_n_steps", "2"))
    good, content = weights_of(path), path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"ckpt_path: .*last.ckpt is truncated, damaged or no checkpoint"):
        distill("fit", small, "--ckpt_path", str(path))
    with pytest.warns(UserWarning, match=r"last.ckpt is damaged and passed over"):
        resumed = distill("fit", small, "--ckpt_path", "last")
    assert_same(weights_of(last_of(resumed)), good)


def test_last_without_any_checkpoint_starts_anew_or_says_so(distill, small, tmp_path):
    small["trainer"]["max_steps"] = 1
    with pytest.raises(UserError, match=r"ckpt_path: last, but no run .* has a checkpoint: give a .ckpt file"):
        distill("validate", small, "--ckpt_path", "last")
    cli = distill("fit", small, "--ckpt_path", "last")
    assert cli.trainer.global_step == 1
    (tmp_path / "lightning_logs" / "version_7" / "checkpoints").mkdir(parents=True)  # killed before its first one
    assert find_last(earlier_runs(tmp_path)) == last_of(cli)


def test_the_newest_run_counts_not_the_highest_string(tmp_path):
    for version in (2, 10, 9):
        write({}, tmp_path / "lightning_logs" / f"version_{version}" / "checkpoints" / "last.ckpt")
    assert "version_10" in str(find_last(earlier_runs(tmp_path)))


def test_a_dead_data_worker_is_one_sentence(distill, small, monkeypatch):
    true = DistillationModule.training_step

    def kill(self, batch, batch_idx):
        if batch_idx == 2:
            for process in multiprocessing.active_children():
                os.kill(process.pid, signal.SIGKILL)
                process.join()
            time.sleep(0.1)
        return true(self, batch, batch_idx)

    monkeypatch.setattr(DistillationModule, "training_step", kill)
    small["data"]["num_workers"] = 1
    with pytest.raises(RunError, match=r"data.num_workers: DataLoader worker .*--ckpt_path last"):
        distill("fit", small)


@pytest.mark.slow
def test_two_ranks_stop_together_and_none_outlives_the_other(small, tmp_path):
    small["data"] |= {"per_device_batch_size": 2, "num_workers": 1}
    small["trainer"] |= {"max_steps": 40, "val_check_interval": 20, "strategy": "ddp", "devices": 2}
    small["last_checkpoint"] = {"every_n_steps": 5}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(small))
    command = [sys.executable, "-m", "distill.cli", "fit", "--config", "../config.yaml", "--ckpt_path", "last"]

    def run(name: str, number: int = 0, rank: int = 0) -> tuple[int, str]:
        """Exit code and output; the rank gets the signal once there is a checkpoint, and all are gone in a minute."""
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        with (folder / "output.txt").open("w") as output:
            first = subprocess.Popen(
                command, cwd=folder, stdout=output, stderr=output, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
            if number:
                while not list(folder.glob("lightning_logs/*/checkpoints/last.ckpt")):
                    time.sleep(0.05)
                children = subprocess.run(["pgrep", "-P", str(first.pid)], capture_output=True, text=True).stdout
                second = min(int(pid) for pid in children.split())  # its workers come later
                os.kill((first.pid, second)[rank], number)
                deadline = time.monotonic() + 60
                first.wait(60)
                while Path(f"/proc/{second}").exists():
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
            return first.wait(), (folder / "output.txt").read_text()

    assert run("whole")[0] == 0
    whole = weights_of(find_last(earlier_runs(tmp_path / "whole")))
    for name, number, rank, code, said in (
        ("stopped", signal.SIGTERM, 0, 143, "Stopped by SIGTERM"),
        ("second dead", signal.SIGKILL, 1, -9, "terminated with code -9"),
        ("first dead", signal.SIGKILL, 0, -9, "trainer.devices: another process of this run has died"),
    ):
        ended, output = run(name, number, rank)
        assert ended == code, output[-2000:]
        assert said in output, output[-2000:]
        assert run(name)[0] == 0
        assert_same(weights_of(find_last(earlier_runs(tmp_path / name))), whole)
