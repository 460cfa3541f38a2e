"""Exceptions that the command line prints as a sentence, without a traceback: bad input, and what stops a run."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input, told in one sentence that names the key, the value and the remedy."""


class DocumentError(UserError):
    """A document that cannot be encoded; who knows where it stands says so.

    Args:
        reason: what is wrong with it.
        remedy: what to do.
        key: YAML key that is to blame; None = the one that names the documents.
    """

    def __init__(self, reason: str, remedy: str, key: str | None = None) -> None:
        super().__init__(f"{key or 'data.dataset'}: {reason}; {remedy}")
        self.reason, self.remedy, self.key = reason, remedy, key


class RunError(RuntimeError):
    """A run can't go on for a reason outside its configuration, told in one sentence; exit code 1."""


class AuditError(RunError):
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
