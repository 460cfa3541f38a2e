"""How targets are made across tokenizers, as far as the user says."""

from dataclasses import dataclass


@dataclass(frozen=True)
class VocabularyOptions:
    """Of targets where the teacher's ids mean other tokens than the student's.

    Args:
        look_ahead: follow the teacher along the text where a token of the student is longer than the teacher's next;
            null = where the run has no `lm_loss` to learn that from.
    """

    look_ahead: bool | None = None
