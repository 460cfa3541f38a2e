"""One exception for what a user can put right: the command line prints its sentence and no traceback."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input, told in one sentence that names the key, the value and the remedy."""


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """A remedy for a misspelt name: the nearest option, else all of them.

    Example:
        >>> did_you_mean("kd_los", ["kd_loss", "lm_loss"])
        "did you mean 'kd_loss'?"
    """
    options = list(options)
    near = difflib.get_close_matches(word, options, n=1)
    return f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(options)}"
