"""The student of a run that is cut from its teacher: which layers, on which calibration rows, made or read again.

Every process asks for the same student. One of a machine makes it and writes it into the cache, under a lock that the
others wait at; with several machines, whose arithmetic may differ, all take the first one's.
"""

import json
import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from distill.batch import Tokens
from distill.data.rows.table import MicroBatch, PackedRows, collate
from distill.errors import UserError
from distill.models import load
from distill.models.blocks import moe_layers
from distill.models.cut import kept_layers, most_important_layers
from distill.models.layers import decoder_layers
from distill.models.precision import product_dtype
from distill.models.skeleton import skeleton
from distill.models.start.cache import RECORD, cached_student, made_before
from distill.models.start.ffn import is_known, read_block
from distill.models.start.make import Place
from distill.models.start.shape import Shape, StudentFit
from distill.models.start.skeleton import unmade_student
from distill.models.start.walk import Rows
from distill.training.options import WIDTHS, ModelOptions

IMPORTANCE_ROWS = 8


def student_skeleton(
    options: ModelOptions, teacher: PreTrainedConfig, vocabulary: int, dtype: torch.dtype
) -> PreTrainedModel:
    """The student of any options on the meta device, from configurations alone; which layers it has is not looked at.

    Args:
        options: of the run.
        teacher: its configuration.
        vocabulary: ids of the teacher's head.
        dtype: of the weights.
    """
    remote, source = options.trust_remote_code, options.student or options.student_config
    if options.is_cut:
        like = skeleton(teacher, dtype, remote)
        depth = len(decoder_layers(like))
        layers = list(range(depth)) if options.student_layers is None else options.student_layers
        kept = kept_layers(layers, depth, "model.student_layers")
        shape = Shape(kept, options.student_intermediate_size, options.student_hidden_size)
        with torch.device("meta"):
            return nn.Module.to(unmade_student(like, shape), dtype)
    assert source is not None
    vocab_size = None if options.student_config is None else vocabulary
    config = load.load_config(source, vocab_size=vocab_size, trust_remote_code=remote, key="model.student")
    return skeleton(config, dtype, remote)


def start_student(
    teacher: PreTrainedModel, options: ModelOptions, trainer: L.Trainer, data: L.LightningDataModule | None
) -> tuple[PreTrainedModel, dict[str, Any] | None]:
    """The student that options cut from a teacher, in fp32 and train mode, and how it was made.

    Nothing is made where a checkpoint will fill the student (`trainer.students` is blank), or where only what was made
    before is asked for (read).

    Args:
        teacher: in eval mode.
        options: of the run.
        trainer: says where it is made.
        data: gives the calibration rows.

    Returns:
        The student, and what `cached_student` says of it; None where it is a plain cut.

    Raises:
        UserError: layers, widths or a family that cannot be had, or no rows to calibrate on.
    """
    shape = shape_of(teacher, options, data)
    fit = fit_of(options)
    students = getattr(trainer, "students", "made")
    if fit is None or students == "blank":
        return unmade_student(teacher, shape), None
    if data is None:
        if any(getattr(options, key) is not None for key in WIDTHS):
            raise UserError("model.student_intermediate_size: neurons are chosen on training rows; give a datamodule")
        rank_zero_warn("model.student_fit: no datamodule gives training rows, so the student starts as it is cut")
        return unmade_student(teacher, shape), None
    rows = calibration_rows(data, fit.tokens_for(fitted_neurons(teacher, shape)))
    place = place_of(trainer)
    if students == "read" and made_before(teacher, shape, rows, fit, place) is None:
        return unmade_student(teacher, shape), None
    student, record = cached_student(teacher, shape, rows, fit, place)
    if trainer.num_nodes > 1 and not first_rank_makes(options, trainer.strategy):
        _take_the_first_ones(student, trainer.strategy.root_device)
    rank_zero_info(described(shape, record, len(decoder_layers(teacher))))
    return student, record


def first_rank_makes(options: ModelOptions, strategy: Strategy) -> bool:
    """Whether the first rank alone makes the models, see `models.first_rank`.

    Code that comes with weights is not known to the other ranks, and quantised weights cannot be dealt out.
    """
    alone = options.trust_remote_code or options.teacher_quantization is not None
    return isinstance(strategy, ModelParallelStrategy) and not alone


def fit_of(options: ModelOptions) -> StudentFit | None:
    """How the student is fitted: as asked for, or, where neurons are chosen all the same, in closed form alone."""
    if options.student_fit is not None or all(getattr(options, key) is None for key in WIDTHS):
        return options.student_fit
    return StudentFit(steps=0)


def shape_of(teacher: PreTrainedModel, options: ModelOptions, data: L.LightningDataModule | None) -> Shape:
    """What the student keeps of a teacher.

    Raises:
        UserError: layers that the teacher does not have, or no rows to measure their importance on.
    """
    depth, key = len(decoder_layers(teacher)), "model.student_layers"
    layers = options.student_layers
    if options.student_layers_by == "importance" and isinstance(layers, int):
        if data is None:
            raise UserError("model.student_layers_by: importance is measured on training rows; give a datamodule")
        layers = most_important_layers(teacher, layers, some_rows(data, IMPORTANCE_ROWS, spread=False).input_ids)
    kept = list(range(depth)) if layers is None else kept_layers(layers, depth, key)
    return Shape(kept, options.student_intermediate_size, options.student_hidden_size)


def fitted_neurons(teacher: PreTrainedModel, shape: Shape) -> int:
    """Neurons of an FFN that is fitted in closed form; 0 where none or only experts are, each on its own tokens."""
    if shape.intermediate_size is not None or moe_layers(teacher):
        return shape.intermediate_size or 0
    first = decoder_layers(teacher)[0]
    return len(read_block(first).neurons) if is_known(first) else 0


def calibration_rows(data: L.LightningDataModule, tokens: int) -> Rows:
    """So many tokens of training rows, spread evenly over the table, or from the beginning of a stream."""
    length = int(getattr(data, "sequence_length", 1))
    read = some_rows(data, -(-tokens // length))
    return Rows(read.input_ids, read.real_BL & (read.position_ids > 0), read.position_ids if read.packed else None)


def some_rows(data: L.LightningDataModule, count: int, spread: bool = True) -> Tokens:
    """Training rows of a datamodule, as many as asked for or as there are; the first, or spread over the table.

    Raises:
        UserError: it is none of ours.
    """
    rows: PackedRows | None = getattr(data, "train_rows", None)
    if rows is not None:
        count = min(count, len(rows))
        last = len(rows) - 1 if spread else count - 1
        picked = torch.linspace(0, last, count, dtype=torch.float64).round().long()
        return rows.__getitems__(MicroBatch(picked.tolist(), {})).student
    streams: list[Any] = getattr(data, "streams", [])
    if not streams:
        raise UserError(
            "model.student_fit: the student is fitted on rows of a DistillationDataModule; give one, or set it to null"
        )
    share = -(-count // len(streams))
    first = [row for stream in streams for row in stream.first_block()[1][:share]]
    validation: PackedRows = data.validation_rows  # type: ignore[attr-defined]
    return collate(first, validation.sequence_length, validation.pad_id, {}).student


def place_of(trainer: L.Trainer) -> Place:
    """The device of this process, with the products' dtype of a mixed precision."""
    device, precision = trainer.strategy.root_device, str(trainer.precision)
    halves = {"bf16": torch.bfloat16, "16": torch.float16}
    half = halves.get(precision.split("-")[0])
    if half is None or product_dtype(half, device.type) is not half:
        return Place(device)
    return Place(device, half)


def parts_of(shape: Shape, depth: int) -> str:
    """What a student is made of, in words."""
    parts = f"{len(shape.layers)} of {depth} layers" if len(shape.layers) < depth else f"all {depth} layers"
    if shape.intermediate_size is not None:
        parts += f", FFNs of {shape.intermediate_size:,} of the teacher's neurons"
    if shape.hidden_size is not None:
        parts += f", a stream of {shape.hidden_size:,} principal axes"
    return parts


def described(shape: Shape, record: dict[str, Any], depth: int) -> str:
    """What the student was made of, in a line."""
    errors = [layer["after"] for layer in record["layers"]]
    how = "read from the cache, made in" if record["cached"] else "made in"
    return (
        f"Student: {parts_of(shape, depth)}, {how} {record['seconds']:,.0f} s on {record['tokens']:,} tokens; the "
        f"layers leave {min(errors):.3f} to {max(errors):.3f} of their targets unexplained."
    )


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Leaves how the student was made in a run's directory, for the report; one that is there stays."""
    path = folder / RECORD
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=1))
        os.replace(partial, path)


def _take_the_first_ones(student: nn.Module, device: torch.device) -> None:
    """Rank zero's parameters for everybody."""
    with torch.no_grad():
        for parameter in student.parameters():
            shared = parameter.to(device)
            dist.broadcast(shared, 0)
            parameter.copy_(shared)
