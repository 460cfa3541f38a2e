"""What teaches a student most? Equal students of the small MoE teacher, arm by arm, paired by seed.

Three students learn from the small teacher of quality_teacher.py: one with random weights at another width (640 steps
of 512 tokens), a dense one made of its experts and one cut to half of its layers, both fitted as the program does it
(160 steps). A fourth is ten of SmolLM2-135M's thirty layers, fitted, for 32 steps of one row of 256 tokens of Python's
documentation. They learn by AdamW or Muon through the program's own module, data and trainer; the arms are in
quality_arms.py. A seed draws training rows, their order, held-out rows and random weights, the same for every arm. The
learning rate is the best of a sweep of KD alone, on a seed of its own, for each student and optimizer. Seconds are CPU
seconds of the steps alone, on one thread. Every finished run is written at once and skipped the next time. A teacher of
two million weights shows which way a choice pulls, not how far it would pull a large model.

    python benchmarks/quality.py                                  # the main arms of each student, four seeds
    python benchmarks/quality.py --minutes 9                      # no run is begun after that; call it again
    python benchmarks/quality.py --student cut --only "KD, skewed" --optimizer adamw
    python benchmarks/quality.py --tables                         # only tables and verdicts of what is there
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from measured_runs import load, quiet_trainer, save
from quality_arms import ARMS, MAIN, STUDENTS, Arm, keys_of
from quality_tables import METRICS, grouped, markdown, rows_of, verdicts
from quality_teacher import LENGTH, prepare

from distill.batch import Tokens
from distill.commands.quiet import quieten
from distill.data.datamodule import DistillationDataModule
from distill.models.trace import Needs, Trace
from distill.training.callbacks.audit import LossAudit
from distill.training.callbacks.curriculum import Curriculum
from distill.training.module import DistillationModule

RESULTS = Path(__file__).parent / "results" / "quality.json"
Kept = dict[tuple[bytes, frozenset[int]], tuple[Trace, float]]
SWEEP_SEED, BATCH, HELD_OUT, WARMUP = 1000, 4, 96, 10


@dataclass(frozen=True)
class Job:
    """One run, as it stands in the results."""

    student: str
    optimizer: str
    arm: str
    seed: int


class FalseTeacher(Callback):
    """Bends what the teacher says in training, and leaves validation the true one."""

    def __init__(self, bend: Any) -> None:
        self.bend = bend

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.true = pl_module.teacher.trace
        pl_module.teacher.trace = lambda *args: self.bend(self.true(*args))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        pl_module.teacher.trace = self.true


class Clock(Callback):
    """CPU seconds from the first step to the validation behind the last.

    The arms of a seed read the same rows, of which the teacher says the same: what it has said is kept, and said again
    at the seconds that it took at first.

    Args:
        kept: tokens and layers -> trace and seconds; filled here.
    """

    seconds = 0.0

    def __init__(self, kept: Kept) -> None:
        self.kept, self.spared = kept, 0.0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        true = pl_module.teacher.trace

        def trace(tokens: Tokens, needs: Needs = Needs()) -> Trace:  # noqa: B008  (frozen)
            if needs.attention or needs.recorders:
                return true(tokens, needs)
            key = tokens.input_ids.numpy().tobytes(), needs.hidden
            if key in self.kept:
                self.spared += self.kept[key][1]
            else:
                started = time.process_time()
                self.kept[key] = true(tokens, needs), time.process_time() - started
            return self.kept[key][0]

        pl_module.teacher.trace = trace

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.started, self.spared = time.process_time(), 0.0

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.seconds = time.process_time() - self.started + self.spared


def run(job: Job, arm: Arm, steps: int, rate: float, folder: Path, kept: Kept) -> dict[str, float]:
    """Trains one student: metrics of its last validation, steps, and the CPU seconds of the steps."""
    L.seed_everything(job.seed, verbose=False)
    student, clock = STUDENTS[job.student], Clock({} if "teacher_top_k" in arm.model else kept)
    module = DistillationModule(
        student.teacher or str(folder / "teacher"),
        **student.model,
        **keys_of(arm),
        optimizer=job.optimizer,
        learning_rate=rate,
        warmup_steps=WARMUP,
    )
    of_the_small_teacher: dict[str, Any] = {
        "dataset": str(folder / "student.jsonl"),
        "validation_split": str(folder / "held_out.jsonl"),
        "sequence_length": LENGTH,
        "per_device_batch_size": BATCH,
        "max_sequences": BATCH * student.steps,
        "max_validation_sequences": HELD_OUT,
    }
    data = DistillationDataModule(**(student.data or of_the_small_teacher), seed=job.seed)
    bending = [FalseTeacher(arm.bend)] if arm.bend else []
    with tempfile.TemporaryDirectory() as root:
        trainer = quiet_trainer(steps, root, [Curriculum(**arm.curriculum), LossAudit(), clock, *bending])
        trainer.fit(module, data)
    found = {name: float(trainer.callback_metrics[f"val/{key}"]) for key, name in METRICS.items()}
    return {name: round(value, 6) for name, value in (found | {"steps": steps, "seconds": clock.seconds}).items()}


def best_rate(results: dict[str, Any], student: str, optimizer: str) -> float:
    """The rate of the lowest KL in the sweep."""
    swept = grouped(results["runs"])[student, optimizer]
    rates = STUDENTS[student].rates[optimizer]
    return min(rates, key=lambda rate: swept[f"rate {rate:g}"][SWEEP_SEED]["KL"])


def equal_steps(results: dict[str, Any], job: Job) -> int:
    """Steps that take the seconds which KD alone takes with AdamW, by the means over seeds."""
    runs, steps = grouped(results["runs"]), STUDENTS[job.student].steps
    adamw, own = (
        sum(one["seconds"] for one in found.values()) / len(found)
        for found in (runs[job.student, optimizer]["KD"] for optimizer in ("adamw", job.optimizer))
    )
    return round(steps * adamw / own)


def jobs(students: list[str], optimizers: list[str], only: list[str] | None, seeds: int) -> Iterator[tuple[Job, float]]:
    """Runs in order, with the learning rate where it is swept, else 0."""
    for student in students:
        for optimizer in optimizers:
            for rate in STUDENTS[student].rates[optimizer]:
                yield Job(student, optimizer, f"rate {rate:g}", SWEEP_SEED), rate
        names = {optimizer: only or MAIN[student][optimizer] for optimizer in optimizers}
        for seed in range(seeds):
            for place in range(max(map(len, names.values()))):
                for optimizer in optimizers:
                    for arm in names[optimizer][place : place + 1]:
                        yield Job(student, optimizer, arm, seed), 0.0


def measure(wanted: Iterator[tuple[Job, float]], folder: Path, path: Path, facts: dict[str, Any], until: float) -> None:
    """Runs what is missing, one after the other, and begins none after `until`."""
    seed, kept = SWEEP_SEED, Kept()
    for job, swept in wanted:
        results = load(path)
        rate = swept or best_rate(results, job.student, job.optimizer)
        if any(_of(record) == job and record["rate"] == rate for record in results["runs"]):
            continue
        if time.monotonic() > until:
            print("out of time; call it again for the rest", flush=True)
            return
        arm = ARMS["KD"] if swept else ARMS[job.arm]
        steps = equal_steps(results, job) if arm.equal_s else STUDENTS[job.student].steps
        seed, kept = job.seed, kept if job.seed == seed else {}
        record = vars(job) | {"rate": rate, "metrics": run(job, arm, steps, rate, folder, kept)}
        print(json.dumps(record), flush=True)
        results = load(path) | {"facts": facts}  # another process may have written
        others = [other for other in results["runs"] if _of(other) != job]  # at a rate that was the best before
        save(path, results | {"runs": [*others, record]})


def _of(record: dict[str, Any]) -> Job:
    return Job(*(record[key] for key in ("student", "optimizer", "arm", "seed")))


def report(results: dict[str, Any]) -> tuple[str, bool]:
    """Tables, targets and effects in markdown, and whether all targets are met."""
    runs = grouped(results["runs"])
    parts = [f"# Quality\n\nWritten by benchmarks/quality.py. Teacher: {results['facts']}.\n"]
    for student in STUDENTS:
        for optimizer in ("adamw", "muon"):
            if found := runs.get((student, optimizer)):
                parts.append(markdown(f"{student}, {optimizer}", rows_of(found, list(ARMS))))
    lines, met = verdicts(runs, {name: student.most for name, student in STUDENTS.items()}, MAIN)
    parts.append("## Targets and effects\n\n" + "\n".join(f"- {line}" for line in lines) + "\n")
    return "\n".join(parts), met


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", nargs="+", choices=list(STUDENTS), default=list(STUDENTS))
    parser.add_argument("--optimizer", nargs="+", choices=["adamw", "muon"], default=["adamw", "muon"])
    parser.add_argument("--only", nargs="+", metavar="ARM", choices=list(ARMS), help=f"{'; '.join(ARMS)}")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no run is begun after so many")
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    quieten()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    torch.set_num_threads(1)
    results = load(arguments.results)
    if not arguments.tables:
        folder = prepare()
        facts = json.loads((folder / "facts.json").read_text()) | {"tokens_per_step": BATCH * LENGTH}
        facts |= {"held_out": HELD_OUT}
        if results["facts"] and results["facts"] != facts:
            print(f"{arguments.results} has runs of another teacher or size; move it away first", file=sys.stderr)
            return 2
        wanted = jobs(arguments.student, arguments.optimizer, arguments.only, arguments.seeds)
        until = time.monotonic() + 60 * arguments.minutes
        measure(wanted, folder, arguments.results, facts, until)
        results = load(arguments.results)
    text, met = report(results)
    arguments.results.with_suffix(".md").write_text(text)
    print(text)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
