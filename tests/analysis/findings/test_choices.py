"""Choices of a configuration that were measured to harm, read from what a run has left."""

import pytest
import yaml

from distill.analysis.findings import choices as diagnosed
from distill.commands.diagnose import diagnose
from distill.preflight import choices as checked
from helpers.diagnosis import names

ROWS = "epoch,step,train/kd_loss,train/lr,val/kl_div_T1\n" + "".join(
    f"0,{step},{3 - step / 100},1e-3,{2 - step / 100}\n" for step in range(0, 100, 5)
)
RANDOM = {"student_config": {"model_type": "llama", "hidden_size": 576}}


@pytest.fixture
def found(tmp_path):
    """Findings of a run that learns, with these keys in its configuration."""

    def call(model, curriculum=None, log=""):
        (tmp_path / "metrics.csv").write_text(ROWS)
        (tmp_path / "training.log").write_text(log)
        config = {"model": {"learning_rate": 1e-3, "optimizer": "adamw"} | model, "curriculum": curriculum}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config | {"trainer": {"max_steps": 200}}))
        return [finding for finding in diagnose(str(tmp_path)).findings if finding.name != "schedule horizon"]

    return call


def test_features_late(found):
    late = {"layerwise": [[0.6, 0.0], [1.0, 0.05]], "contrastive": 0.1}
    (finding,) = found({"layerwise": {}, "contrastive": {}, **RANDOM}, late)
    assert finding.name == "features late"
    assert "layerwise from 60% of the run on" in finding.title
    assert "config.yaml: curriculum.layerwise: [[0.6, 0.0], [1.0, 0.05]]" in finding.evidence
    assert found({"layerwise": {}, "student_layers": 4}, late) == []
    assert found(RANDOM, late) == []
    assert found({"layerwise": {}, **RANDOM}, {"layerwise": [[0.3, 1.0], [0.3, 0.0]]}) == []
    assert found({"layerwise": {}, **RANDOM}) == []


def test_random_projection(found):
    (finding,) = found({"student_layers": 4, "layerwise": {"projection": "linear"}})
    assert finding.name == "random projection"
    assert "config.yaml: model.student_layers: 4" in finding.evidence
    assert found({"student_layers": 4, "layerwise": {"projection": "auto"}}) == []
    assert found({"student_layers": 4, "student_hidden_size": 96, "layerwise": {"projection": "linear"}}) == []
    assert found({"student": "another", "layerwise": {"projection": "linear"}}) == []


@pytest.mark.parametrize(
    ("optimizer", "rate", "title"),
    [
        ("muon", 1e-4, "rate of 0.0001 is one for AdamW"),
        ("muon", 3e-3, None),
        ("adamw", 1e-2, "rate of 0.01 is one for Muon"),
        ("adamw", 1e-3, None),
    ],
)
def test_the_other_optimizers_rate(found, optimizer, rate, title):
    findings = found({"optimizer": optimizer, "learning_rate": rate, **RANDOM})
    assert [title in finding.title for finding in findings] == ([True] if title else [])


def test_what_the_start_has_said_is_not_said_again(found):
    line = "Suspicious: model.learning_rate: 0.0001 is a rate for AdamW"
    assert [finding.name for finding in found({"optimizer": "muon", "learning_rate": 1e-4}, log=line)] == ["preflight"]


def test_both_judge_by_the_same_rates():
    for name in ("MUON_LEAST_RATE", "ADAMW_MOST_RATE_TIMES_WIDTH"):
        assert getattr(diagnosed, name) == getattr(checked, name)


def test_a_run_with_features_first_is_healthy(fit, config):
    config["model"] |= {"layerwise": {}, "lm_loss": False, "routing": None}
    first = {"kd": [[0.5, 0.0], [0.5, 1.0]], "layerwise": [[0.5, 1.0], [0.5, 0.0]], "temperature": 1.0}
    config["curriculum"] = first
    assert names(diagnose(fit())) == []
