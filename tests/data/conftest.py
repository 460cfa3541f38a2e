"""Fixtures: a cache of `datasets` that vanishes with the test."""

import datasets
import pytest


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")


@pytest.fixture(scope="session")
def tokenizer(assets):
    from distill.models import load_tokenizer

    return load_tokenizer(str(assets / "llama"))
