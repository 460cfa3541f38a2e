"""Two exceptions that the command line prints as a sentence, without a traceback: bad input, and a broken promise."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input, told in one sentence that names the key, the value and the remedy."""


class AuditError(RuntimeError):
    """A number does not reconcile or is not finite; the message names the component, the step and the rule."""


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """A remedy for a misspelt name: the nearest option, else all of them.

    Example:
        >>> did_you_mean("kd_los", ["kd_loss", "lm_loss"])
        "did you mean 'kd_loss'?"
    """
    options = list(options)
    near = difflib.get_close_matches(word, options, n=1)
    return f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(options)}"
