"""A run made by the program before its modules were moved: it validates, exports and reports as it did then.

`assets/old_run` was written by commit e6a6b10; the figures below are what that commit printed of it.
"""

import hashlib
import shutil
from pathlib import Path

import pytest
import yaml

from distill.commands.diagnose import diagnose
from distill.commands.export import main as export
from distill.commands.report import main as report

OLD = Path(__file__).parent / "assets" / "old_run"
WEIGHTS = "83bd277c44ea46f3783ca90034d85c8a222aedcb7830d16a4225640c2ed8a393"  # sha256 of the exported model.safetensors
VALIDATED = {
    "val/loss": 2.8572571973005934,
    "val/kd_loss": 0.7482357819875082,
    "val/lm_loss": 6.458764712015788,
    "val/routing_feature_matching_loss": 1.300224741299947,
    "val/routing_expert_importance_loss": 0.5282324949900309,
    "val/routing_load_balancing_loss": 0.08757203817367554,
    "val/routing_attention_alignment_loss": 0.5461265246073405,
    "val/kl_div_T1": 0.7402204964109647,
    "val/student_nll": 6.458764645361131,
    "val/top5_agreement": 0.16129032562496842,
    "val/ece": 0.05178109818809135,
    "val/bits_per_byte": 6.348546361496165,
}


@pytest.fixture
def old(tmp_path, monkeypatch) -> Path:
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def test_it_validates_with_the_figures_of_then(old, distill):
    config = yaml.safe_load((old / "run" / "config.yaml").read_text())
    cli = distill("validate", config, "--ckpt_path", "run/checkpoints/last.ckpt")
    figures = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    for name, value in VALIDATED.items():
        assert figures[name] == pytest.approx(value, rel=1e-5), name


def test_it_exports_the_same_weights(old):
    assert export(["run/checkpoints/last.ckpt", "exported", "--tokenizer", "teacher"]) == 0
    assert hashlib.sha256((old / "exported" / "model.safetensors").read_bytes()).hexdigest() == WEIGHTS


def test_it_is_diagnosed_and_reported(old, capsys):
    assert [finding.name for finding in diagnose("run").findings] == ["preflight", "preflight"]
    assert report(["run", "--out", "report.html"]) == 0
    assert "routing_attention_alignment_loss" in (old / "report.html").read_text()
