"""Bugs planted in real runs: each must stop the run and be named."""

from dataclasses import replace

import pytest
import torch

from distill.breakdown import LossBreakdown
from distill.errors import AuditError
from distill.training.module import DistillationModule


def plant(monkeypatch, bug):
    """Replaces the module's losses by `bug(module, batch, total, breakdown)` of the true ones."""
    true = DistillationModule.losses

    def losses(self, batch, share, metrics=False):
        result = true(self, batch, share, metrics)
        total, breakdown = bug(self, result.total, result.breakdown)
        return replace(result, total=total, breakdown=breakdown)

    monkeypatch.setattr(DistillationModule, "losses", losses)


def test_routing_bypass_is_named(distill, config, monkeypatch):
    def bug(module, total, breakdown):
        name = "routing_feature_matching_loss"
        return (total + breakdown.raw[name] if name in breakdown.raw else total), breakdown

    plant(monkeypatch, bug)
    with pytest.raises(AuditError, match="routing bypass: routing_feature_matching_loss has weight 0 but contributes"):
        distill("fit", config)


def test_routing_bypass_without_a_measured_value_names_the_suspects(distill, config, monkeypatch):
    plant(monkeypatch, lambda module, total, breakdown: (total * 1.01, breakdown))
    config |= dict.fromkeys(["curriculum_dump", "kd_loss_dump", "routing_losses_dump"])
    config["trainer"]["num_sanity_val_steps"] = 0
    with pytest.raises(AuditError, match=r"training at step 0 differs .* routing_feature_matching_loss"):
        distill("fit", config)


def test_wrong_weight_in_the_breakdown_is_named(distill, config, monkeypatch):
    def bug(module, total, breakdown):
        weights = breakdown.weights | {"routing_load_balancing_loss": 1.0}
        return total + breakdown.raw["routing_load_balancing_loss"], LossBreakdown(breakdown.raw, weights)

    plant(monkeypatch, bug)
    config["trainer"]["num_sanity_val_steps"] = 0
    with pytest.raises(AuditError, match=r"routing bypass: routing_load_balancing_loss has weight 1 .* says 0"):
        distill("fit", config)


def test_eval_bypass_is_named(distill, config, monkeypatch):
    def bug(module, total, breakdown):
        if module.trainer.validating or module.trainer.sanity_checking:
            weights = breakdown.weights | {"lm_loss": 1.0}
            breakdown = LossBreakdown(breakdown.raw, weights)
            total = breakdown.total
        return total, breakdown

    plant(monkeypatch, bug)
    with pytest.raises(AuditError, match=r"eval bypass: lm_loss has weight 1 in validation at step 0, .* says 0.3"):
        distill("fit", config)


def test_a_loss_that_is_not_finite_stops_with_its_batch(distill, config, monkeypatch, tmp_path):
    def bug(module, total, breakdown):
        if module.training and module.curriculum.step == 2:
            raw = breakdown.raw | {"kd_loss": breakdown.raw["kd_loss"] * float("nan")}
            return total * float("nan"), LossBreakdown(raw, breakdown.weights)
        return total, breakdown

    plant(monkeypatch, bug)
    with pytest.raises(AuditError, match="kd_loss, gradient: not finite in training at step 2"):
        distill("fit", config)
    (saved,) = tmp_path.glob("lightning_logs/version_0/nonfinite_batch.pt")
    batch = torch.load(saved, weights_only=True)
    assert batch["input_ids"].shape == (4, 32)


def test_a_value_that_is_not_finite_at_weight_zero_is_told_and_stops_nothing(distill, config, monkeypatch):
    name = "routing_feature_matching_loss"

    def bug(module, total, breakdown):
        measured = (
            {name: breakdown.raw[name] * float("inf")} if module.curriculum.step == 0 and name in breakdown.raw else {}
        )
        return total, LossBreakdown(breakdown.raw | measured, breakdown.weights)

    plant(monkeypatch, bug)
    config["curriculum"] = {"feature": 0.0}
    with pytest.warns(UserWarning, match=f"{name}: not finite in training at step 0, at weight 0: no part of the step"):
        cli = distill("fit", config)
    assert cli.trainer.global_step == config["trainer"]["max_steps"]


def test_a_gradient_that_is_not_finite_stops_even_at_the_last_step(distill, config, monkeypatch):
    def spoil(self):
        if self.curriculum.step == 2:
            next(self.student.parameters()).grad[0, 0] = float("nan")

    monkeypatch.setattr(DistillationModule, "on_after_backward", spoil)
    with pytest.raises(AuditError, match="gradient: not finite in training at step 2"):
        distill("fit", config, "--trainer.max_steps", "3", "--trainer.limit_val_batches", "0", "--checkpoint", "null")


def test_validation_at_another_temperature_is_named(distill, config, monkeypatch):
    true = DistillationModule.validation_step

    def validation_step(self, batch, batch_idx):
        self.curriculum = replace(self.curriculum, temperature=7.0)
        return true(self, batch, batch_idx)

    monkeypatch.setattr(DistillationModule, "validation_step", validation_step)
    with pytest.raises(AuditError, match=r"eval bypass: validation at step 0 used .*temperature=7.0"):
        distill("fit", config)
