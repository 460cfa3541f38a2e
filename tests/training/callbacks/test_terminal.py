"""What a user sees of a default run, in a terminal and in a pipe: nothing of no use, and the table at the end."""

import re
import warnings

import pytest

from helpers.training_log import parse

CHATTER = re.compile(r"GPU available|TPU|Tip|arning|FLOPs|Trainer\(|Seed set|weights_only|stopped:|Loading|Epoch \d+/-")
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
def fit(config, distill, capfd):
    """Runs a few steps with the default bar; returns stdout and stderr."""
    config["progress"] = {}
    config["trainer"] |= {"max_steps": 6, "val_check_interval": 3, "num_sanity_val_steps": -1}

    def call(**options) -> tuple[str, str]:
        config["trainer"] |= options
        capfd.readouterr()
        distill("fit", config)
        captured = capfd.readouterr()
        return captured.out, captured.err

    return call


def test_a_pipe_gets_blocks_and_tables_alone(fit, tmp_path):
    out, err = fit()
    assert not CHATTER.search(out + err)
    assert "\x1b" not in out
    assert "Epoch" not in out, "a bar in a file is noise"
    head, _, rest = out.partition("\n\n")
    assert all(line.startswith(("Check: ", "Suspicious: ")) for line in head.splitlines())
    blocks, _, table = rest.partition("┏")
    log = (tmp_path / "lightning_logs/version_0/training.log").read_text()
    assert repr(parse("\n" + blocks)) == repr(parse(re.sub("^Suspicious: .*\n", "", log, flags=re.MULTILINE)))
    assert re.search(r"validation +┃ +before ┃ +after ┃ +teacher ┃", table)
    assert table.rstrip().splitlines()[-1] == f"Run directory: {tmp_path}/lightning_logs/version_0"


def test_the_closing_table_is_weight_free_and_tells_what_it_compares(fit):
    out, _ = fit()
    table = out[out.rindex("┏") :]
    rows = {cells[1]: cells[2:-1] for line in table.splitlines() if (cells := re.split(r"\s*│\s*", line))[1:]}
    assert "val/loss" not in rows
    assert set(rows) >= {"val/kl_div_T1", "val/student_perplexity", "val/top1_agreement", "val/ece"}
    evaluated = [line for line in out.splitlines() if line.startswith("[Eval]")]
    assert [line.split(",")[0] for line in evaluated] == ["[Eval] Step 0", "[Eval] Step 2", "[Eval] Step 5"]
    before, after, teacher = rows["val/student_perplexity"]
    assert before != after
    assert float(teacher) > 0
    assert rows["val/kl_div_T1"][2] == ""


@pytest.mark.parametrize(
    ("options", "headings"),
    [
        ({"num_sanity_val_steps": 0}, ["step 3", "after", "teacher"]),
        ({"num_sanity_val_steps": 0, "val_check_interval": None}, ["step 6", "teacher"]),
    ],
)
def test_without_a_validation_before_training_no_column_claims_it(fit, options, headings):
    out, err = fit(**options)
    assert not CHATTER.search(out + err)
    heading = next(line for line in out.splitlines() if line.startswith("┃ validation"))
    assert re.split(r"\s*┃\s*", heading)[2:-1] == headings


def test_a_run_without_validation_says_where_it_is(fit, tmp_path):
    out, err = fit(limit_val_batches=0)
    assert not CHATTER.search(out + err)
    assert out.rstrip().splitlines()[-1] == f"Run directory: {tmp_path}/lightning_logs/version_0"
    assert "┏" not in out


def test_a_terminal_has_a_bar_until_the_table(fit, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    out, err = fit()
    plain = ESCAPES.sub("", out)
    assert not CHATTER.search(plain + err)
    bar = plain.rindex("Epoch 1")
    assert plain.index("validation", bar) > bar
    assert "━" not in plain[plain.index("Run directory") :]
    for part in ("loss: ", "kd: ", "lm: ", "lr: "):
        assert part in plain


def test_an_early_stop_is_told_in_the_closing_lines_and_the_log(fit, config, tmp_path):
    early = {"monitor": "val/kl_div_T1", "mode": "max", "patience": 2}  # of what falls: it never improves
    config["early_stopping"] = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": early}
    out, _ = fit(max_steps=30)
    told = "Stopped early at step 9 of 30: val/kl_div_T1 has not improved for 2 validations"
    assert told in out[: out.index("┏")].splitlines()
    log = (tmp_path / "lightning_logs/version_0/training.log").read_text()
    assert log.endswith(f"\n\n{told}\n\n")
    assert parse(log)


def test_our_warnings_are_a_sentence_and_those_of_others_name_their_place(fit, config):
    config["model"]["warmup_steps"] = 100
    with pytest.warns(UserWarning, match="outlasts the run") as caught:
        fit()
    (ours,) = (entry for entry in caught if "outlasts" in str(entry.message))
    line = warnings.formatwarning(ours.message, ours.category, ours.filename, ours.lineno)
    assert line == "warning: model.warmup_steps: 100 outlasts the run of 6 steps.\n"
    assert warnings.formatwarning("odd", UserWarning, "/elsewhere/theirs.py", 7).startswith("/elsewhere/theirs.py:7: ")


def test_validation_has_a_bar_too(config, distill, capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    config["progress"] = {}
    distill("validate", config)
    out = ESCAPES.sub("", capfd.readouterr().out)
    assert re.search(r"Validation ━+ 2/2", out)
    assert out.index("[Eval]") < out.index("Validate metric")
    assert "━ 2/2" not in out[out.index("Validate metric") :]
