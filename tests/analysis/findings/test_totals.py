"""Totals that are not the sum of their parts, and parts that dwarf the others."""

from dataclasses import replace

import pytest

from distill.commands.diagnose import diagnose
from distill.losses.routing import Routing
from distill.training.module import DistillationModule
from helpers.diagnosis import FEATURE, plant_losses


def test_a_total_that_is_not_the_sum(finding, monkeypatch):
    def bug(module, result):
        return replace(result, total=result.total * 1.01) if module.training else result

    plant_losses(monkeypatch, bug)
    found = finding("sum differs")
    assert "Sum of components" in found.evidence[0]
    assert "something is added to the total" in found.cause


def test_accumulation_applied_twice(finding, monkeypatch):
    true = DistillationModule.training_step

    def training_step(self, *args):
        outputs = true(self, *args)
        return outputs | {"loss": outputs["loss"] / self.trainer.accumulate_grad_batches}

    monkeypatch.setattr(DistillationModule, "training_step", training_step)
    found = finding("sum differs", "--trainer.accumulate_grad_batches", "2")
    assert "divided by 2 once more" in found.cause


def test_a_loss_that_is_not_normalised(finding, monkeypatch):
    true = Routing.forward

    def forward(self, *args, **kwargs):
        result = true(self, *args, **kwargs)
        return replace(result, sums={n: v * 412.0 if n == FEATURE else v for n, v in result.sums.items()})

    monkeypatch.setattr(Routing, "forward", forward)
    found = finding("raw scale")
    assert f"The raw value of {FEATURE} dwarfs" in found.title
    assert "normalise the target" in found.fix


COLUMNS = "curriculum/kd,curriculum/layerwise,curriculum/contrastive,epoch,step,train/loss,train/kd_loss_scaled,"
COLUMNS += "train/layerwise_loss_scaled,train/contrastive_loss_scaled,val/loss"
SOUND = [
    "0.5,0.2,0,0,0,2.5,2.0,0.5,,",
    "0.5,0.1,0,0,10,2.2500004,2.0000002,0.2500001,,",  # single precision leaves the last digits to chance
    "0.5,0,0,0,20,1.75,1.75,,,",
    ",,,0,20,,,,,3.0",
    "0.5,0,0.1,0,30,1.875,1.625,,0.25,",
    "0.5,0,0,1,40,,,,,",
]


def judged(folder, rows):
    (folder / "metrics.csv").write_text("\n".join([COLUMNS, *rows]) + "\n")
    return [found for found in diagnose(str(folder)).findings if found.name in ("stale metrics", "sum differs")]


def test_rows_that_add_up_are_in_order(tmp_path):
    assert judged(tmp_path, SOUND) == []


@pytest.mark.parametrize("weight", ["0", "", "0.1"], ids=["zero", "not logged", "of another step"])
def test_a_value_left_over_from_an_earlier_step(tmp_path, weight):
    rows = [*SOUND[:2], f"0.5,{weight},0,0,20,1.75,1.75,0.2500001,,", *SOUND[3:]]
    (found,) = judged(tmp_path, rows)
    assert found.name == "stale metrics"
    assert found.title.startswith("In 1 of 4 rows of metrics.csv train/loss is not the sum of its scaled components")
    assert "layerwise_loss" in found.title
    assert "kd_loss" not in found.title
    assert found.evidence == [
        "metrics.csv line 4, step 20: train/loss 1.75 (its scaled components add up to 2)",
        "metrics.csv line 4, step 20: train/layerwise_loss_scaled 0.25",
    ]
    assert "until the epoch ends" in found.cause


def test_a_value_left_over_from_a_step_between_two_rows(tmp_path):
    (found,) = judged(tmp_path, [*SOUND[:2], "0.5,0,0,0,20,1.75,1.75,0.125,,", *SOUND[3:]])
    assert (found.name, "layerwise_loss" in found.title) == ("stale metrics", True)


@pytest.mark.parametrize("loss", ["2.75", "2.1", "-2.5"])
def test_a_total_that_no_component_explains(tmp_path, loss):
    (found,) = judged(tmp_path, [SOUND[0].replace("2.5,2.0", f"{loss},2.0"), *SOUND[1:]])
    assert found.name == "sum differs"
    assert "(its scaled components add up to 2.5)" in found.evidence[0]
    assert "no component lists" in found.cause


def test_a_row_that_is_not_finite_is_no_wrong_sum(tmp_path):
    assert judged(tmp_path, [SOUND[0].replace("2.5,2.0", "nan,nan"), *SOUND[1:]]) == []
