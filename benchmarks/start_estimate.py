"""How well `distill check` foretells the seconds that the making of a student takes: within 25%.

Three students: dense and narrower ones of the small mixture of experts of quality_teacher.py, and SmolLM2-135M cut and
fitted on the quickstart's tokens in as many steps. Both figures are CPU seconds on one thread, since other processes
take part of the wall's.

    python benchmarks/start_estimate.py                  # all three, in about three minutes
    python benchmarks/start_estimate.py --only dense     # one
"""

import argparse
import os
import sys
import time
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from quality_teacher import prepare
from start import GGUF, data_for
from start_arms import NARROW, NARROW_WIDTH, SMOL_KEPT, WIDTH

from distill.commands.quiet import quieten
from distill.models.load import load_model
from distill.models.start.estimate import estimate
from distill.models.start.make import CPU, make_student
from distill.models.start.shape import Shape, StudentFit
from distill.training.start import calibration_rows

ALL = list(range(4))
STUDENTS = {
    "dense": ("moe", Shape(ALL, WIDTH), 8_192, StudentFit()),
    "narrow": ("moe", Shape(ALL, NARROW_WIDTH, NARROW), 8_192, StudentFit()),
    "cut": ("smol", Shape(SMOL_KEPT), 16_384, StudentFit(steps=30)),
}
MOST = 0.25


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(STUDENTS), nargs="+", default=list(STUDENTS))
    chosen = parser.parse_args().only
    quieten()
    torch.set_num_threads(1)
    met = True
    for name in chosen:
        which, shape, tokens, fit = STUDENTS[name]
        folder = prepare() if which == "moe" else Path()
        data = data_for(which, 0, folder)
        data.prepare_data()
        data.setup("fit")
        teacher = load_model(GGUF if which == "smol" else str(folder / "teacher")).requires_grad_(False)
        rows = calibration_rows(data, tokens)
        started = time.process_time()
        with mock.patch("time.perf_counter", time.process_time):
            said_s, _ = estimate(teacher, shape, rows, fit, CPU)
        estimate_s, started = time.process_time() - started, time.process_time()
        make_student(teacher, shape, rows, fit)
        took_s = time.process_time() - started
        ok = abs(said_s / took_s - 1) <= MOST
        met &= ok
        print(
            f"{name}: said {said_s:.1f} s in {estimate_s:.1f} s, took {took_s:.1f} s, ratio {said_s / took_s:.2f} "
            f"{'ok' if ok else 'short'}",
            flush=True,
        )
    print(f"within {MOST:.0%}: {'ok' if met else 'short'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
