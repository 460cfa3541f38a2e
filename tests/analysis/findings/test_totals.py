"""Totals that are not the sum of their parts, and parts that dwarf the others."""

from dataclasses import replace

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
