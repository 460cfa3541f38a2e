"""Students with another tokenizer than their teacher's: what each way to learn across tokenizers gains over none.

The teacher is the small mixture of experts of quality_teacher.py, 1,024 ids of byte-level BPE. Its students, Llamas of
hidden size 128 and four layers with random weights, read with 2,048 ids of byte-level BPE or 1,022 of Unigram. A seed
gives the weights, the training rows and their order; all arms of a seed have the same. All goes through the program's
own module, data and trainer. Every arm has the same rate, the lowest of a few that costs CE at most 0.02 bits a byte
against its best, on a seed of its own: near the highest that CE stands, differences between arms are lost in noise.
Every finished student is written at once and skipped next time.

These are gaps after 60 steps of four rows of at most 128 tokens of either side, of early training: directions, not
sizes.

    python benchmarks/cross_tokenizer.py                    # both students, every arm, four seeds: 30 minutes
    python benchmarks/cross_tokenizer.py --minutes 9        # stops before a run that would end later
    python benchmarks/cross_tokenizer.py --tables           # only tables and verdicts of what is there
"""

import argparse
import json
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from cross_tokenizer_arms import ARMS, STUDENTS, prepare_students
from measured_runs import load, quiet_trainer, save
from quality_tables import Runs, by_arm, interval, markdown, paired, shown
from quality_teacher import LENGTH, prepare

from distill.commands.quiet import quieten
from distill.data.datamodule import DistillationDataModule
from distill.training.callbacks.curriculum import Curriculum

RESULTS = Path(__file__).parent / "results" / "cross_tokenizer.json"
STEPS, ROWS, WARMUP, HELD_OUT = 60, 4, 6, 32
RATES, SWEEP_SEED = (2e-3, 4e-3), 1000
CALM = 0.02  # bits a byte that the rate may cost CE
LLAMA = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "max_position_embeddings": 256,
}
OURS = ("CE + first token", "CE + look-ahead")
BASELINES = ("CE + aligned only", "CE + exact matches", "CE + ULD", "CE + ALM")


def run(student: str, arm: str, seed: int, rate: float, folder: Path) -> dict[str, float]:
    """Trains one student; bits a byte and KL between classes on held-out text, and CPU seconds."""
    data = DistillationDataModule(
        str(folder / "student.jsonl"),
        validation_split=str(folder / "held_out.jsonl"),
        tokenizer=str(folder / "teacher"),
        sequence_length=LENGTH,
        per_device_batch_size=ROWS,
        max_sequences=ROWS * STEPS,
        max_validation_sequences=HELD_OUT,
        seed=seed,
    )
    L.seed_everything(seed, verbose=False)
    module = ARMS[arm].module(
        str(folder / "teacher"),
        student_config=LLAMA,
        student_tokenizer=str(folder / student),
        learning_rate=rate,
        warmup_steps=WARMUP,
        **ARMS[arm].options,
    )
    on = {"kd": module.options.kd_loss is not None, "lm": module.options.lm_loss}
    weights = {name: 1.0 for name, is_on in on.items() if is_on}
    started = time.process_time()
    with tempfile.TemporaryDirectory() as root:
        trainer = quiet_trainer(STEPS, root, [Curriculum(temperature=1.0, **weights)])
        trainer.fit(module, data)
        found = {name: float(trainer.callback_metrics[f"val/{name}"]) for name in ("bits_per_byte", "kl_div_T1")}
    return {key: round(value, 6) for key, value in (found | {"cpu_s": time.process_time() - started}).items()}


def calm_rate(results: dict[str, Any], student: str) -> float:
    """The lowest that costs CE next to nothing."""
    swept = by_arm(results["runs"], f"{student}, rates")
    bits = {rate: swept[f"CE {rate:g}"][SWEEP_SEED]["bits_per_byte"] for rate in RATES}
    return min(rate for rate in RATES if bits[rate] <= min(bits.values()) + CALM)


def jobs(seeds: int) -> list[tuple[str, str, str, int, float | None]]:
    """Label, name, arm, seed and rate of every run: of each student rates first, then a seed after the other."""
    found: list[tuple[str, str, str, int, float | None]] = []
    for student in STUDENTS:
        found += [(f"{student}, rates", f"CE {rate:g}", "CE", SWEEP_SEED, rate) for rate in RATES]
        found += [(student, arm, arm, seed, None) for seed in range(seeds) for arm in ARMS]
    return found


def measure(seeds: int, minutes: float, path: Path) -> None:
    """Runs what is missing, as long as there is time."""
    folder, started, longest = prepare(), time.monotonic(), 0.0
    prepare_students(folder)
    for label, name, arm, seed, rate in jobs(seeds):
        results = load(path)
        if any((r["teacher"], r["arm"], r["seed"]) == (label, name, seed) for r in results["runs"]):
            continue
        began = time.monotonic()
        if began - started + longest > 60 * minutes:
            print(f"{minutes:g} minutes are over; run it again for the rest")
            return
        student = label.removesuffix(", rates")
        rate = rate or calm_rate(results, student)
        metrics = run(student, arm, seed, rate, folder)
        longest = max(longest, time.monotonic() - began)
        record = {"teacher": label, "arm": name, "seed": seed, "rate": rate, "metrics": metrics}
        print(json.dumps(record), flush=True)
        results["facts"] = json.loads((folder / "facts.json").read_text())
        results["runs"].append(record)
        save(path, results)


def table(runs: Runs) -> list[list[str]]:
    """Rows with a heading: means over seeds with their intervals, and differences to CE paired by seed."""
    rows = [["arm", "seeds", "bits a byte", "difference to CE", "KL between classes", "CPU s"]]
    for arm in ARMS:
        if own := list(runs.get(arm, {}).values()):
            bits, kl = (shown(interval([one[key] for one in own])) for key in ("bits_per_byte", "kl_div_T1"))
            gap = "" if arm == "CE" else shown(paired(runs, arm, "CE", "bits_per_byte"), signed=True)
            rows.append([arm, str(len(own)), bits, gap, kl, f"{sum(one['cpu_s'] for one in own) / len(own):.0f}"])
    return rows


def line(runs: Runs, student: str, arm: str, reference: str) -> tuple[str, bool]:
    """A line for a target: the arm has fewer bits than the reference with its whole interval."""
    pair = paired(runs, arm, reference, "bits_per_byte")
    met = pair is not None and pair[0] + pair[1] < 0
    return f"{student}: {arm} - {reference} {shown(pair, signed=True)} < 0 {'ok' if met else 'short'}", met


def verdicts(results: dict[str, Any]) -> tuple[list[str], bool]:
    """A line for each target, and whether all are met."""
    lines = []
    for student in STUDENTS:
        runs = by_arm(results["runs"], student)
        for arm in OURS:
            lines += [line(runs, student, arm, reference) for reference in ("CE", *BASELINES)]
        lines.append(line(runs, student, "KD alone, look-ahead", "CE"))
        lines.append(line(runs, student, "CE", "CE + shuffled teacher"))
    return [text for text, _ in lines], all(met for _, met in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    quieten()
    for logger in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    torch.set_num_threads(1)
    if not arguments.tables:
        measure(arguments.seeds, arguments.minutes, arguments.results)
    results = load(arguments.results)
    parts = [markdown(f"A student with {name}", table(by_arm(results["runs"], name))) for name in STUDENTS]
    lines, met = verdicts(results)
    parts += ["## Targets", "", *(f"- {text}" for text in lines)]
    text = "# Across tokenizers\n\nWritten by benchmarks/cross_tokenizer.py.\n\n" + "\n".join(parts) + "\n"
    arguments.results.with_suffix(".md").write_text(text)
    print(text)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
