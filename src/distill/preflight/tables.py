"""The tables of `distill check`: figures in, rich tables out, nothing computed that is not shown.

A curriculum is drawn with twenty blocks of nine heights, which any terminal shows.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from distill.curriculum import WEIGHT_KEY, Schedule, value_at
from distill.preflight.checks import SPECIAL, Vocabulary, knots_of, sparkline
from distill.preflight.memory import MemoryEstimate
from distill.training.callbacks.curriculum import Curriculum
from distill.training.module import DistillationModule

GIB, MIB = 2**30, 2**20
READS = {
    "kd_loss": "last hidden states of both models",
    "lm_loss": "labels",
}
MEMORY = (
    ("student and projections", "weights"),
    ("their gradients", "gradients"),
    ("optimizer's moments", "optimizer"),
    ("gradient buckets", "buckets"),
    ("teacher", "teacher"),
    ("gathered layers and heads", "gathered"),
    ("activations for backward", "activations"),
    ("loss engine", "engine"),
    ("process", "process"),
)


def titled(title: str, *headings: str) -> Table:
    """A table whose first column is text and whose others are figures."""
    table = Table(title=title)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left")
    return table


def show(console: Console, table: Table) -> None:
    """Prints a table under its title, which may be wider."""
    title, table.title = table.title, None
    console.print(f"\n[bold]{title}[/bold]", soft_wrap=True)
    console.print(table)


def vocabulary_table(sides: Sequence[Vocabulary], tokenizer: Any) -> Table:
    """Ids, padding and special ids of tokenizer and models."""
    table = titled("Vocabularies", "", "ids", "padding", "bos", "eos", "pad")
    for side in sides:
        of_model = tokenizer is not None and side.name != "tokenizer"
        padding = f"{side.size - len(tokenizer):,}" if of_model else ""
        table.add_row(
            side.name,
            f"{side.size:,}",
            padding,
            *(", ".join(_token(tokenizer, i) for i in side.ids(key)) or "-" for key in SPECIAL),
        )
    return table


def _token(tokenizer: Any, index: int) -> str:
    return f"{index} {tokenizer.convert_ids_to_tokens(index)}" if tokenizer is not None else str(index)


def alignment_table(rows: Sequence[tuple[str, ...]]) -> Table:
    """One row of text, token by token."""
    title = "One row: what each position reads, and the label that it has to predict"
    table = Table("position", "token", "label", "valid", "document:place", title=title)
    for row in rows:
        table.add_row(*row)
    return table


def curriculum_table(curriculum: Curriculum, components: Sequence[str], horizon: int) -> Table:
    """Each schedule drawn over the run, and its value wherever one of them bends."""
    present = {WEIGHT_KEY[name] for name in components}
    schedules: dict[str, Any] = {key: value for key, value in curriculum.weights.items() if key in present}
    schedules["temperature"] = curriculum.temperature
    if curriculum.top_k_experts is not None:
        schedules["top_k_experts"] = curriculum.top_k_experts
    knots = knots_of(schedules.values())
    headings = [f"{knot:.0%}\nstep {round(knot * horizon):,}" for knot in knots]
    table = titled("Curriculum", "", "each to its own height", *headings)
    table.columns[1].justify = "left"
    for key, schedule in schedules.items():
        table.add_row(key, sparkline(schedule), *(_value(schedule, knot) for knot in knots))
    return table


def _value(schedule: Schedule, place: float) -> str:
    """The value at a place; of a jump what is before and what is from there on."""
    there = [knot[1] for knot in schedule if knot[0] == place] if isinstance(schedule, list) else []
    return ", then ".join(f"{value:.4g}" for value in (there if len(there) > 1 else [value_at(schedule, place)]))


def components_table(module: DistillationModule, curriculum: Curriculum, raw: Mapping[str, float]) -> Table:
    """What each component weighs, reads, and measures on the first row."""
    table = titled("Components", "component", "weight", "raw now", "reads", "trains beside the student")
    for index in (3, 4):
        table.columns[index].justify = "left"
    first, last = (curriculum.state_at(step, 1).weights for step in (0, 1))
    for name in module.components:
        key = WEIGHT_KEY[name]
        weights = f"{first[key]:.4g}" if first[key] == last[key] else f"{first[key]:.4g} to {last[key]:.4g}"
        reads, trains = needs_of(module, name)
        table.add_row(name, weights, f"{raw[name]:.4f}" if name in raw else "", reads, trains)
    return table


def needs_of(module: DistillationModule, name: str) -> tuple[str, str]:
    """In words: what a loss reads of both models, and what it trains beside the student."""
    component = next((component for component in module.features if name in component.units), None)
    if component is None:
        return READS[name], ""
    count = sum(parameter.numel() for parameter in component.trained_by(name))
    return component.reads(name), f"{component.heads(name)}, {count:,}" if count else ""


def memory_table(estimates: Mapping[str, MemoryEstimate], rows: int, length: int) -> Table:
    """GiB of each device, one column per way of using devices."""
    small = max(estimate.step for estimate in estimates.values()) < GIB
    unit, name = (MIB, "MiB") if small else (GIB, "GiB")
    table = titled(f"Memory of each device in {name}, {rows} x {length} tokens at a time", "", *estimates)
    for title, part in MEMORY:
        values = [getattr(estimate, part) for estimate in estimates.values()]
        if any(values):
            table.add_row(title, *(f"{value / unit:,.2f}" for value in values))
    table.add_section()
    table.add_row("peak of a step", *(f"{estimate.step / unit:,.2f}" for estimate in estimates.values()))
    return table
