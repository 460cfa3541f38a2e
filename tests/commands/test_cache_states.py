"""`distill cache --states true`: a run with losses on layers learns from it what it would from a mixture of experts."""

import csv
import random
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import yaml

from conftest import small_config
from distill.commands import cache
from distill.commands.fit import run
from distill.curriculum import WEIGHT_KEY
from distill.errors import UserError
from distill.teachers.cache_files import read_manifest
from distill.training import cache_build

STATES = ("--states", "true", "--shard_rows", "100")
WEIGHTS = {"feature": 0.1, "attention": 0.1, "layerwise": 0.05, "contrastive": 0.05}


def curriculum(assets: Path) -> dict:
    """A run with the four routing losses, layerwise and contrastive, all on from the first step."""
    config = small_config(assets)
    config["model"] |= {
        "teacher": str(assets / "qwen3_moe"),
        "routing": {"teacher_layers": 2},
        "layerwise": {},
        "contrastive": {"tokens_per_row": 8, "queue_size": 100, "teacher_layer": 2},
    }
    config["curriculum"] = dict(WEIGHTS)
    config["trainer"] |= {"max_steps": 12, "val_check_interval": 6}
    return config


@pytest.fixture
def config(assets, tmp_path, monkeypatch) -> dict:
    monkeypatch.chdir(tmp_path)
    return curriculum(assets)


@pytest.fixture(scope="module")
def stored(assets, tmp_path_factory) -> dict[str, Path]:
    """Caches of that run, by their encoding."""
    folders = {}
    for name, kd in (("hidden", {}), ("top_k", {"top_k": 16})):
        folder = tmp_path_factory.mktemp(name)
        config = curriculum(assets)
        config["model"]["kd_loss"] = kd
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["distill"])
            patch.chdir(folder)
            run(["cache", "--config", "config.yaml", "--output", "cache", *STATES])
        folders[name] = folder / "cache"
    return folders


def from_cache(config: dict, folder: Path | str, **model) -> dict:
    return config | {"model": config["model"] | {"teacher": str(folder)} | model}


def ran(cli) -> tuple[list[dict], dict]:
    with Path(cli.trainer.log_dir, "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return rows, {name: value.clone() for name, value in cli.model.state_dict().items()}


def assert_same(one, other, tolerance: float, names: set[str]):
    compared = set()
    for ours, theirs in zip(one[0], other[0], strict=True):
        for name, value in ours.items():
            if name.startswith(("train/", "val/", "routing/")) and value and not name.endswith(("_per_s", "_gib")):
                assert float(theirs[name]) == pytest.approx(float(value), rel=tolerance, abs=tolerance), name
                compared.add(name)
    assert {f"{part}/{name}" for part in ("train", "val") for name in names} <= compared
    for name, value in one[1].items():
        torch.testing.assert_close(other[1][name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: n + m)


ALL = set(WEIGHT_KEY) - {"attention_loss"}


def test_the_whole_curriculum_from_disk_equals_the_live_run(distill, config, stored):
    live = distill("fit", config)
    cached = distill("fit", from_cache(config, stored["hidden"]))
    assert set(live.model.components) == ALL
    assert not live.model.layerwise.projections, "the student speaks the teacher's language"
    assert_same(ran(live), ran(cached), 1e-5, ALL)
    assert all(parameter.is_meta for parameter in cached.model.teacher.model.parameters())
