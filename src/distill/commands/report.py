"""`distill report`: what happened in a run, or in several, as one HTML file that opens without network.

It reads what the run wrote and needs no model, no trainer and no torch. It can show only what was logged; where
something was not, a sentence says so.
"""

from collections.abc import Sequence
from pathlib import Path

from distill.commands.arguments import Parser
from distill.errors import UserError


def main(arguments: list[str]) -> int:
    """Runs `distill report RUN [RUN ...] [--out FILE]`."""
    parser = Parser("distill report", description="Writes one HTML file about runs: it opens offline, light and dark.")
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run's folder, lightning_logs/version_N")
    parser.add_argument("--out", metavar="FILE", type=Path, help="default: report.html in the first run's folder")
    parsed = parser.parse_args(arguments)
    print(f"Report: {report(parsed.runs, parsed.out)}")
    return 0


def report(runs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Writes the report of one or several runs.

    Args:
        runs: their folders; metrics.csv, training.log and config.yaml are read where they are there.
        out: the HTML file, default `report.html` in the first run's folder. An existing one is replaced.

    Returns:
        The file.

    Raises:
        UserError: a folder is no run, the file cannot be written, or the plotting library is not installed.
    """
    if not runs:
        raise UserError("RUN: none given: give a run's folder, such as lightning_logs/version_0")
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"report: {error.name} is not installed: pip install 'student-aware-distillation[report]'"
        ) from error
    from distill.analysis.report.page import render
    from distill.analysis.report.runs import read_runs

    found = read_runs([Path(run) for run in runs])
    target = Path(out) if out is not None else found[0].folder / "report.html"
    try:
        target.write_text(render(found), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out: {target} cannot be written ({error.strerror}): name a file in a folder") from error
    return target
