"""However a run is asked to stop, it ends with a whole step, and any of its checkpoints goes on to the unbroken end."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch.callbacks.timer as lightning_timer
import pytest
import torch
from torch.utils.data import DataLoader

from conftest import log_of
from distill.checkpoints.files import find_last
from distill.checkpoints.students import load_student
from distill.data.datamodule import DistillationDataModule
from distill.errors import UserError
from distill.training.module import DistillationModule
from helpers.clock import Clock

QUIET = dict.fromkeys(["train_debug", "curriculum_dump", "kd_loss_dump", "routing_losses_dump"])


@pytest.fixture
def short(config):
    """Two epochs of seven micro-batches in windows of 3, 3 and 1: six steps, with dropout."""
    sizes = {"vocab_size": 320, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_dropout": 0.3}
    del config["model"]["student_layers"], config["model"]["routing"]
    config["model"]["student_config"] = {"model_type": "llama", **sizes, **heads}
    config["trainer"] |= {"max_steps": -1, "max_epochs": 2, "accumulate_grad_batches": 3, "num_sanity_val_steps": 0}
    config["data"] |= {"max_sequences": 28, "max_validation_sequences": 4}
    return config | QUIET


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def last_of(cli) -> Path:
    return Path(cli.trainer.log_dir, "checkpoints", "last.ckpt")


def assert_goes_on(distill, config: dict, path: Path, unbroken: dict[str, torch.Tensor], steps: int = 6) -> None:
    resumed = distill("fit", config, "--ckpt_path", str(path))
    assert resumed.trainer.global_step == steps, path
    for name, value in weights_of(last_of(resumed)).items():
        assert torch.equal(value, unbroken[name]), (path, name)


def own(name: str, **options) -> dict:
    return {"class_path": f"helpers.stops.{name}", "init_args": options}


@pytest.mark.parametrize(
    ("callback", "step"),
    [
        (own("Stop", hook="on_train_batch_end", batch=1), 1),
        pytest.param(own("Stop", hook="on_train_batch_start", batch=4), 2, marks=pytest.mark.slow),
        pytest.param(own("Stop", hook="on_before_zero_grad", batch=1), 1, marks=pytest.mark.slow),
        pytest.param(own("Stop", hook="on_train_batch_end", batch=6), 3, marks=pytest.mark.slow),
        (own("Stop", hook="on_train_batch_end", batch=8), 4),
        (own("LateStop", batch=3), 2),
    ],
)
def test_a_stop_by_any_callback_waits_for_the_end_of_the_window(distill, short, callback, step):
    unbroken = weights_of(last_of(distill("fit", short)))
    stopped = distill("fit", short | {"trainer": short["trainer"] | {"callbacks": [callback]}})
    assert stopped.trainer.global_step == step
    told = f"Stopped early at step {step} of 6: a callback asked for it; --ckpt_path last goes on from there"
    assert log_of(stopped).count(told) == 1
    found = [path for path in sorted(last_of(stopped).parent.glob("*.ckpt")) if path.name != "best.ckpt"]
    assert [path.name for path in found if path.name != "previous.ckpt"] == ["last.ckpt", f"step={step}.ckpt"]
    for path in found:
        assert_goes_on(distill, short, path, unbroken)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # of the callback that is not there now
def test_a_stop_before_the_first_batch_of_an_epoch_skips_none_of_it(distill, short):
    """Where the end of the epoch before was no checkpoint, since a validation came shortly before it."""
    short["trainer"]["val_check_interval"] = 2
    unbroken = weights_of(last_of(distill("fit", short)))
    callback = own("Stop", hook="on_train_epoch_start", batch=2)
    stopped = distill("fit", short | {"trainer": short["trainer"] | {"callbacks": [callback]}})
    assert stopped.trainer.global_step == 3
    assert_goes_on(distill, short, last_of(stopped), unbroken)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # of the callback that is not there now
@pytest.mark.parametrize("validation", [True, False])
def test_the_end_of_max_time_is_one_too(distill, short, monkeypatch, validation):
    if not validation:
        short["trainer"]["limit_val_batches"] = 0
        short["checkpoint"] = None
    unbroken = weights_of(last_of(distill("fit", short)))
    monkeypatch.setattr(lightning_timer, "time", SimpleNamespace(monotonic=lambda: Clock.now))
    clock = {"class_path": "helpers.clock.Clock"}
    timed = short | {"trainer": short["trainer"] | {"callbacks": [clock], "max_time": "00:00:01:24"}}
    stopped = distill(
        "fit", timed
    )  # within the ninth micro-batch where validations take time, in the 14th epoch's else
    step = stopped.trainer.global_step
    assert 0 < step < 6
    assert f"Stopped early at step {step} of 6: its time is used up" in log_of(stopped)
    assert_goes_on(distill, short, last_of(stopped), unbroken)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # of the callback that is not there now
def test_early_stopping_in_mid_epoch(distill, short):
    short["trainer"] |= {"val_check_interval": 2}
    unbroken = weights_of(last_of(distill("fit", short)))
    early = {"monitor": "val/kl_div_T1", "mode": "max", "patience": 1}
    stopped = distill("fit", short | {"early_stopping": {"class_path": "EarlyStopping", "init_args": early}})
    assert stopped.trainer.global_step == 2
    for path in last_of(stopped).parent.glob("*.ckpt"):
        assert_goes_on(distill, short, path, unbroken)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"check_val_every_n_epoch": 3}, 6),
        ({"max_epochs": -1, "max_steps": 2, "min_steps": 9}, 2),
        ({"max_epochs": -1, "max_steps": 2, "min_epochs": 3}, 2),
        ({"check_val_every_n_epoch": 2, "callbacks": [own("Stop", hook="on_train_batch_end", batch=1)]}, 1),
    ],
)
def test_a_run_ends_with_a_validation_whenever_else_it_has_some(distill, short, options, steps):
    """Lightning leaves it out of epochs that have none, and until `min_steps` or `min_epochs` are reached."""
    ended = distill("fit", short | {"trainer": short["trainer"] | options})
    assert ended.trainer.global_step == steps
    assert log_of(ended).count("[Eval]") == log_of(ended).count(f"[Eval] Step {steps - 1},") == 1
    assert last_of(ended).with_name("best.ckpt").resolve().name == f"step={steps}.ckpt"
    assert torch.load(last_of(ended), weights_only=True)["global_step"] == steps


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # of the callback that is not there now
def test_weights_alone_are_passed_over_and_refused(distill, short):
    """Where `checkpoint.save_weights_only` keeps them beside the last whole checkpoint, with more steps than it."""
    keep = {"monitor": None, "every_n_train_steps": 5, "filename": "weights", "save_weights_only": True}
    whole = distill("fit", short | {"checkpoint": {"class_path": "ModelCheckpoint", "init_args": keep}})
    last, weights = last_of(whole), last_of(whole).with_name("weights.ckpt")
    previous = last.with_name("previous.ckpt")
    unbroken = weights_of(last)
    last.unlink()
    assert find_last([last.parents[1]]) == previous
    with pytest.raises(UserError, match=r"^ckpt_path: .*weights.ckpt holds weights alone .*; give the run's last.c"):
        distill("fit", short, "--ckpt_path", str(weights))
    assert_goes_on(distill, short, previous, unbroken)
    assert load_student(weights).checkpoint["global_step"] == 5
    assert distill("validate", short, "--ckpt_path", str(weights)).trainer.callback_metrics["val/loss"] > 0


def test_a_stop_by_the_module_itself(distill, short, monkeypatch):
    unbroken = weights_of(last_of(distill("fit", short)))
    true = DistillationModule.on_train_batch_end

    def stop(self, outputs, batch, batch_idx):
        true(self, outputs, batch, batch_idx)
        self.trainer.should_stop |= batch_idx == 4

    with monkeypatch.context() as patch:
        patch.setattr(DistillationModule, "on_train_batch_end", stop)
        stopped = distill("fit", short)
    assert stopped.trainer.global_step == 2
    assert_goes_on(distill, short, last_of(stopped), unbroken)


@pytest.mark.parametrize("streaming", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_checkpoint_written_anywhere_goes_on_from_the_last_whole_step(distill, short, tmp_path, streaming):
    """As Lightning's own callbacks write them by the clock, or after an error."""
    short |= {"checkpoint": None}
    if streaming:
        (tmp_path / "stream.jsonl").write_text("".join(f'{{"text": "{f"word{i} " * 40}"}}\n' for i in range(120)))
        short["trainer"] |= {"max_steps": 6, "max_epochs": -1, "limit_train_batches": 7}
        short["data"] |= {"dataset": str(tmp_path / "stream.jsonl"), "streaming": True, "shuffle_buffer": 5}
        del short["data"]["max_sequences"]
    save = own("SaveEverywhere", folder=str(tmp_path / "saved"))
    whole = distill("fit", short | {"trainer": short["trainer"] | {"callbacks": [save]}})
    unbroken = weights_of(last_of(whole))
    for number in (1, 2, 5, 7):  # within a first window, at its end, at the second's, within the next epoch's first
        assert_goes_on(distill, short, tmp_path / "saved" / f"{number:02d}.ckpt", unbroken)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # of the callback that is not there now
def test_an_error_within_a_step_loses_no_step_and_no_random_number(distill, short, monkeypatch):
    short |= {"checkpoint": None}
    unbroken = weights_of(last_of(distill("fit", short)))
    keep = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}
    keep |= {"init_args": {"dirpath": "kept", "filename": "broken", "save_on_exception": True, "monitor": None}}
    true = DistillationModule.training_step

    def fail(self, batch, batch_idx):
        result = true(self, batch, batch_idx)  # dropout has drawn
        if batch_idx == 4:
            raise RuntimeError("by itself")
        return result

    with monkeypatch.context() as patch:
        patch.setattr(DistillationModule, "training_step", fail)
        with pytest.raises(RuntimeError, match="by itself"):
            distill("fit", short | {"trainer": short["trainer"] | {"callbacks": [keep]}})
    (path,) = Path("kept").glob("*.ckpt")
    assert_goes_on(distill, short, path, unbroken)


def test_a_finished_run_that_is_given_more_steps_goes_on_where_it_ended(distill, short):
    """In mid-epoch, with rates and weights that do not move with the horizon."""
    short["model"] |= {"min_learning_rate_ratio": 1.0}
    short["trainer"] |= {"max_epochs": -1, "max_steps": 8}
    unbroken = weights_of(last_of(distill("fit", short)))
    short["trainer"]["max_steps"] = 5
    finished = distill("fit", short)
    short["trainer"]["max_steps"] = 8
    with pytest.warns(UserWarning, match="horizon was 5 steps in the checkpoint and is 8 now"):
        assert_goes_on(distill, short, last_of(finished), unbroken, steps=8)


def test_steps_that_a_callback_makes_larger_are_refused(distill, short):
    """They would end the run before its schedules do, without a word."""
    short["trainer"]["callbacks"] = [own("Accumulates")]
    with pytest.raises(
        UserError, match=r"^trainer.accumulate_grad_batches: 4, and 3 when the run began, which its sch"
    ):
        distill("fit", short)


def test_last_is_by_progress_whatever_the_times_of_files(distill, short):
    run = Path(distill("fit", short).trainer.log_dir)
    last, previous = (run / "checkpoints" / f"{name}.ckpt" for name in ("last", "previous"))
    steps = [torch.load(path, weights_only=True)["global_step"] for path in (previous, last)]
    assert steps == [3, 6]
    shutil.copy(previous, previous.with_name("best.ckpt"))
    for path in run.glob("checkpoints/*.ckpt"):
        os.utime(path, ns=(10**9, 10**9 if path == last else 2 * 10**9))
    found = find_last([run])
    assert found is not None
    assert torch.load(found, weights_only=True)["global_step"] == 6


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start", "on_sanity_check_end"])
def test_a_run_that_trained_nothing_says_so_and_leaves_nothing(distill, short, hook, tmp_path):
    short["trainer"] |= {"callbacks": [own("AtStart", hook=hook)], "num_sanity_val_steps": 1}
    with pytest.raises(UserError, match=r"^trainer: nothing was trained, at step 0 of 6: trainer.max_time was used up"):
        distill("fit", short)
    assert not list(tmp_path.glob("lightning_logs/*"))


@pytest.mark.filterwarnings("ignore:Total length of `.*` across ranks is zero")
def test_an_epoch_without_rows_is_refused(distill, short, monkeypatch, tmp_path):
    monkeypatch.setattr(DistillationDataModule, "train_dataloader", lambda self: DataLoader([]))
    with pytest.raises(UserError, match=r"^data.dataset: no training rows for this rank, so nothing would be trained"):
        distill("fit", short)
    assert not list(tmp_path.glob("lightning_logs/*"))


def test_a_finished_run_has_nothing_left_to_train_and_is_no_error(distill, short, caplog):
    distill("fit", short)
    again = distill("fit", short, "--ckpt_path", "last")
    assert "Nothing left to train: the run was finished, at step 6 of 6." in caplog.text
    assert again.trainer.global_step == 6
    assert str(again.trainer.ckpt_path).endswith(str(Path("version_0", "checkpoints", "last.ckpt")))


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
def test_an_average_of_weights_goes_on_and_is_what_is_loaded(distill, short, monkeypatch):
    """Checkpoints hold the average in the student's place, and what it is the average of beside it."""
    average = {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging", "init_args": {"decay": 0.5}}
    short["model"]["learning_rate"] = 0.05
    short["trainer"]["callbacks"] = [average]
    whole = distill("fit", short)
    unbroken = weights_of(last_of(whole))
    student = load_student(last_of(whole)).model
    for name, value in student.state_dict().items():
        assert torch.equal(value, unbroken[f"student.{name}"]), name
    live = torch.load(last_of(whole), weights_only=True)["current_model_state"]["student.lm_head.weight"]
    assert (live - student.lm_head.weight).abs().max() > 1e-3
    short["trainer"]["callbacks"] = [average, own("Stop", hook="on_train_batch_end", batch=4)]
    stopped = distill("fit", short)
    short["trainer"]["callbacks"] = [average]
    assert_goes_on(distill, short, last_of(stopped), unbroken)
