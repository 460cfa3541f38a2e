"""How far the making of a student is: a bar with the time left in a terminal, a line every 30 seconds elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich import get_console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

EVERY_S = 30.0


class TellLayer(Protocol):
    """Is told a layer of the student, from 0, and the share of it that is done."""

    def __call__(self, layer: int, share: float) -> None: ...


@contextmanager
def showing(layers: int) -> Iterator[TellLayer]:
    """Shows the progress of a student of so many layers while the block runs; nothing of it stays in a terminal."""
    console = get_console()
    if not console.is_terminal:
        yield _lines(layers)
        return
    columns = [
        TextColumn("Making the student: layer {task.fields[layer]}/{task.total:.0f}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=layers, layer=1)

        def tell(layer: int, share: float) -> None:
            bar.update(task, completed=layer + share, layer=min(layer + 1, layers))

        yield tell


def _lines(layers: int) -> TellLayer:
    started = told = time.monotonic()

    def tell(layer: int, share: float) -> None:
        nonlocal told
        now, done = time.monotonic(), (layer + share) / layers
        if now - told >= EVERY_S and done:
            told = now
            left_s = (now - started) * (1 / done - 1)
            print(f"Making the student: layer {layer + 1} of {layers}, about {left_s:,.0f} s left", flush=True)

    return tell
