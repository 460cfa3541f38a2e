"""What starting the command costs: the quick answers in seconds, the slow ones as ratios to Lightning's own import.

Every figure is CPU seconds (user and system) of a fresh process on one thread, since waiting for other processes says
nothing about the program. Commands take turns, round after round, and a ratio is the median of its rounds; the first
round, which fills the file cache, is thrown away.

    python benchmarks/startup.py
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROUNDS = 3
DISTILL = ("-m", "distill.cli")
BARE = "import lightning.pytorch.cli"
BAD = "model: {teacher: x, student_layers: 2}\ndata: {dataset: x}\ncurriculum: {kdd: 1.0}\n"  # a misspelt key


def cpu_s(arguments: tuple[str, ...], expected: int, folder: str) -> float:
    """CPU seconds of one Python process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == expected, said.decode()
    return usage.ru_utime + usage.ru_stime


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "bad.yaml").write_text(BAD)
        commands = {
            BARE: (("-c", BARE), 0),
            "distill --version": ((*DISTILL, "--version"), 0),
            "distill --help": ((*DISTILL, "--help"), 0),
            "distill export --help": ((*DISTILL, "export", "--help"), 0),
            "distill fit --help": ((*DISTILL, "fit", "--help"), 0),
            "distill fit, configuration error": ((*DISTILL, "fit", "--config", "bad.yaml"), 2),
        }
        found: dict[str, list[float]] = {name: [] for name in commands}
        for turn in range(ROUNDS + 1):
            for name, (arguments, expected) in commands.items():
                seconds = cpu_s(arguments, expected, folder)
                if turn > 0:
                    found[name].append(seconds)
    table = Table("CPU seconds", "median", "least", "most", "ratio to the import")
    ratios = {
        name: statistics.median(one / bare for one, bare in zip(values, found[BARE], strict=True))
        for name, values in found.items()
    }
    for name, values in found.items():
        table.add_row(name, *(f"{f(values):.3f}" for f in (statistics.median, min, max)), f"{ratios[name]:.2f}")
    Console(width=100).print(table)
    results = (
        ("version_s", statistics.median(found["distill --version"]), 0.3),
        ("help_s", statistics.median(found["distill --help"]), 0.3),
        ("command_help_s", statistics.median(found["distill export --help"]), 0.3),
        ("fit_help_over_import", ratios["distill fit --help"], 1.2),
        ("configuration_error_over_import", ratios["distill fit, configuration error"], 1.2),
    )
    short = False
    for name, figure, target in results:
        short |= figure > target
        print(f"{name} {figure:.3f} {target} {'ok' if figure <= target else 'short'}")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
