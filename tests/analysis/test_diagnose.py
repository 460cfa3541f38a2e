"""`distill diagnose` on healthy runs and quoted lines, what it says is in order, and what it refuses."""

import io
import json
import re
from pathlib import Path

import pytest

from distill.cli import COMMANDS
from distill.commands.diagnose import diagnose, main
from distill.errors import UserError
from helpers.diagnosis import EXAMPLE, judge, names


def test_six_components_in_three_phases(fit, capsys):
    run = fit()
    capsys.readouterr()
    assert main([run]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{run}: healthy\n")
    assert "Curriculum working: where feature, attention" in text
    assert "wait for more steps" in " ".join(text.split())
    assert "Sum of components = total in every TRAIN DEBUG block (3)." in text
    assert "Validation weighs like training in every evaluation (2)." in text
    assert "The learning rate is above zero and fits the run: 2.687e-04 to 1.000e-02." in text
    assert "Not judged" not in text


def test_kd_alone_with_accumulation_and_warm_up(fit, config):
    config["model"]["routing"] = None
    run = fit(*["--trainer.accumulate_grad_batches", "2", "--model.warmup_steps", "4", "--model.lm_loss", "false"])
    assert names(diagnose(run)) == []


def test_a_moe_teacher_with_slow_schedules(fit, config, assets):
    config["model"] |= {"teacher": str(assets / "qwen3_moe"), "routing": {"teacher_layers": 1}}
    config["curriculum"] = {"temperature": [[0.0, 4.0], [1.0, 1.0]], "top_k_experts": [[0.0, 2.0], [1.0, 4.0]]}
    assert names(diagnose(fit())) == []


def test_a_run_that_is_still_going_is_healthy_at_every_moment(fit, config, tmp_path):
    config["trainer"]["val_check_interval"] = 3
    run = Path(fit())
    blocks = re.split(r"(?<=\n)\n(?=\n)", (run / "training.log").read_text())
    header, *rows = (run / "metrics.csv").read_text().splitlines(keepends=True)
    step = header.rstrip().split(",").index("step")
    part = tmp_path / "part"
    part.mkdir()
    (part / "config.yaml").write_text((run / "config.yaml").read_text())
    assert len(blocks) > 30
    for number in range(1, len(blocks) + 1):
        text = "\n".join(blocks[:number])
        last = max(int(found) for found in re.findall(r"Step (\d+)", text))
        (part / "training.log").write_text(text)
        (part / "metrics.csv").write_text(header + "".join(r for r in rows if int(r.split(",")[step]) <= last))
        assert names(diagnose(str(part))) == [], number


def test_curriculum_working_in_the_forms_that_people_quote(tmp_path):
    text = "[CURRICULUM] Progress 2.7% (Phase 1)\nfeature_matching_loss: Weight: 0.0000, Scaled: 0.0000\n"
    diagnosis = judge(text + "[TRAIN DEBUG] Total: 15.5\n[Eval] loss: 19.86\n", tmp_path)
    assert names(diagnosis) == []
    assert "wait for more steps" in diagnosis.healthy[0]


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("{routing: null, attention: null, layerwise: {}, contrastive: null}", "where layerwise weigh"),
        ("{routing: {}, layerwise: null}", "where feature, attention weigh"),
        ("{routing: null}", ""),
        (None, "where feature, attention, layerwise, contrastive weigh"),
    ],
)
def test_components_that_a_run_does_not_have_are_not_spoken_of(tmp_path, model, said):
    (tmp_path / "training.log").write_text(EXAMPLE[EXAMPLE.index("[CURRICULUM]") : EXAMPLE.index("[KD LOSS]")])
    if model is not None:
        (tmp_path / "config.yaml").write_text(f"model: {model}\n")
    sentences = diagnose(str(tmp_path)).healthy
    assert [sentence.split(" 0.0000")[0] for sentence in sentences if "Curriculum working" in sentence] == (
        [f"Curriculum working: {said}"] if said else []
    )


def test_json_from_standard_input(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("[TRAIN DEBUG] Total: 15.5\n[Eval] loss: 95.86\n"))
    assert main(["-", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert [found["name"] for found in document["findings"]] == ["eval bypass"]
    assert document["findings"][0]["evidence"][1].startswith("stdin line 2, [Eval]: [Eval] loss: 95.86")
    assert set(document) == {"source", "findings", "healthy", "not_judged"}
    assert "diagnose" in COMMANDS


@pytest.mark.parametrize(
    ("files", "source", "message"),
    [
        ({}, "absent", "absent does not exist"),
        ({"training.log": "nothing of ours\n"}, "training.log", r"no block of a training\.log"),
        ({"metrics.csv": "epoch,loss\n0,1\n"}, ".", "no column step"),
        ({"metrics.csv": "epoch,step,loss\n0,1,one\n"}, ".", r"metrics\.csv line 2 is not numbers"),
        ({"training.log": "[Eval] loss: 1\n", "config.yaml": "a: [\n"}, ".", "is no YAML"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, files, source, message):
    monkeypatch.chdir(tmp_path)
    for name, text in files.items():
        Path(name).write_text(text)
    with pytest.raises(UserError, match=message):
        diagnose(source)


def test_a_wrong_argument_is_one_line():
    with pytest.raises(UserError, match=r"unrecognized arguments: --jsn; see distill diagnose --help"):
        main(["run", "--jsn"])
