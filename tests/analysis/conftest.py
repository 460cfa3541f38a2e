"""Runs to be judged and drawn: short fits, healthy or with a fault planted in them, and a folder written by hand."""

from pathlib import Path

import pytest

from distill.commands.diagnose import diagnose
from helpers.diagnosis import names
from helpers.written_run import write


@pytest.fixture
def fit(distill, config):
    """Runs a short fit and returns its directory."""
    config["train_debug"], config["preflight"] = {"every_n_batches": 4}, None  # which suspects an untrained teacher
    config["model"]["learning_rate"] = 1e-2
    config["model"]["routing"]["teacher_layers"] = 1
    config["trainer"] |= {"max_steps": 12, "val_check_interval": 6, "enable_model_summary": False}
    config["data"]["max_validation_sequences"] = 4
    config["checkpoint"] = None

    def call(*args: str) -> str:
        return distill("fit", config, *args).trainer.log_dir

    return call


@pytest.fixture
def finding(fit, config):
    """Runs a faulty fit, audit off; the one thing that is found must have the name given."""
    config["audit"] = None

    def call(name: str, *args: str):
        diagnosis = diagnose(fit(*args))
        assert names(diagnosis) == [name], [found.title for found in diagnosis.findings]
        return diagnosis.findings[0]

    return call


@pytest.fixture
def folder(tmp_path) -> Path:
    return write(tmp_path / "lightning_logs" / "version_0")
