"""Lines in place of the bar: when they come and what they say, on a clock that the test turns."""

import re
from types import SimpleNamespace

import pytest

from distill.commands.diagnose import main as diagnose
from distill.errors import UserError
from distill.training.callbacks import progress_lines
from distill.training.callbacks.progress_lines import ProgressLines
from helpers.clock import Clock


@pytest.fixture
def lines(config, distill, capfd, monkeypatch):
    """Fits 8 steps of two micro-batches, 20 seconds each; the lines, and all of stdout."""
    monkeypatch.setattr(progress_lines, "time", SimpleNamespace(monotonic=lambda: Clock.now))
    config["model"]["routing"] = None
    config["trainer"] |= {"max_steps": 8, "accumulate_grad_batches": 2, "limit_val_batches": 1}
    config["trainer"] |= {"num_sanity_val_steps": 0, "val_check_interval": 14, "check_val_every_n_epoch": None}
    config["trainer"]["callbacks"] = [{"class_path": "helpers.clock.Clock"}]

    def call(**options) -> tuple[list[str], str]:
        config.update(options)
        capfd.readouterr()
        distill("fit", config)
        out = capfd.readouterr().out
        return [line for line in out.splitlines() if re.match(r"Step \d+ of", line)], out

    return call


def test_every_thirty_seconds_where_no_terminal_is(lines):
    """Three micro-batches a line: 4 rows of 31 targets each in ten seconds, and 20 seconds for a step."""
    said, _ = lines()
    pattern = r"Step (\d+) of 8, loss \d+\.\d{4}, 12 tokens per second, (\S+) left"
    found = [re.fullmatch(pattern, line) for line in said if "validating" not in line]
    assert [(int(match[1]), match[2]) for match in found[:3]] == [(1, "0:02:20"), (3, "0:01:40"), (4, "0:01:20")]


def test_validations_are_told_and_left_out_of_the_rate(lines):
    said, _ = lines()
    where = said.index("Step 7 of 8, validating: batch 1 of 1")
    assert "12 tokens per second" in said[where - 1]
    after = lines(progress_lines={"every_seconds": 10.0})[0]
    where = after.index("Step 7 of 8, validating: batch 1 of 1")
    assert ", 12 tokens per second, " in after[where + 1]


@pytest.mark.parametrize("off", ["terminal", "key"])
def test_none_in_a_terminal_or_where_they_are_switched_off(lines, off, monkeypatch):
    if off == "terminal":
        monkeypatch.setenv("FORCE_COLOR", "1")
    assert lines(progress_lines=None if off == "key" else {})[0] == []


def test_they_stay_out_of_the_log_and_do_not_disturb_a_reader_of_stdout(lines, tmp_path, capfd):
    _, out = lines(progress_lines={"every_seconds": 1.0})
    assert "validating" not in (tmp_path / "lightning_logs/version_0/training.log").read_text()
    verdicts = []
    for name, text in (("with", out), ("without", re.sub(r"Step \d+ of 8, .*\n", "", out))):
        (tmp_path / f"{name}.log").write_text(text)
        diagnose([str(tmp_path / f"{name}.log")])
        verdicts.append(re.sub(r"line \d+|\S*with\S*\.log", "", capfd.readouterr().out))
    assert verdicts[0] == verdicts[1]


def test_an_interval_that_cannot_be_meant():
    with pytest.raises(UserError, match=r"progress_lines.every_seconds: 0.0 must be above 0"):
        ProgressLines(0.0)
