"""What is said of choices that were measured to harm, and of a schedule that jumps."""

import pytest
from rich.console import Console

from distill.curriculum import Schedules
from distill.losses.contrastive import Contrastive
from distill.losses.layerwise import Layerwise
from distill.losses.routing import Routing
from distill.models.lora import LoRA
from distill.preflight.choices import choice_findings
from distill.preflight.tables import curriculum_table
from distill.training.callbacks.curriculum import Curriculum
from distill.training.options import ModelOptions
from helpers.tiny import tiny_llama

FIRST = {"kd": [[0.3, 0.0], [0.3, 1.0]], "layerwise": [[0.3, 1.0], [0.3, 0.0]]}
RANDOM, CUT = {"student_config": {"model_type": "llama"}}, {"student_layers": 2}


def said(schedules=None, hidden_size=16, **options):
    return choice_findings(
        ModelOptions("teacher", **options), Schedules(**(schedules or {})), tiny_llama(hidden_size=hidden_size)
    )


def test_features_that_are_late_for_random_weights():
    (found,) = said(routing=Routing(), layerwise=Layerwise(), **RANDOM)
    assert found.startswith("curriculum.feature: feature from 30%, attention from 30%, layerwise from 60% on is late")
    assert said({"feature": 0.1, "attention": 0.1}, routing=Routing(), **RANDOM) == []
    assert said(FIRST, layerwise=Layerwise(), **RANDOM) == []
    assert said(**RANDOM) == []
    assert said(contrastive=Contrastive(), **CUT) == []


def test_a_projection_between_states_of_one_language():
    (found,) = said(layerwise=Layerwise(projection="linear"), **CUT)
    assert found.startswith("model.layerwise.projection: linear")
    assert said(layerwise=Layerwise(projection="linear"), student_intermediate_size=8) == [found]
    assert said(layerwise=Layerwise(), **CUT) == []
    assert said(layerwise=Layerwise(projection="linear"), student_hidden_size=8) == []
    assert said(layerwise=Layerwise(projection="linear"), student="another") == []


@pytest.mark.parametrize(
    ("optimizer", "rate", "other"),
    [("muon", 1e-4, "AdamW"), ("muon", 3e-3, None), ("adamw", 1e-2, "Muon"), ("adamw", 1e-3, None)],
)
def test_the_other_optimizers_rate(optimizer, rate, other):
    found = said(hidden_size=576, optimizer=optimizer, learning_rate=rate, **CUT)
    assert [f"{rate} is a rate for {other}" in line for line in found] == ([True] if other else [])


def test_adapters_bear_more():
    assert said(hidden_size=576, learning_rate=1e-2, lora=LoRA(), **CUT) == []


def test_a_jump_is_printed_as_one():
    console = Console(width=200)
    with console.capture() as captured:
        console.print(curriculum_table(Curriculum(**FIRST, temperature=1.0), ["kd_loss", "layerwise_loss"], 1000))
    rows = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in captured.get().splitlines() if "│" in line}
    assert [cell.strip() for cell in rows["kd"]] == ["      ██████████████".strip(), "0", "0, then 1", "1"]
    assert [cell.strip() for cell in rows["layerwise"]] == ["██████", "1", "1, then 0", "0"]
    assert [cell.strip() for cell in rows["temperature"]][1:] == ["1", "1", "1"]


def test_losses_that_a_curriculum_leaves_behind_are_measured(config, distill, capsys):
    config["model"] |= {"layerwise": {}, "routing": None, "lm_loss": False}
    config["curriculum"] = FIRST
    with pytest.raises(SystemExit):  # the teacher is random
        distill("check", config)
    (row,) = (line.split("│") for line in capsys.readouterr().out.splitlines() if "│ layerwise_loss" in line)
    assert row[2].strip() == "1 to 0"
    assert float(row[3]) > 0
