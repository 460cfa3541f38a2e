"""`distill check`: what a run would read, compute and need, shown and judged before it is started.

It loads the models once and runs a few rows through them, at most one of them with a gradient; the rest is read from
configurations. Without weights everything that does not need them is still shown, so that a run for other machines can
be planned on this one. The time of a step is that of one row here, times the rows.
"""

import math
import time
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from transformers import PreTrainedModel

from distill import sources
from distill.batch import Batch
from distill.curriculum import peak
from distill.data.datamodule import DistillationDataModule
from distill.data.order.loader import ResumableLoader
from distill.errors import UserError
from distill.losses.engine.metrics import DistillationMetrics
from distill.preflight.cached import cache_findings, traced
from distill.preflight.checks import (
    alignment_rows,
    batch_findings,
    gpu_findings,
    held_out_findings,
    precision_findings,
    schedule_findings,
    teacher_findings,
)
from distill.preflight.choices import choice_findings
from distill.preflight.memory import MemoryEstimate, estimate_memory, forward_flops
from distill.preflight.plan import Plan, device_gib, head_size, matmul_tflops, shape_of, skeletons
from distill.preflight.quick import counting_nll, of_its_own, single_rows
from distill.preflight.starting import show_start
from distill.preflight.tables import (
    GIB,
    alignment_table,
    components_table,
    curriculum_table,
    memory_table,
    show,
    titled,
)
from distill.preflight.vocabularies import own_ids, show_pairs, show_vocabularies
from distill.teachers.cache_files import is_cache
from distill.training.callbacks.curriculum import Curriculum
from distill.training.callbacks.refused import check_callbacks
from distill.training.horizon import check_validation_interval, horizon_of
from distill.training.lightning_internals import callbacks_of, make_known
from distill.training.module import DistillationModule
from distill.training.muon import flops as update_flops
from distill.training.objective import Losses
from distill.training.optim import matrices_of

VALIDATED_ROWS = 8  # of an accelerator; a CPU's only row is the one that is timed
FAST_S = 0.5  # below it, what a device does once and for all was a good part of the time
ASSUMED_TFLOPS = 100.0  # that an accelerator reaches which is not here
MARGIN = 1.1  # what allocators and libraries take beyond the estimate


@dataclass
class Check:
    """The parts of a run under scrutiny, and what was found suspicious about them."""

    trainer: L.Trainer
    module: DistillationModule
    datamodule: DistillationDataModule
    plan: Plan
    console: Console
    findings: list[str] = field(default_factory=list)
    raw: dict[str, float] = field(default_factory=dict)

    @property
    def teacher(self) -> PreTrainedModel | None:
        """The loaded teacher's model, None where there is none here."""
        return self.module.teacher.model if self.module.teacher is not None else None

    @property
    def curriculum(self) -> Curriculum:
        """The run's curriculum."""
        found = callbacks_of(self.trainer, Curriculum)
        return found[0] if found else Curriculum()


def check(trainer: L.Trainer, module: DistillationModule, datamodule: DistillationDataModule, plan: Plan) -> list[str]:
    """Shows what a run would do on stdout, and judges it.

    Args:
        trainer: on one device.
        module: its models need not be built.
        datamodule: not set up.
        plan: the devices it is meant for.

    Returns:
        Sentences about what is suspicious; empty where nothing is.

    Raises:
        UserError: what `fit` would refuse too.
    """
    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    this = Check(trainer, module, datamodule, plan, console)
    if plan.weights and (missing := _without_weights(module.options.teacher)) is not None:
        console.print(f"{missing} holds no weights: shown is what a configuration alone can tell.")
        plan.weights = False
    horizon = _attach(this)
    precision, device = str(trainer.precision), "cuda" if plan.accelerated else "cpu"
    this.findings += precision_findings(precision, device)
    teacher, student = skeletons(module.options, precision, device, own_ids(datamodule))
    this.findings += gpu_findings(module.options, precision, device, teacher)
    this.findings += choice_findings(module.options, this.curriculum.schedules, student)
    this.findings += show_vocabularies(console, module, datamodule, (teacher.config, student.config))
    rows = getattr(datamodule, "validation_rows", None)
    seconds = None
    if rows is not None:
        _example(this, min(head_size(teacher), head_size(student)) if rows.pairing is None else head_size(student))
        if rows.pairing is not None:
            this.findings += show_pairs(console, module, datamodule)
        if plan.weights:
            seconds = _measure(this)
    show(console, curriculum_table(this.curriculum, module.components, horizon))
    show(console, components_table(module, this.curriculum, this.raw))
    this.findings += cache_findings(console, module, datamodule)
    _memory(this, teacher, student)
    run_s = _time(this, teacher, student, seconds, horizon)
    if this.teacher is not None and rows is not None:
        show_start(console, module, trainer, datamodule, this.teacher, run_s)
    console.print()
    for finding in this.findings:
        console.print(f"Suspicious: {finding}", soft_wrap=True, markup=False)
    if not this.findings:
        console.print("Nothing suspicious.")
    return this.findings


def _without_weights(source: str) -> str | None:
    """The folder of a source that holds a configuration and no weights."""
    path = Path(sources.resolve(source, "model.teacher"))
    if not path.is_dir() or any(any(path.glob(pattern)) for pattern in ("*.safetensors", "*.bin")):
        return None
    return str(path)


def _attach(this: Check) -> int:
    """Makes trainer, module and data known to each other as fit does, and loads them; returns the horizon."""
    trainer, module, datamodule = this.trainer, this.module, this.datamodule
    make_known(trainer, module, datamodule)
    trainer.state.fn, trainer.training = TrainerFn.FITTING, True
    check_callbacks(trainer.callbacks)  # type: ignore[attr-defined]
    try:
        datamodule.prepare_data()
        datamodule.setup("fit")
    except UserError as error:
        if this.plan.weights:
            raise
        this.console.print(f"Without data: {error}", soft_wrap=True, markup=False)
        return max(1, trainer.max_steps)
    if this.plan.weights:
        trainer.students = "read"  # type: ignore[attr-defined]  # made ones; the others stay as they are cut
        module.configure_model()
        assert module.teacher is not None
        module.teacher.to(trainer.strategy.root_device)
    module.to(trainer.strategy.root_device)
    this.curriculum.setup(trainer, module, "fit")
    if trainer.max_epochs is None:  # Lightning's own default, which it sets when fit begins
        trainer.fit_loop.max_epochs = 1000 if trainer.max_steps == -1 else -1
    horizon = _horizon(this)
    if this.plan.weights:
        this.curriculum.on_fit_start(trainer, module)
    this.findings += schedule_findings(module.options.warmup_steps, horizon, module.options.learning_rate)
    if trainer.limit_val_batches:
        this.findings += held_out_findings(datamodule)
        if datamodule.train_rows is not None and trainer.check_val_every_n_epoch is not None:
            _validates(this)
    return horizon


def _epoch_batches(this: Check) -> int:
    """Micro-batches of an epoch on each of the planned devices."""
    data, limit = this.datamodule, this.trainer.limit_train_batches
    loader = data.train_dataloader()
    assert isinstance(loader, ResumableLoader)
    batches = math.ceil(loader.steps.rows / (data.per_device_batch_size * this.plan.devices))
    return min(limit, batches) if isinstance(limit, int) else int(batches * limit)


def _horizon(this: Check) -> int:
    """Optimizer steps on the planned devices; the trainer here has one."""
    trainer, here = this.trainer, horizon_of(this.trainer)
    if this.plan.devices == 1 or this.datamodule.train_rows is None or trainer.max_epochs in (None, -1):
        return here
    steps = trainer.max_epochs * math.ceil(_epoch_batches(this) / trainer.accumulate_grad_batches)
    return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)


def _validates(this: Check) -> None:
    """Refuses a run on the planned devices that Lightning would refuse: one that never validates within an epoch."""
    interval = getattr(this.trainer, "val_check_interval", None)  # not there where it is by the clock
    if interval is not None:
        check_validation_interval(interval, _epoch_batches(this))


def _example(this: Check, vocab_size: int) -> None:
    assert this.datamodule.validation_rows is not None
    batch = next(single_rows(this.datamodule.validation_rows))
    this.findings += batch_findings(batch, vocab_size)
    show(this.console, alignment_table(alignment_rows(batch, this.datamodule.tokenizer)))


def _measure(this: Check) -> float:
    """What the models make of a few validation rows; returns seconds of forward and backward for one row."""
    module, metrics, teacher = this.module, DistillationMetrics().to(this.module.device), this.teacher
    assert teacher is not None
    assert this.datamodule.validation_rows is not None
    rows = (move_data_to_device(row, module.device) for row in single_rows(this.datamodule.validation_rows))
    batches = [next(rows)]
    weights = {key: peak(schedule) for key, schedule in this.curriculum.weights.items()}
    module.curriculum = replace(this.curriculum.state_at(1, 1), weights=weights)  # with all that the run will have
    with this.trainer.precision_plugin.forward_context():
        seconds, result = _timed_row(module, batches[0])
        validated = [result]
        fast = module.device.type != "cpu" or seconds < FAST_S
        if fast or module.options.torch_compile:  # what is done once and for all was in that time too
            seconds, _ = _timed_row(module, batches[0], metrics=False)
        if module.device.type != "cpu":
            batches += islice(rows, VALIDATED_ROWS - 1)
        with torch.no_grad():
            validated += [module.losses(row, share=1.0, metrics=True, components=[]) for row in batches[1:]]
    for losses, batch in zip(validated, batches, strict=True):
        assert losses.token_stats is not None
        metrics.update(losses.token_stats, batch.bytes)
    this.raw = {name: float(value) for name, value in result.breakdown.raw.items()}
    for name, value in this.raw.items():
        if not math.isfinite(value):
            this.findings.append(f"{name}: {value} on the first validation row")
    figures = {name: float(value) for name, value in metrics.compute().items()}
    unigram = counting_nll(this.datamodule, batches, head_size(teacher))
    if batches[0].pairs is not None and module.teacher is not None:
        figures |= of_its_own(module.teacher, batches)
    if "teacher_nll" in figures:
        this.findings += teacher_findings(figures["teacher_nll"], unigram, head_size(teacher))
    title = f"{len(batches)} validation row{'s' * (len(batches) > 1)} before training"
    table = titled(title, "", "teacher", "student", "counting tokens")
    for name, key, counting in (("perplexity", "perplexity", math.exp(unigram)), ("nats per token", "nll", unigram)):
        values = [figures.get(f"{side}_{key}", math.nan) for side in ("teacher", "student")]
        table.add_row(name, *(f"{value:,.2f}" for value in (*values, counting)))
    show(this.console, table)
    return seconds


def _timed_row(module: DistillationModule, batch: Batch, metrics: bool = True) -> tuple[float, Losses]:
    """Seconds of forward and backward of a row with all components, and what it yielded."""
    start = time.perf_counter()
    result = module.losses(batch, share=1.0, metrics=metrics)
    result.total.backward()
    if module.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    module.zero_grad(set_to_none=True)
    return seconds, result


def _memory(this: Check, teacher: Any, student: Any) -> None:
    """Estimates for the strategies that the devices allow, against what a device has."""
    plan, module = this.plan, this.module
    shape = shape_of(module.options, this.datamodule, str(this.trainer.precision), not plan.accelerated)
    extra = sum(p.numel() for name, p in module.named_parameters() if not name.startswith("student."))

    def estimate(devices: int, sharded: bool) -> MemoryEstimate:
        return estimate_memory(
            student, live, parts, extra_parameters=extra, one_moment=matrices, devices=devices, sharded=sharded,
            accumulates=this.trainer.accumulate_grad_batches > 1,
        )  # fmt: skip

    matrices = matrices_of(student) if module.options.optimizer == "muon" else []
    parts, live = traced(module.options, student, teacher, shape)
    ways = {"1 device": (1, False)}
    if plan.devices > 1:
        ways = {f"ddp x {plan.devices}": (plan.devices, False), f"fsdp2 x {plan.devices}": (plan.devices, True)}
    estimates = {name: estimate(*way) for name, way in ways.items()}
    show(this.console, memory_table(estimates, shape.rows, shape.length))
    chosen = list(estimates.values())[-1 if plan.sharded else 0]
    here = device_gib(module.device) if not plan.accelerated or module.device.type == "cuda" else None
    available = plan.device_memory_gib or here
    if available is not None and chosen.step * MARGIN > available * GIB:
        this.findings.append(
            f"memory: {chosen.step / GIB:,.1f} GiB of a device's {available:,.1f}: shorten "
            "data.per_device_batch_size, set model.gradient_checkpointing, or shard with trainer.strategy fsdp2"
        )


def _time(this: Check, teacher: Any, student: Any, row_s: float | None, horizon: int) -> float:
    """What a step costs, measured on a row or by operations at the rate of a device; returns all steps' seconds."""
    data, module, plan = this.datamodule, this.module, this.plan
    rows = data.per_device_batch_size * this.trainer.accumulate_grad_batches
    tokens = rows * data.sequence_length
    passes = 4 if module.options.gradient_checkpointing else 3  # forward, and twice that backward
    cached = is_cache(module.options.teacher)
    flops = 0.0 if cached else forward_flops(teacher, tokens, data.sequence_length)
    flops += passes * forward_flops(student, tokens, data.sequence_length)
    updates = [update_flops(p.shape) for p in matrices_of(student)] if module.options.optimizer == "muon" else []
    flops += sum(updates)
    text = f"Time: {tokens:,} tokens and {flops / 1e12:,.2f} x 10^12 operations a step and device, "
    if updates:
        text += f"{sum(updates) / 1e12:,.2f} of them Muon's, "
    elsewhere = plan.accelerated and module.device.type == "cpu"
    if row_s is not None and plan.tflops is None and not elsewhere:
        step_s = row_s * rows
        text += f"about {step_s:,.1f} s (one row took {row_s:.2f} s forward and backward)"
    else:
        tflops = plan.tflops or (ASSUMED_TFLOPS if elsewhere else matmul_tflops(module.device))
        step_s = flops / (tflops * 1e12)
        text += f"{step_s:,.2f} s at {tflops:,.2f} x 10^12 a second"
        if plan.tflops is None:
            text += ", which is assumed" if elsewhere else ", which is this machine's matrix product"
            text += " (--tflops says what yours reaches)"
    total_s = step_s * horizon
    unit, size = next((pair for pair in (("h", 3600), ("min", 60)) if total_s >= 2 * pair[1]), ("s", 1))
    shown = f"{total_s / size:,.1f} {unit}"
    this.console.print(f"\n{text}; {horizon:,} steps: {shown} without validation.", soft_wrap=True, markup=False)
    train = getattr(data, "train_rows", None)
    if train is not None:
        epochs = horizon * rows * plan.devices / len(train)
        this.console.print(
            f"Data: {len(train):,} training rows, {train.units_R['tokens'].sum() / len(train):,.0f} targets in a row "
            f"of {data.sequence_length}; the run reads them {epochs:,.2f} times.",
            soft_wrap=True,
        )
    return total_s
