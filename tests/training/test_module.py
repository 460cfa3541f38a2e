"""The module on tiny models: any split of a step has one gradient; precisions, golden curve, the other subcommands."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch

from conftest import log_of
from distill.commands.quiet import quieten
from distill.data.datamodule import DistillationDataModule
from distill.errors import UserError
from distill.training.callbacks.curriculum import Curriculum
from distill.training.callbacks.step_dumps import CurriculumDump
from distill.training.module import DistillationModule
from distill.training.trainer import DistillTrainer
from helpers.training_log import parse

GOLDEN = Path(__file__).parents[1] / "assets" / "golden_curve.json"
SUMS = {"feature_matching_loss": 1.0, "expert_importance_loss": 1.0, "attention_alignment_loss": 1.0}


def final_weights(cli) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in cli.model.state_dict().items()}


@pytest.mark.parametrize(("batch", "accumulate"), [(4, 2), (2, 4)])
def test_any_accumulation_has_the_same_losses_and_parameters(distill, config, tmp_path, batch, accumulate):
    """Rows of uneven length, so that a mean of means would differ; every component that is a sum over units is on."""
    lengths = [7, 90, 20, 31, 12, 300, 55, 18]
    words = [f"item {n} " + "abc def " * (lengths[n % 8] // 8 + 1) for n in range(120)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in words))
    config["data"] |= {"dataset": str(tmp_path / "rows.jsonl"), "packing": False}
    config["model"]["routing"]["losses"] = SUMS
    config["curriculum"] = {"feature": 0.1, "attention": 0.1}
    config["trainer"] |= {"max_steps": 6, "precision": "64-true"}
    config["data"]["per_device_batch_size"] = 8
    whole = distill("fit", config)
    one = final_weights(whole)
    config["data"]["per_device_batch_size"] = batch
    config["trainer"]["accumulate_grad_batches"] = accumulate
    split = distill("fit", config)
    for name, value in final_weights(split).items():
        torch.testing.assert_close(value, one[name], rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    ours, theirs = split.trainer.callback_metrics, whole.trainer.callback_metrics
    for name in ("train/loss", "val/loss", "val/kl_div_T1", "train/grad_norm"):
        assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=1e-6)


def test_routing_statistics_are_means_over_the_micro_batches_of_a_step(distill, config):
    shown = []
    config["data"]["packing"] = False
    for batch, accumulate in ((8, 1), (4, 2)):  # of a statistic that is itself a mean over tokens
        config["data"]["per_device_batch_size"] = batch
        config["trainer"] |= {"max_steps": 3, "accumulate_grad_batches": accumulate}
        cli = distill("fit", config, "--curriculum.feature", "0.1")
        with Path(cli.trainer.log_dir, "metrics.csv").open() as file:
            shown.append([row for row in csv.DictReader(file) if row["routing/gate_entropy"]])
    for whole, split in zip(*shown, strict=True):
        assert float(split["routing/gate_entropy"]) == pytest.approx(float(whole["routing/gate_entropy"]), rel=1e-6)


def test_a_short_last_window_still_divides_by_the_accumulation(distill, config):
    """Five batches with accumulation 3: the second step has two; its loss is still a mean over its tokens."""
    config["trainer"] |= {
        "max_steps": 4,
        "accumulate_grad_batches": 3,
        "limit_train_batches": 5,
        "precision": "64-true",
    }
    config["train_debug"] = {"every_n_batches": 1}
    config["curriculum"] = {"feature": 0.1, "attention": 0.1}
    blocks = parse(log_of(distill("fit", config)))
    steps = {b.step: b.values["raw"] for b in blocks if b.kind == "KD LOSS"}
    debug = [b for b in blocks if b.kind == "TRAIN DEBUG"]
    assert [b.step for b in debug] == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    for block in debug:
        assert block.values["grad"] == pytest.approx(block.values["sum"], abs=1e-4)
    for step in (1, 3):  # units of two batches, divided by three: 3/2 of a plain mean each
        window = [b.values["kd_loss"] / 0.7 for b in debug if b.step == step]
        assert steps[step] == pytest.approx(sum(window) / 3, abs=3e-4)
        assert window[0] / steps[step] == pytest.approx(1.5, abs=0.15)


@pytest.mark.parametrize("changes", [{"trainer.precision": "bf16-mixed"}, {"model.gradient_checkpointing": True}])
def test_precision_and_checkpointing_stay_close(distill, config, changes):
    config["trainer"] |= {"max_steps": 4, "gradient_clip_val": 1.0}
    config["curriculum"] = {"feature": 0.1, "attention": 0.1}
    plain = distill("fit", config)
    for path, value in changes.items():
        section, key = path.split(".")
        config[section][key] = value
    other = distill("fit", config)
    tolerance = 2e-2 if "trainer.precision" in changes else 1e-5
    for name in ("train/loss", "val/loss", "val/kl_div_T1", "train/grad_norm"):
        expected = float(plain.trainer.callback_metrics[name])
        assert float(other.trainer.callback_metrics[name]) == pytest.approx(expected, rel=tolerance), name
    assert all(p.dtype == torch.float32 for p in other.model.parameters())


def test_golden_curve(distill, config):
    """Twenty losses in float64, committed: whoever changes the maths must mean it and change the file too."""
    config["trainer"] |= {"precision": "64-true", "num_sanity_val_steps": 0}
    config["evaluation"] = None
    curve: list[float] = []

    def note(self, pl_module, breakdown):
        curve.append(float(breakdown.total))

    config["curriculum_dump"] = {"first_steps": 20}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CurriculumDump, "render", note)
        distill("fit", config)
    golden = [float(value) for value in json.loads(GOLDEN.read_text())]
    assert len(curve) == 20
    assert curve == pytest.approx(golden, rel=1e-9)


def test_no_gradient_lies_beside_the_activations_of_the_next_step(distill, config, monkeypatch):
    there: list[bool] = []

    def training_step(self, batch, batch_idx, step=DistillationModule.training_step):
        output = step(self, batch, batch_idx)
        there.append(any(p.grad is not None for p in self.parameters()))
        return output

    monkeypatch.setattr(DistillationModule, "training_step", training_step)
    config["trainer"] |= {"max_steps": 3, "accumulate_grad_batches": 2, "num_sanity_val_steps": 0}
    distill("fit", config)
    assert there == 3 * [False, True]


def test_curriculum_and_optimizer_continue_after_a_resume(distill, config):
    config["trainer"] |= {"max_steps": 8, "val_check_interval": 4}
    unbroken = distill("fit", config)
    path = Path(unbroken.trainer.log_dir, "checkpoints")
    saving = {"monitor": None, "save_top_k": -1, "filename": "step={step}", "auto_insert_metric_name": False}
    config["checkpoint"] = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saving}
    first = distill("fit", config)
    path = Path(first.trainer.log_dir, "checkpoints", "step=4.ckpt")
    resumed = distill("fit", config, "--ckpt_path", str(path))
    assert resumed.trainer.global_step == 8
    for name, value in final_weights(resumed).items():
        assert torch.equal(value, final_weights(unbroken)[name]), name
    steps = [block.step for block in parse(log_of(resumed)) if block.kind == "CURRICULUM"]
    assert steps == [4, 5, 6, 7]


def test_the_configuration_beats_the_checkpoint_and_says_so(distill, config):
    config["trainer"]["max_steps"] = 2
    path = Path(distill("fit", config).trainer.log_dir, "checkpoints", "last.ckpt")
    config["model"]["lm_loss"] = False
    with pytest.warns(
        UserWarning, match="The configuration differs from the checkpoint's and wins: model.lm_loss True -> False"
    ):
        cli = distill("validate", config, "--ckpt_path", str(path))
    assert "val/lm_loss" not in cli.trainer.callback_metrics


def test_one_teacher_spelled_in_two_ways_is_one(distill, config, assets, tmp_path, monkeypatch, recwarn):
    config["trainer"] |= {"max_steps": 2, "max_epochs": -1}
    monkeypatch.chdir(assets)
    config["model"]["teacher"], config["trainer"]["default_root_dir"] = "llama", str(assets / "spelled")
    path = Path(distill("fit", config).trainer.log_dir, "checkpoints", "last.ckpt")
    monkeypatch.chdir("/")
    config["model"]["teacher"] = str(assets / "llama")
    assert distill("fit", config, "--ckpt_path", str(path), "--trainer.max_steps", "3").trainer.global_step == 3
    shutil.copytree(assets / "llama", tmp_path / "elsewhere" / "llama")
    monkeypatch.chdir(tmp_path / "elsewhere")  # one spelling of a folder that was moved with the project
    config["model"]["teacher"] = "llama"
    assert distill("fit", config, "--ckpt_path", str(path), "--trainer.max_steps", "3").trainer.global_step == 3
    assert not [str(warned.message) for warned in recwarn if "configuration differs" in str(warned.message)]


def test_another_teacher_or_temperature_than_the_checkpoint_s_is_refused(distill, config, assets):
    config["trainer"]["max_steps"] = 2
    path = Path(distill("fit", config).trainer.log_dir, "checkpoints", "last.ckpt")
    with pytest.raises(UserError, match=r"curriculum.temperature: 4.0, but the checkpoint was made with 2.0"):
        distill("validate", config, "--ckpt_path", str(path), "--curriculum.temperature", "4.0")
    moved = path.parents[3] / "moved"
    shutil.copytree(assets / "llama", moved)
    config["model"]["teacher"] = str(moved)
    with pytest.raises(UserError, match=r"model.teacher: .*moved.* but the checkpoint was made with"):
        distill("fit", config, "--ckpt_path", str(path))


def test_a_resume_within_an_epoch_equals_the_unbroken_run(distill, config):
    """The horizon comes from max_epochs, accumulation leaves a short last window, validation falls inside the epoch."""
    config["trainer"] |= {"max_steps": -1, "max_epochs": 2, "accumulate_grad_batches": 3, "val_check_interval": 4}
    config["data"]["max_sequences"] = 42  # 11 batches an epoch: windows of 3, 3, 3 and 2
    saving = {"monitor": None, "save_top_k": -1, "filename": "step={step}", "auto_insert_metric_name": False}
    config["checkpoint"] = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saving}
    unbroken = distill("fit", config)
    saved = sorted(path.name for path in Path(unbroken.trainer.log_dir, "checkpoints").glob("step=*"))
    assert saved == [f"step={step}.ckpt" for step in (2, 3, 6, 7, 8)], "ends of windows, and the end"
    for name in ("step=2.ckpt", "step=7.ckpt"):
        path = Path(unbroken.trainer.log_dir, "checkpoints", name)
        resumed = distill("fit", config, "--ckpt_path", str(path))
        assert resumed.trainer.global_step == unbroken.trainer.global_step == 8
        for key, value in final_weights(unbroken).items():
            assert torch.equal(final_weights(resumed)[key], value), (name, key)


def test_rates_of_the_configuration_beat_the_checkpoint_s(distill, config):
    config["trainer"] |= {"max_steps": 4, "val_check_interval": 2}
    saving = {"monitor": None, "save_top_k": -1, "filename": "step={step}", "auto_insert_metric_name": False}
    config["checkpoint"] = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saving}
    path = Path(distill("fit", config).trainer.log_dir, "checkpoints", "step=2.ckpt")
    config["model"] |= {"learning_rate": 1e-5, "weight_decay": 0.5}
    with pytest.warns(UserWarning, match="model.learning_rate 0.001 -> 1e-05"):
        cli = distill("fit", config, "--ckpt_path", str(path))
    group = cli.trainer.optimizers[0].param_groups[0]
    assert group["weight_decay"] == 0.5
    assert group["lr"] == pytest.approx(1e-5 * 0.01)  # the cosine's end


def test_test_runs(distill, config):
    tested = distill("test", config)
    assert float(tested.trainer.callback_metrics["val/teacher_perplexity"]) > 1


def test_early_stopping_on_the_weight_free_metric(distill, config):
    config["trainer"] |= {"max_steps": 20, "val_check_interval": 2}
    config["model"]["learning_rate"] = 1e-9
    stopping = {"monitor": "val/kl_div_T1", "patience": 2, "min_delta": 0.01}
    config["early_stopping"] = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": stopping}
    assert distill("fit", config).trainer.global_step == 6


def test_python_use_without_a_curriculum_has_constant_weights(assets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quieten()
    module = DistillationModule(str(assets / "llama"), student_layers=2)
    data = DistillationDataModule(str(assets / "text.txt"), sequence_length=32)
    trainer = DistillTrainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, data)
    assert module.component_weights() == {"kd_loss": 1.0, "lm_loss": 1.0}
    assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(
        float(trainer.callback_metrics["val/kd_loss"] + trainer.callback_metrics["val/lm_loss"]), rel=1e-6
    )


def test_weights_that_are_all_zero_train_nothing_and_break_nothing(distill, config):
    zero = dict.fromkeys(["kd", "lm", "feature", "attention"], 0.0)
    config["curriculum"] = zero
    config["trainer"] |= {"max_steps": 2, "log_every_n_steps": 2}
    config |= {"curriculum_dump": {"first_steps": 0}, "kd_loss_dump": None, "routing_losses_dump": None}
    config["model"]["weight_decay"] = 0.5
    cli = distill("fit", config)
    fresh = distill("validate", config)
    for name, value in fresh.model.student.state_dict().items():
        assert torch.equal(cli.model.student.state_dict()[name], value), name
    assert Curriculum(**zero).state_at(0, 1).weights["kd"] == 0
