"""What `distill check` says of a student that is cut: its parts, its errors, and what making it takes."""

from collections.abc import Sequence
from typing import Any

import lightning as L
from rich.console import Console
from transformers import PreTrainedModel

from distill.models.layers import decoder_layers
from distill.models.start.estimate import estimate, few_and_more
from distill.models.start.shape import Shape
from distill.preflight.tables import show, titled
from distill.training.module import DistillationModule
from distill.training.start import calibration_rows, fit_of, fitted_neurons, parts_of, place_of, shape_of


def show_start(
    console: Console,
    module: DistillationModule,
    trainer: L.Trainer,
    data: L.LightningDataModule,
    teacher: PreTrainedModel,
    run_s: float,
) -> None:
    """Shows what the student of a run will be made of, each layer's error, and the seconds that its making takes.

    Args:
        console: shown on.
        module: with its models loaded.
        trainer: whose device it is made on.
        data: with its rows.
        teacher: its model.
        run_s: of the steps, to compare with.
    """
    options, fit = module.options, fit_of(module.options)
    if not options.is_cut or fit is None or options.teacher_quantization is not None:
        return
    shape = shape_of(teacher, options, data)
    parts = parts_of(shape, len(decoder_layers(teacher)))
    if module.made is not None:
        console.print(
            f"\nStudent: {parts}, made before in {module.made['seconds']:,.0f} s on {module.made['tokens']:,} tokens; "
            "a run reads it from the cache.",
            soft_wrap=True,
        )
        _table(console, shape, [layer["after"] for layer in module.made["layers"]], "Error of each layer")
        return
    rows = calibration_rows(data, fit.tokens_for(fitted_neurons(teacher, shape)))
    seconds, fits = estimate(teacher, shape, rows, fit, place_of(trainer))
    steps = f" and {fit.steps} steps a layer" if fit.steps else ""
    console.print(
        f"\nStudent: {parts}; made before the first step from {rows.ids_RL.numel():,} tokens{steps} in about "
        f"{seconds:,.0f} s, {seconds / max(1e-9, seconds + run_s):.0%} of the run, once.",
        soft_wrap=True,
    )
    tokens = few_and_more(rows)[1] * rows.ids_RL.shape[1]
    _table(console, shape, [each.after for each in fits], f"Error of each layer, closed form on {tokens:,} tokens")


def _table(console: Console, shape: Shape, errors: Sequence[Any], title: str) -> None:
    """The share of its target that each layer leaves unexplained."""
    table = titled(f"{title} (1 = no better than a constant)", "layer of the student", "of the teacher", "unexplained")
    for layer, (index, error) in enumerate(zip(shape.layers, errors, strict=True)):
        table.add_row(str(layer), str(index), f"{error:.3f}")
    show(console, table)
