"""Validation that weighs or measures otherwise than training, in real runs and as people quote it."""

from dataclasses import replace

import pytest

from distill.curriculum import WEIGHT_KEY
from distill.training.module import DistillationModule
from helpers.diagnosis import FEATURE, judge, names


def test_validation_with_all_weights_at_one(finding, monkeypatch):
    true = DistillationModule.on_validation_epoch_start

    def start(self):
        self.curriculum = replace(self.curriculum, weights=dict.fromkeys(self.curriculum.weights, 1.0))
        true(self)

    monkeypatch.setattr(DistillationModule, "on_validation_epoch_start", start)
    found = finding("eval bypass")
    assert "kd_loss" in found.title
    assert FEATURE in found.title
    assert "give validation the curriculum's state" in found.fix


def test_validation_loss_is_the_sum_of_raw_values(finding, monkeypatch):
    true = DistillationModule.log_dict

    def log_dict(self, figures, *args, **kwargs):
        if "val/loss" in figures:
            parts = [figures[f"val/{name}"] for name in WEIGHT_KEY if f"val/{name}" in figures]
            figures = figures | {"val/loss": sum(parts)}
        true(self, figures, *args, **kwargs)

    monkeypatch.setattr(DistillationModule, "log_dict", log_dict)
    found = finding("eval bypass")
    assert "its components add up to" in found.evidence[0]


def test_validation_at_another_temperature(finding, monkeypatch):
    true = DistillationModule.losses

    def losses(self, *args, **kwargs):
        state = self.curriculum
        if not self.trainer.training:
            self.curriculum = replace(state, temperature=0.1)
        result = true(self, *args, **kwargs)
        self.curriculum = state
        return result

    monkeypatch.setattr(DistillationModule, "losses", losses)
    found = finding("train/eval gap", "--curriculum.lm", "0.0")
    assert "On the same weighting validation is 0." in found.title
    assert "kd_loss: raw" in found.evidence[0]
    assert "(training: raw" in found.evidence[0]
    assert "temperature" in found.cause


@pytest.mark.parametrize(
    "text",
    [
        "[CURRICULUM] Progress 2.7% (Phase 1)\nfeature_matching_loss: Weight: 0.0000, Scaled: 0.0000\n"
        "[TRAIN DEBUG] Total: 15.5\n[Eval] loss: 95.86\n",
        "[TRAIN DEBUG] Step 2400, Total: 15.5\n[Eval] Step 2500, loss: 95.86\n",
        "[CURRICULUM] Step 2500, Progress 3.3%\n  kd: 0.7000\n  feature: 0.0000\n\n[Eval] Step 2500, loss: 56.6\n"
        "    kd_loss: 14.6\n    routing_feature_matching_loss: 41.22\n",
    ],
    ids=["short", "steps", "components"],
)
def test_eval_bypass_in_the_forms_that_people_quote(tmp_path, text):
    diagnosis = judge(text, tmp_path)
    assert names(diagnosis) == ["eval bypass"]
    assert "give validation the curriculum's state" in diagnosis.findings[0].fix
