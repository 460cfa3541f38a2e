"""A student is made once, whole or not at all."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distill.models.start import cache
from distill.models.start.cache import cached_student, digest, made_before
from distill.models.start.make import CPU
from distill.models.start.shape import Shape, StudentFit
from distill.models.start.walk import Rows
from helpers import tiny

IDS = torch.randint(3, tiny.VOCAB, (6, 24), generator=torch.Generator().manual_seed(1))
ROWS, FIT = Rows.of(IDS), StudentFit(steps=2)


def test_a_second_run_reads_what_the_first_made(tmp_path, monkeypatch):
    teacher, shape = tiny.tiny_qwen3_moe(), Shape([0, 1], 24)
    assert made_before(teacher, shape, ROWS, FIT, CPU, tmp_path) is None
    first, record = cached_student(teacher, shape, ROWS, FIT, CPU, tmp_path)
    assert not record["cached"]
    assert [layer["teacher_layer"] for layer in record["layers"]] == [0, 1]
    monkeypatch.setattr(cache, "make_student", None)
    second, again = cached_student(teacher, shape, ROWS, FIT, CPU, tmp_path)
    assert again == record | {"cached": True}
    assert type(first) is type(second)
    assert second.training
    assert not second.config.use_cache
    assert first.state_dict().keys() == second.state_dict().keys()
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert made_before(teacher, shape, ROWS, FIT, CPU, tmp_path)["layers"] == record["layers"]


@pytest.mark.parametrize("shape", [Shape([0, 1], 16), Shape([1], None), Shape([0, 1], None, 8)], ids=str)
def test_where_a_student_stops_is_where_its_teacher_does(tmp_path, shape):
    """Whatever was made before of the same weights, of which the names in the cache are."""
    for stops in ([2, 5], 7):
        teacher = tiny.tiny_llama()
        teacher.generation_config.eos_token_id = stops
        made, _ = cached_student(teacher, shape, ROWS, StudentFit(steps=0), CPU, tmp_path)
        assert made.generation_config.eos_token_id == stops


@pytest.mark.parametrize("what", ["weight", "rows", "steps", "shape", "products"])
def test_another_teacher_data_or_option_is_another_student(what, monkeypatch):
    teacher, shape, rows, fit = tiny.tiny_llama(), Shape([0], 16), ROWS, FIT
    name = digest(teacher, shape, rows, fit, CPU)
    assert digest(tiny.tiny_llama(), shape, Rows.of(IDS.clone()), fit, CPU) == name
    if what == "weight":
        teacher.lm_head.weight.data[7, 3] += 1e-3
    elif what == "rows":
        rows = Rows.of(IDS.flip(0))
    elif what == "steps":
        fit = StudentFit(steps=3)
    elif what == "products":
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    else:
        shape = Shape([1], 16)
    assert digest(teacher, shape, rows, fit, CPU) != name


class OwnConfig(LlamaConfig):
    """Of a family that transformers does not know, as code that comes with weights is."""

    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig


def test_a_family_of_its_own_code_is_read_again(tmp_path):
    teacher = OwnForCausalLM(OwnConfig(**tiny.BASE)).eval()
    first, _ = cached_student(teacher, Shape([1], 16), ROWS, FIT, CPU, tmp_path)
    second, record = cached_student(teacher, Shape([1], 16), ROWS, FIT, CPU, tmp_path)
    assert record["cached"]
    assert type(second) is type(first) is OwnForCausalLM
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("make", [tiny.tiny_deepseek_v3, tiny.tiny_gemma])
def test_a_buffer_that_steers_the_teacher_counts(make):
    """A router's bias is one, and an embedding's scale, which has no dimensions."""
    teacher = make()
    name = digest(teacher, Shape([0]), ROWS, FIT, CPU)
    known = ("e_score_correction_bias", "embed_scale")
    steering = [value for key, value in teacher.named_buffers() if key.endswith(known)]
    assert steering
    steering[-1].add_(0.5)
    assert digest(teacher, Shape([0]), ROWS, FIT, CPU) != name


KILLED = """
import os, sys
from pathlib import Path
import torch
from distill.models.start import cache, make
from distill.models.start.cache import cached_student
from distill.models.start.make import CPU
from distill.models.start.shape import Shape, StudentFit
from distill.models.start.walk import Rows
from helpers import tiny

def killed(after):
    def call(*args, **kwargs):
        after(*args, **kwargs)
        os.kill(os.getpid(), 9)
    return call

if sys.argv[2] == "fit":  # the first of two layers is fitted
    make.train_alone = killed(make.train_alone)
else:  # the weights are on disk, the record is not
    cache.save_model = killed(cache.save_model)
rows = Rows.of(torch.randint(3, tiny.VOCAB, (6, 24), generator=torch.Generator().manual_seed(1)))
cached_student(tiny.tiny_qwen3_moe(), Shape([0, 1], 24), rows, StudentFit(steps=2), CPU, Path(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["fit", "write"])
def test_one_that_was_killed_is_made_again_and_its_leavings_go(tmp_path, moment):
    paths = os.pathsep.join([p for p in sys.path if p])
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), moment], env=os.environ | {"PYTHONPATH": paths}
    )
    assert ended.returncode == -9
    assert len(list(tmp_path.glob("*.partial"))) == (moment == "write")
    assert made_before(tiny.tiny_qwen3_moe(), Shape([0, 1], 24), ROWS, FIT, CPU, tmp_path) is None
    student, record = cached_student(tiny.tiny_qwen3_moe(), Shape([0, 1], 24), ROWS, FIT, CPU, tmp_path)
    assert not record["cached"]
    assert not list(tmp_path.glob("*.partial"))
    whole = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(whole) == 1
    assert json.loads((whole[0] / "student_fit.json").read_text())["layers"] == record["layers"]
    expected, _ = cached_student(tiny.tiny_qwen3_moe(), Shape([0, 1], 24), ROWS, FIT, CPU, tmp_path / "other")
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), expected.parameters(), strict=True))
