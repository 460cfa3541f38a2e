"""How targets are made across tokenizers, as far as the user says."""

from dataclasses import dataclass
from typing import Literal

from distill.errors import UserError

Method = Literal["first_token", "aligned", "exact_matches", "uld"]


@dataclass(frozen=True)
class VocabularyOptions:
    """Of targets where the teacher's ids mean other tokens than the student's.

    Args:
        method: first_token: each token of the teacher goes to the first token that the student writes for what is left
            of it, inside of the teacher's tokens too. The others are there to be compared with, where both sides have a
            boundary alone: aligned, the same; exact_matches, to tokens of the same bytes; uld, sorted probabilities.
        look_ahead: follow the teacher along the text where a token of the student is longer than the teacher's next;
            null = where the run has no `lm_loss` to learn that from.

    Raises:
        UserError: options that mean nothing together.
    """

    method: Method = "first_token"
    look_ahead: bool | None = None

    def __post_init__(self) -> None:
        if self.look_ahead and self.method != "first_token":
            raise UserError(
                f"model.vocabulary.look_ahead: true, but {self.method} looks at single tokens; leave it out, or set "
                "method: first_token"
            )
