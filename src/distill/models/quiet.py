"""transformers without its bars and warnings while it loads."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_transformers(downloads: bool = False) -> Iterator[None]:
    """Within it transformers shows no progress bars, and neither it nor Python any warnings; errors pass.

    Args:
        downloads: leave the bars on where a terminal shows them, since downloads take minutes.
    """
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not (downloads and sys.stderr.isatty()):
        logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
