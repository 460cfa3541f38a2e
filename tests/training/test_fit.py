"""Whole runs on a tiny teacher: the log, the four figures, the gate on zero weights, and validation like training."""

import csv
import math
import subprocess
from pathlib import Path

import pytest
import torch

from conftest import log_of
from distill.curriculum import WEIGHT_KEY
from distill.training.callbacks.curriculum import Curriculum
from helpers.training_log import parse

ROUTING = ["feature_matching_loss", "expert_importance_loss", "load_balancing_loss", "attention_alignment_loss"]


def parameters(cli) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in cli.model.state_dict().items()}


def by_kind(blocks, kind):
    return [block for block in blocks if block.kind == kind]


@pytest.fixture
def run(distill, config):
    """The default run of 20 steps with frequent blocks."""
    config["train_debug"] = {"every_n_batches": 4}
    config["trainer"] |= {"val_check_interval": 10, "num_sanity_val_steps": -1}
    return distill("fit", config)


def test_log_shows_the_three_phases_in_the_documented_format(run):
    blocks = parse(log_of(run))
    assert [b.step for b in by_kind(blocks, "CURRICULUM")] == list(range(10))
    assert [b.step for b in by_kind(blocks, "TRAIN DEBUG")] == [0, 4, 8, 12, 16]
    assert [b.step for b in by_kind(blocks, "Eval")] == [0, 9, 19]
    for step in range(10):
        kinds = [b.kind for b in blocks if b.step == step and b.kind not in ("TRAIN DEBUG", "Eval")]
        assert kinds == ["CURRICULUM", "KD LOSS", "ROUTING LOSSES"]
    expected = Curriculum()
    for block in by_kind(blocks, "CURRICULUM"):
        weights = expected.state_at(block.step, 20).weights
        present = {**weights, "layerwise": 0.0, "contrastive": 0.0}
        assert {k: block.values[k] for k in weights} == pytest.approx(present, abs=5e-5)
        assert block.values["progress"] == pytest.approx(100 * block.step / 20)
    for block in by_kind(blocks, "KD LOSS"):
        assert block.values["scaled"] == pytest.approx(block.values["raw"] * 0.7, abs=1e-4)
    for block in by_kind(blocks, "ROUTING LOSSES"):
        weight = expected.state_at(block.step, 20).weights["feature"]
        for name in ROUTING:
            assert block.values[f"{name}.weight"] == pytest.approx(weight, abs=5e-5)
            assert block.values[f"{name}.scaled"] == pytest.approx(weight * block.values[f"{name}.raw"], abs=1e-4)
        assert block.values["feature_matching_loss.raw"] > 0.1
        assert block.values["expert_importance_loss.raw"] > 0
    first, last = by_kind(blocks, "TRAIN DEBUG")[0], by_kind(blocks, "TRAIN DEBUG")[-1]
    assert {name for name in first.values if name.endswith("_loss")} == {"kd_loss", "lm_loss"}
    assert {name for name in last.values if name.endswith("_loss")} == set(run.model.components)
    assert len(run.model.components) == 6


def test_four_figures_agree_in_every_block(run):
    for block in by_kind(parse(log_of(run)), "TRAIN DEBUG"):
        figures = [block.values[key] for key in ("bar", "sum", "total", "grad")]
        components = sum(v for name, v in block.values.items() if name.endswith("_loss"))
        assert max(figures) - min(figures) <= 1e-4
        assert components == pytest.approx(figures[0], abs=4e-4)


def test_evaluation_lines_reconcile_and_weigh_like_training(run):
    blocks = parse(log_of(run))
    for block in by_kind(blocks, "Eval"):
        names = [key.removesuffix(".raw") for key in block.values if key.endswith(".raw")]
        assert sum(block.values[f"{n}.scaled"] for n in names) == pytest.approx(block.values["loss"], abs=5e-4)
        weights = Curriculum().state_at(block.step, 20).weights
        assert block.values["kd_loss.weight"] == pytest.approx(weights["kd"], abs=5e-5)
        assert names == run.model.components
        for name in names:
            assert math.isnan(block.values[f"{name}.raw"]) == (weights[WEIGHT_KEY[name]] == 0)
            assert block.values[f"{name}.weight"] == pytest.approx(weights[WEIGHT_KEY[name]], abs=5e-5)


def test_the_readme_grep_lines_find_the_blocks(run):
    path = Path(run.trainer.log_dir, "training.log")

    def grep(*words: str) -> str:
        return subprocess.run(["grep", *words, path], capture_output=True, text=True, check=True).stdout

    weights = grep("-A", "9", "CURRICULUM")
    assert weights.count("feature: 0.0000") >= 6
    assert "lm: 0.3000" in weights
    assert grep("-A", "15", "TRAIN DEBUG").count("Scaled for grad accum") == 5
    assert len(grep("-E", "CURRICULUM|KD LOSS|ROUTING|TRAIN DEBUG").splitlines()) == 3 * 10 + 5


def test_metrics_have_the_documented_names_in_one_directory(run):
    directory = Path(run.trainer.log_dir)
    assert directory.parent.name == "lightning_logs"
    assert [path.name for path in directory.parent.iterdir()] == ["version_0"]
    assert (directory / "config.yaml").exists()
    assert list(directory.glob("events.out.tfevents.*"))
    with (directory / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = {name for row in rows for name, value in row.items() if value}
    wanted = {"train/loss", "train/kd_loss", "train/kd_loss_scaled", "curriculum/kd", "curriculum/feature"}
    wanted |= {"curriculum/temperature", "curriculum/top_k_experts", "train/grad_norm", "train/tokens_per_s"}
    wanted |= {"train/routing_feature_matching_loss", "train/routing_attention_alignment_loss_scaled"}
    wanted |= {"val/loss", "val/kd_loss", "val/kl_div_T1", "val/student_nll", "val/student_perplexity"}
    wanted |= {"val/teacher_perplexity", "val/top1_agreement", "val/ece", "val/bits_per_byte"}
    assert wanted <= names
    for row in rows:
        scaled = [float(value) for name, value in row.items() if name.endswith("_scaled") and value]
        if scaled:
            assert sum(scaled) == pytest.approx(float(row["train/loss"]), rel=1e-6)


def test_accumulation_keeps_the_figures_and_prints_step_blocks_once(distill, config):
    config["train_debug"] = {"every_n_batches": 1}
    config["trainer"] |= {"accumulate_grad_batches": 4, "max_steps": 8}
    blocks = parse(log_of(distill("fit", config)))
    debug = by_kind(blocks, "TRAIN DEBUG")
    assert [b.step for b in debug] == [batch // 4 for batch in range(32)]
    for block in debug:
        figures = [block.values[key] for key in ("bar", "sum", "total", "grad")]
        assert max(figures) - min(figures) <= 1e-4
    assert [b.step for b in by_kind(blocks, "KD LOSS")] == list(range(8))
    for block in by_kind(blocks, "KD LOSS"):
        window = [b.values["kd_loss"] for b in debug if b.step == block.step]
        assert block.values["scaled"] == pytest.approx(sum(window) / 4, abs=2e-4)


def test_observers_change_no_bit(distill, config):
    noisy = parameters(distill("fit", config))
    config |= dict.fromkeys(["audit", "train_debug", "curriculum_dump", "kd_loss_dump", "routing_losses_dump"])
    config |= {"evaluation": None, "checkpoint": None}
    config["trainer"]["logger"] = False
    quiet = parameters(distill("fit", config))
    assert noisy.keys() == quiet.keys()
    for name, value in noisy.items():
        assert torch.equal(value, quiet[name]), name


def test_zero_weight_costs_nothing_and_learns_nothing(distill, config, monkeypatch):
    from distill.losses.routing import Routing

    calls = []
    monkeypatch.setattr(Routing, "forward", lambda *args: calls.append(args))
    config["curriculum"] = {"feature": 0.0, "attention": 0.0}
    config |= dict.fromkeys(["curriculum_dump", "kd_loss_dump", "routing_losses_dump"])
    config["trainer"]["max_steps"] = 3
    cli = distill("fit", config)
    assert calls == []
    assert all(parameter.grad is None for parameter in cli.model.routing.parameters())
    optimizer_state = cli.trainer.optimizers[0].state
    assert not any(parameter in optimizer_state for parameter in cli.model.routing.parameters())
    assert any(parameter in optimizer_state for parameter in cli.model.student.parameters())


def test_teacher_is_frozen_and_nowhere_in_the_checkpoint(run):
    model = run.model
    assert not any(p.requires_grad for p in model.teacher.model.parameters())
    assert not model.teacher.model.training
    assert not any("teacher" in name for name, _ in model.named_parameters())
    checkpoint = torch.load(Path(run.trainer.log_dir, "checkpoints", "last.ckpt"), weights_only=True)
    assert all(name.startswith(("student.", "routing.")) for name in checkpoint["state_dict"])
    optimised = {id(p) for group in run.trainer.optimizers[0].param_groups for p in group["params"]}
    assert optimised == {id(p) for p in model.parameters()}
    decayed = [p for g in run.trainer.optimizers[0].param_groups if g["weight_decay"] > 0 for p in g["params"]]
    assert decayed
    assert all(p.ndim > 1 for p in decayed)


@pytest.mark.parametrize("steps", [4, 9, 20], ids=["phase1", "phase2", "phase3"])
def test_validate_weighs_and_measures_as_fit_did(distill, config, steps):
    config["trainer"] |= {"val_check_interval": steps, "limit_val_batches": 2}
    checkpoint = {"monitor": None, "save_top_k": -1, "filename": "step={step}", "auto_insert_metric_name": False}
    saving = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoint}
    config["checkpoint"] = saving
    fitted = distill("fit", config)
    block = next(b for b in parse(log_of(fitted)) if b.kind == "Eval" and b.step == steps - 1)
    path = Path(fitted.trainer.log_dir, "checkpoints", f"step={steps}.ckpt")
    validated = distill("validate", config, "--ckpt_path", str(path), "--trainer.logger", "true")
    again = parse(log_of(validated))[-1]
    assert (again.kind, again.step, repr(again.values)) == ("Eval", steps - 1, repr(block.values))
    with Path(fitted.trainer.log_dir, "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["val/loss"]]
    logged = next(float(row["val/loss"]) for row in rows if int(row["step"]) == steps - 1)
    assert float(validated.trainer.callback_metrics["val/loss"]) == pytest.approx(logged, rel=1e-6)


def test_the_last_step_is_validated_and_saved_wherever_the_epoch_stands(distill, config):
    cli = distill("fit", config, "--trainer.max_steps", "3")
    assert [b.step for b in by_kind(parse(log_of(cli)), "Eval")] == [2]
    assert Path(cli.trainer.log_dir, "checkpoints", "step=3.ckpt").exists()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_last_step_is_logged_with_its_own_figures(distill, config, accumulation):
    options = ("--trainer.max_steps", "7", "--trainer.accumulate_grad_batches", str(accumulation))
    every = distill("fit", config, *options)
    some = distill("fit", config, *options, "--trainer.log_every_n_steps", "5")
    rows = []
    for cli in (every, some):
        with Path(cli.trainer.log_dir, "metrics.csv").open() as file:
            rows.append({int(row["step"]): row for row in csv.DictReader(file) if row["train/loss"]})
    assert list(rows[1]) == [4, 6]
    for step, row in rows[1].items():
        for name in ("train/loss", "train/kd_loss", "train/lr"):
            assert row[name] == rows[0][step][name]


def test_weights_and_temperature_override(distill, config):
    cli = distill(
        "fit",
        config,
        "--trainer.max_steps",
        "3",
        "--curriculum.kd",
        "0.9",
        "--curriculum.temperature",
        "3.0",
        "--train_debug",
        "null",
    )
    blocks = parse(log_of(cli))
    assert not by_kind(blocks, "TRAIN DEBUG")
    assert by_kind(blocks, "CURRICULUM")[0].values["kd"] == 0.9
    assert cli.model.curriculum.temperature == 3.0
