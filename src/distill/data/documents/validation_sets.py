"""The sets that a run validates on: what `data.validation_split` and `data.validation` name."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from distill.data.documents.sources import Source, part_of, validation_sources
from distill.errors import UserError

Given = float | str | dict[str, Any]


@dataclass(frozen=True)
class ValidationSet:
    """One set of rows to validate on.

    Args:
        name: in the names of its metrics; empty for the only set of `data.validation_split`.
        key: YAML key that error messages name.
        given: a share of the training rows, a split or another local source, or a source with the keys of a part.
    """

    name: str
    key: str
    given: Given

    @property
    def share(self) -> float | None:
        """Of the training rows that are held out for it; None where it has a source of its own."""
        return self.given if isinstance(self.given, float) else None

    def sources(self, training: Sequence[Source]) -> list[tuple[Source, str]]:
        """Its sources, each with the YAML key that names it; none where rows are held out.

        Args:
            training: sources of the training rows, whose splits it may be and whose columns and form it takes over.

        Raises:
            UserError: see `validation_sources`; a key that no part has, or a value of the wrong kind.
        """
        if not isinstance(self.given, dict):
            return validation_sources(training, self.given, self.key)
        first = training[0]
        part = part_of(self.given, self.key)
        like: dict[str, Any] = {"split": "train"}
        like |= {name: getattr(first, name) for name in ("text_column", "messages_column", "format")}
        left_open = {name: value for name, value in like.items() if getattr(part, name) is None}
        return [(replace(part, **left_open), f"{self.key}.dataset")]


def validation_sets(split: float | str, named: dict[str, Any] | None) -> list[ValidationSet]:
    """The sets of a run, the first of which has the totals.

    Args:
        split: `data.validation_split`, the only set where none is named.
        named: `data.validation`, name -> what it is.

    Raises:
        UserError: a share out of range, names or keys that cannot be meant, or rows that are held out twice.
    """
    if named is None:
        sets = [ValidationSet("", "data.validation_split", split)]
    else:
        sets = [ValidationSet(name, f"data.validation.{name}", given) for name, given in named.items()]
    if not sets:
        raise UserError("data.validation: {}; name at least one set, or leave it out")
    for one in sets:
        if named is not None and not (isinstance(one.name, str) and re.fullmatch(r"[\w.-]+", one.name)):
            raise UserError(f"data.validation: {one.name!r} stands in names of metrics; give letters, digits, _ . -")
        if isinstance(one.given, dict):
            if part_of(one.given, one.key).weight is not None:
                raise UserError(f"{one.key}.weight: {one.given['weight']}; a validation set has none, leave it out")
        elif not isinstance(one.given, str | float | int) or isinstance(one.given, bool):
            raise UserError(
                f"{one.key}: {one.given}; give a fraction, a split, another source, or a part's keys, {{dataset: ...}}"
            )
        elif not isinstance(one.given, str) and not 0 < one.given < 1:
            raise UserError(f"{one.key}: {one.given}; give a fraction between 0 and 1, or a split's name")
    shares = [one for one in sets if one.share is not None]
    if len(shares) > 1:
        raise UserError(
            f"{shares[1].key}: {shares[1].given} would hold out rows like {shares[0].key}; give it a source of its own"
        )
    return sets
