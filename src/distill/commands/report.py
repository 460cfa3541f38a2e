"""`distill report`: what happened in a run, or in several, as one HTML file that opens without network.

It reads what the run wrote and needs no model, no trainer and no torch. It can show only what was logged; where
something was not, a sentence says so.
"""

from collections.abc import Sequence
from pathlib import Path

from distill.commands.arguments import Parser
from distill.errors import UserError


def main(arguments: list[str]) -> int:
    """Runs `distill report RUN [RUN ...] [--out FILE] [--rank_by METRIC]`."""
    parser = Parser("distill report", description="Writes one HTML file about runs: it opens offline, light and dark.")
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run's folder, lightning_logs/version_N")
    parser.add_argument("--out", metavar="FILE", type=Path, help="default: report.html in the first run's folder")
    parser.add_argument(
        "--rank_by",
        metavar="METRIC",
        help="what several runs are ranked by, such as val/wiki/kl_div_T1 or tasks/arc_easy/acc; default: what their "
        "checkpoints were chosen by",
    )
    parsed = parser.parse_args(arguments)
    path, ranked = _write(parsed.runs, parsed.out, parsed.rank_by)
    for line in ranked:
        print(line)
    print(f"Report: {path}")
    return 0


def report(runs: Sequence[str | Path], out: str | Path | None = None, rank_by: str | None = None) -> Path:
    """Writes the report of one or several runs.

    Args:
        runs: their folders; metrics.csv, training.log and config.yaml are read where they are there.
        out: the HTML file, default `report.html` in the first run's folder. An existing one is replaced.
        rank_by: the metric by which several runs are ranked, default what their checkpoints were chosen by.

    Returns:
        The file.

    Raises:
        UserError: a folder is no run, no run has logged `rank_by`, the file cannot be written, or the plotting library
            is not installed.
    """
    return _write(runs, out, rank_by)[0]


def _write(runs: Sequence[str | Path], out: str | Path | None, rank_by: str | None) -> tuple[Path, list[str]]:
    """Writes the page; its path, and the runs' ranking in words."""
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
    from distill.analysis.report.ranking import ranking, told
    from distill.analysis.report.runs import read_runs
    from distill.analysis.report.tables import caution, differences

    found = read_runs([Path(run) for run in runs])
    doubt = caution(differences(found))
    ranked = ranking(found, rank_by, comparable=not doubt)
    target = Path(out) if out is not None else found[0].folder / "report.html"
    try:
        target.write_text(render(found, ranked), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out: {target} cannot be written ({error.strerror}): name a file in a folder") from error
    lines = told(ranked) if ranked is not None else []
    return target, [*lines, doubt] if lines and doubt else lines
