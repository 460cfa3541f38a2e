"""Data sets of the hub, whose errors are told by the YAML key that is to blame."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from distill.errors import UserError


def load_hub(name: str, config: str | None, split: str, key: str, streaming: bool) -> Any:
    """A data set of the hub, as a table or as a stream.

    Raises:
        UserError: it is not to be had, or has no such configuration or split.
    """
    import datasets

    try:
        with bars_on_terminals():
            return datasets.load_dataset(name, config, split=split, streaming=streaming)
    except Exception as error:
        text = str(error)
        reason = text.partition("\n")[0].rstrip(". ")
        if "config" in text.lower() and ("missing" in text or "not found" in text or "pick one" in text):
            choices = " ".join(text.split())
            raise UserError(f"{key.rpartition('.')[0]}.dataset_config: {config!r} for {name!r}: {choices}") from error
        if "split" in text.lower() and isinstance(error, ValueError):
            raise UserError(f"{key.rpartition('.')[0]}.split: {split!r} for {name!r}: {reason}; correct it") from error
        raise UserError(
            f"{key}: {name!r} is no local file, and not to be had from the hub ({reason}); check the spelling and the "
            "network, or give local files"
        ) from error


@contextmanager
def bars_on_terminals() -> Iterator[None]:
    """Progress bars of `datasets` only where someone can see them move."""
    import datasets

    on = not datasets.are_progress_bars_disabled()
    if on and not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if on:
            datasets.enable_progress_bars()
