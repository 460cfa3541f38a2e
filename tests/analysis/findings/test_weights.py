"""Components that are weighed otherwise than the curriculum says, in real runs and as people quote them."""

from dataclasses import replace

import pytest

from distill.training.module import DistillationModule
from helpers.diagnosis import EXAMPLE, FEATURE, judge, names, plant_losses


def test_losses_added_without_their_weight(finding, monkeypatch):
    true = DistillationModule.losses

    def losses(self, *args, **kwargs):
        state = self.curriculum
        if self.trainer.training:
            self.curriculum = replace(state, weights={**state.weights, "feature": 1.0})
        result = true(self, *args, **kwargs)
        self.curriculum = state
        return result

    monkeypatch.setattr(DistillationModule, "losses", losses)
    found = finding("routing bypass")
    assert FEATURE in found.title
    assert "training.log line" in found.evidence[0]
    assert "[CURRICULUM] step 0: feature: 0.0000" in found.evidence[0]
    assert "skip components of weight zero" in found.fix


def test_a_raw_value_in_the_total_that_the_components_do_not_list(finding, monkeypatch):
    def bug(module, result):
        raw = result.breakdown.raw
        hidden = module.training and FEATURE in raw and module.curriculum.weights["feature"] == 0
        return replace(result, total=result.total + raw[FEATURE]) if hidden else result

    plant_losses(monkeypatch, bug)
    found = finding("routing bypass")
    assert f"({FEATURE})" in found.title
    assert [line.split(": ")[1] for line in found.evidence[:3]] == [
        "Sum of components",
        "Total loss (outputs['loss'])",
        "Raw",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "CURRICULUM says\n[CURRICULUM] Progress 2.7% (Phase 1)\n[TRAIN DEBUG] routing_feature_matching_loss: 41.22",
        "[TRAIN DEBUG] Total: 56.7\n  routing_feature_matching_loss: 41.22\n[CURRICULUM] Step 2500\n  feature: 0.0000",
        "feature_matching_loss: Weight: 0.0000, Scaled: 41.2200\n",
        "2024-05-01 10:00:00 INFO [CURRICULUM] Step 2500, Progress 3.3%\n2024-05-01 INFO   feature: 0.0000\n"
        "2024-05-01 INFO [TRAIN DEBUG] Step 2600, Batch 2600\n2024-05-01 INFO   routing_feature_matching_loss: 41.2200",
    ],
    ids=["phase", "block", "routing line", "logger"],
)
def test_routing_bypass_in_the_forms_that_people_quote(tmp_path, text):
    diagnosis = judge(text, tmp_path)
    assert names(diagnosis) == ["routing bypass"]
    assert FEATURE in diagnosis.findings[0].title
    assert "skip components of weight zero" in diagnosis.findings[0].fix


def test_the_example_blocks(tmp_path):
    bypass = judge(EXAMPLE, tmp_path)
    assert names(bypass) == ["routing bypass", "raw scale"]
    assert "412.2341" in bypass.findings[1].title
    working = EXAMPLE.replace("412.2341", "1.2341")
    for name in ("feature_matching", "expert_importance", "load_balancing"):
        working = "\n".join(line for line in working.split("\n") if f"    routing_{name}_loss" not in line)
    working = working.replace("15.4521", "14.7234")
    assert names(judge(working, tmp_path)) == []
    evaluated = working + "\n[Eval] Step 2500, loss: 95.8600\n    kd_loss: raw 20.9, weight 0.7, scaled 14.63\n"
    assert names(judge(evaluated, tmp_path)) == ["eval bypass"]


def test_a_weight_that_rises_between_two_blocks_is_no_bypass(tmp_path):
    later = EXAMPLE.replace("[CURRICULUM] Step 2500, Progress 3.3%", "[CURRICULUM] Step 20, Progress 30.0%")
    later = later.replace("Step 2100", "Step 36").replace("412.2341", "1.2341").replace("Step 2500", "Step 20")
    assert names(judge(later, tmp_path)) == []
