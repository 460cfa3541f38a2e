"""Fixtures: a cache of `datasets` that all tests here share and that vanishes with the session."""

import datasets
import pytest


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("datasets_cache")


@pytest.fixture(autouse=True)
def _own_cache(cache, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
