"""Runs whose student is made before they start: once, the same for everybody, recorded where others read it."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import distill
from conftest import text_of_stdlib
from distill.checkpoints.card import model_card
from distill.checkpoints.students import load_student
from distill.errors import UserError
from distill.models.start import cache
from distill.training import start
from helpers.two_ranks import fit as fit_in_a_process


@pytest.fixture
def moe(config, assets, tmp_path, monkeypatch) -> dict:
    """A dense student of the MoE teacher, half as deep; its cache is empty."""
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    config["model"] |= {
        "teacher": str(assets / "qwen3_moe"),
        "student_intermediate_size": 24,
        "student_fit": {"tokens": 512, "steps": 4},
    }
    config["trainer"]["max_steps"] = 2
    return config


def test_a_dense_student_of_a_moe_from_the_command_line(moe, distill, tmp_path, caplog):
    cli = distill("fit", moe)
    assert type(cli.model.student).__name__ == "Qwen3ForCausalLM"
    folder = Path(cli.trainer.log_dir)
    record = json.loads((folder / "student_fit.json").read_text())
    assert [layer["teacher_layer"] for layer in record["layers"]] == [0, 3]
    assert record["tokens"] <= 512
    assert "FFNs of 24 of the teacher's neurons, made in" in caplog.text
    student = load_student(folder / "checkpoints" / "last.ckpt")
    assert student.checkpoint["run"]["student_fit"] == record
    card = model_card("student", student)
    assert "2 of the teacher's layers, their FFNs made of 24 of its neurons" in card
    assert "fitted layer by layer on 4" in card
    student.model.save_pretrained(tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.intermediate_size == 24


def test_a_second_run_and_a_resumed_one_make_nothing(moe, distill, monkeypatch):
    first = distill("fit", moe)
    monkeypatch.setattr(cache, "make_student", None)
    second = distill("fit", moe)
    pairs = zip(first.model.student.parameters(), second.model.student.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    monkeypatch.setattr(start, "cached_student", None)
    last = str(Path(first.trainer.log_dir, "checkpoints", "last.ckpt"))
    resumed = distill("fit", moe, "--ckpt_path", last)
    assert resumed.model.made["layers"] == first.model.made["layers"]
    assert resumed.trainer.global_step == 2


def test_null_is_a_plain_cut_and_where_neurons_are_chosen_the_closed_form(moe, distill):
    moe["model"]["student_fit"] = None
    assert {layer["trained"] for layer in distill("fit", moe).model.made["layers"]} == {"nothing"}
    del moe["model"]["student_intermediate_size"]
    cli = distill("fit", moe)
    assert cli.model.made is None
    assert not Path(cli.trainer.log_dir, "student_fit.json").exists()


def test_a_stream_gives_its_first_rows(moe, distill, tmp_path):
    text = text_of_stdlib(20_000)
    pieces = [json.dumps({"text": text[at : at + 200]}) for at in range(0, len(text), 200)]
    (tmp_path / "pieces.jsonl").write_text("\n".join(pieces))
    moe["data"] |= {"dataset": str(tmp_path / "pieces.jsonl"), "streaming": True, "max_validation_sequences": 4}
    moe["data"] |= {"validation_split": 0.1, "shuffle_buffer": 50}
    moe["trainer"] |= {"val_check_interval": 2, "check_val_every_n_epoch": None}
    assert distill("fit", moe).model.made["tokens"] <= 512


def test_a_library_run_without_our_datamodule_starts_as_it_is_cut(assets, tmp_path):
    module = distill.DistillationModule(str(assets / "llama"), student_layers=2)
    trainer = distill.DistillTrainer(max_steps=1, accelerator="cpu", logger=False, default_root_dir=tmp_path)
    module.trainer = trainer
    with pytest.warns(UserWarning, match="no datamodule gives training rows"):
        module.configure_model()
    assert module.made is None
    other = distill.DistillationModule(str(assets / "qwen3_moe"), student_intermediate_size=8)
    other.trainer = trainer
    with pytest.raises(UserError, match=r"model.student_intermediate_size: neurons are chosen on training rows"):
        other.configure_model()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"student_config": {"model_type": "llama"}, "student_hidden_size": 8}, "student_config is given; leave one"),
        ({"student_intermediate_size": 0}, "model.student_intermediate_size: 0 must be at least 1"),
        ({}, "0 of student, student_layers and student_config are given"),
    ],
)
def test_options_that_cannot_be_meant_together(options, message):
    with pytest.raises(UserError, match=message):
        distill.DistillationModule("teacher", **options)
    for wrong in ({"tokens": 0}, {"steps": -1}, {"learning_rate": 0.0}):
        with pytest.raises(UserError, match=rf"model.student_fit.{next(iter(wrong))}: "):
            distill.StudentFit(**wrong)


@pytest.mark.slow
def test_two_ranks_start_from_what_one_makes(moe, tmp_path, monkeypatch):
    moe["data"]["per_device_batch_size"] = 2
    weights = {}
    for strategy, devices in (("auto", "1"), ("ddp", "2"), ("fsdp2", "2")):
        monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / f"cache {strategy}"))
        moe["data"]["per_device_batch_size"] = 4 // int(devices)
        flags = ("--trainer.strategy", strategy, "--trainer.devices", devices, "--trainer.max_steps", "1")
        weights[strategy] = fit_in_a_process(moe, tmp_path / strategy, *flags)[1]
        (made,) = (path for path in (tmp_path / f"cache {strategy}" / "students").iterdir() if path.is_dir())
        found = AutoModelForCausalLM.from_pretrained(made).state_dict()
        first = weights.setdefault("made", found)
        assert all(torch.equal(first[name], value) for name, value in found.items())
    for strategy in ("ddp", "fsdp2"):
        for name, value in weights["auto"].items():
            torch.testing.assert_close(weights[strategy][name], value, rtol=1e-5, atol=1e-5)
