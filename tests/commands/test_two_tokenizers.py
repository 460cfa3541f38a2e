"""Evaluation, prediction and export of a student whose tokenizer is not its teacher's: each side reads with its own."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml

from distill.commands.evaluate import evaluate, print_report
from distill.commands.export import export
from distill.commands.predict import predict
from distill.errors import UserError
from distill.models.load import load_model, load_tokenizer
from helpers.two_tokenizers import pair_config, write_pair


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, str]:
    """The folder of a pair, and the checkpoint of a short run."""
    from distill.commands.fit import run

    folder = tmp_path_factory.mktemp("pair")
    write_pair(folder)
    config = pair_config(folder)
    config["trainer"] |= {"max_steps": 4, "num_sanity_val_steps": 0, "default_root_dir": str(folder)}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["distill"])
        patch.chdir(folder)
        cli = run(["fit", "--config", str(folder / "config.yaml")])
    return folder, str(Path(cli.trainer.log_dir, "checkpoints", "last.ckpt"))


def test_figures_are_those_of_validation_and_of_each_sides_own_tokens(run, capsys):
    folder, checkpoint = run
    report = evaluate(checkpoint, baselines={"before": str(folder / "student")}, accelerator="cpu")
    student, teacher = report["models"]["student"], report["models"]["teacher"]
    metrics = torch.load(checkpoint, weights_only=True)["distill"]["run"]["metrics"]
    assert student["bits_per_byte"] == pytest.approx(metrics["val/bits_per_byte"], rel=1e-5)
    assert student["kl_div_T1"] == pytest.approx(metrics["val/kl_div_T1"], rel=1e-4)
    assert not {"top1_agreement", "acceptance", "retention_percent", "entropy_gap"} & student.keys()
    assert report["measured_on"]["tokenizers"] == {"teacher": 420, "student": 330}
    assert set(report["gap_closed_percent"]["before"]) == {"bits_per_byte", "kl_div_T1"}
    json.dumps(report)
    # The teacher by itself on the same text: one row after the other, as the student's rows cut it.
    assert 0 < teacher["bits_per_byte"] == pytest.approx(teacher["nll"] / math.log(2) / 1.5, rel=0.5)
    print_report(report)
    shown = capsys.readouterr().out
    assert "have different tokenizers" in shown
    assert "agreement" not in shown.replace("KL, agreements", "")


def test_a_baseline_must_read_as_the_student_does(run):
    folder, checkpoint = run
    with pytest.raises(UserError, match=r"^--baseline other: its tokenizer is another than the student's"):
        evaluate(checkpoint, baselines={"other": str(folder / "teacher")}, accelerator="cpu")


def test_prompts_are_read_by_each_side(run):
    folder, checkpoint = run
    [found] = predict(checkpoint, ["The statement"], max_new_tokens=5, accelerator="cpu")
    for name in ("teacher", "student"):
        tokenizer = load_tokenizer(str(folder / name))
        source = str(folder / "teacher") if name == "teacher" else checkpoint
        from distill.checkpoints.students import load_student

        model = load_student(source).model
        ids = torch.tensor([tokenizer("The statement")["input_ids"]])
        for _ in range(5):
            with torch.no_grad():
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        prompt = len(tokenizer("The statement")["input_ids"])
        assert getattr(found, name) == tokenizer.decode(ids[0, prompt:], skip_special_tokens=True)


def test_rows_go_on_by_each_side(run):
    _, checkpoint = run
    found = list(predict(checkpoint, rows=2, prompt_tokens=6, max_new_tokens=3, accelerator="cpu"))
    assert len(found) == 2
    assert all(one.prompt and one.text for one in found)


def test_an_export_carries_the_students_tokenizer(run, tmp_path):
    folder, checkpoint = run
    written = export(checkpoint, str(tmp_path / "exported"))
    tokenizer, own = load_tokenizer(str(written)), load_tokenizer(str(folder / "student"))
    assert tokenizer.get_vocab() == own.get_vocab()
    assert load_model(str(written)).config.vocab_size == len(own) == 330
