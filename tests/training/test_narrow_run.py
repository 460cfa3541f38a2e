"""A planted run on narrow text: it comes closer to the teacher there, drifts away elsewhere, and that is told."""

import csv
from pathlib import Path

import pytest

from conftest import text_of_stdlib
from distill.commands import diagnose


@pytest.fixture
def narrow(config, tmp_path) -> dict:
    """Three of the teacher's four layers, trained fast on two words; the second set is ordinary text."""
    (tmp_path / "narrow.txt").write_text("one two " * 3_000)
    (tmp_path / "wiki.txt").write_text(text_of_stdlib(4_000))
    sets = {"in_domain": 0.05, "wiki": str(tmp_path / "wiki.txt")}
    config["data"] |= {"dataset": str(tmp_path / "narrow.txt"), "validation": sets}
    config["model"] = {"teacher": config["model"]["teacher"], "student_layers": 3}
    config["model"] |= {"learning_rate": 4e-2, "warmup_steps": 20}
    config["curriculum"] = {"kd": 1.0, "lm": 0.0}
    config["trainer"] |= {"max_steps": 80, "val_check_interval": 10, "num_sanity_val_steps": 0}
    how = {"monitor": "val/wiki/kl_div_T1", "mode": "min", "filename": "step={step}", "auto_insert_metric_name": False}
    config["checkpoint"] = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": how}
    return config


def test_the_best_by_the_other_set_is_kept_and_diagnose_says_so(narrow, distill, capsys):
    cli = distill("fit", narrow)
    folder = Path(cli.trainer.log_dir)
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["val/loss"]]
    there, elsewhere = ([float(row[f"val/{name}/kl_div_T1"]) for row in rows] for name in ("in_domain", "wiki"))
    assert there == sorted(there, reverse=True), "the narrow text alone sees nothing"
    assert elsewhere[-1] > 1.03 * min(elsewhere)
    best = 10 * (1 + elsewhere.index(min(elsewhere)))
    assert best < 80
    assert (folder / "checkpoints" / "best.ckpt").resolve().name == f"step={best}.ckpt"
    told = f"by the lowest val/wiki/kl_div_T1, {min(elsewhere):.4f} at step {best} of 80"
    assert told in capsys.readouterr().out
    assert diagnose.main([str(folder)]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "[validation sets disagree]" in said
    assert (
        f"from step {best - 1} to 79 val/wiki/kl_div_T1 rises from {min(elsewhere):.4f} to {elsewhere[-1]:.4f}" in said
    )
    assert f"keep the checkpoint that val/wiki/kl_div_T1 chose, near step {best - 1}" in said
