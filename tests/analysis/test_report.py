"""The command `distill report`: what it refuses, where it writes, and that it needs no torch."""

import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from distill.commands.report import main, report
from distill.errors import UserError

ROOT = Path(__file__).parents[2]


def test_refusals_name_value_and_remedy(tmp_path, folder, monkeypatch):
    with pytest.raises(UserError, match=r"RUN: .*nowhere is no folder: give a run's"):
        report([tmp_path / "nowhere"])
    with pytest.raises(UserError, match=r"RUN: .*version_0 is given twice"):
        report([folder, folder / ".." / "version_0"])
    (tmp_path / "void").mkdir()
    with pytest.raises(UserError, match=r"RUN: .*void has no metrics.csv, training.log, config.yaml"):
        report([tmp_path / "void"])
    with pytest.raises(UserError, match=r"--out: .*x.html cannot be written \(No such file"):
        report([folder], tmp_path / "no" / "x.html")
    with pytest.raises(UserError, match="see distill report --help"):
        main([])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        UserError, match=r"matplotlib is not installed: pip install 'student-aware-distillation\[report"
    ):
        report([folder])
    assert not (folder / "report.html").exists()


def test_command_writes_where_it_is_told_and_needs_no_torch(folder, tmp_path):
    script = "import sys; from distill.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    out = tmp_path / "out.html"
    arguments = [sys.executable, "-c", script, "report", str(folder), "--out", str(out)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"Report: {out}\n", "")
    assert out.stat().st_size < 1_000_000


def test_everything_the_page_needs_is_packaged():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    files = (ROOT / "src/distill/analysis/report").iterdir()
    needed = [path.name for path in files if path.is_file() and path.suffix != ".py"]
    assert sorted(needed) == ["page.css", "page.html", "page.js"]
    assert all(any(fnmatch(name, pattern) for pattern in patterns["distill.analysis.report"]) for name in needed)
