"""What `data.dataset` and `data.validation` name: one source, or several with weights."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

from distill.data.documents.folders import find_files
from distill.data.documents.forms import FormOption
from distill.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Source:
    """One part of the data.

    Args:
        dataset: hub name, local file, folder, glob or package://name/path, or a list of them.
        weight: share of the training rows, in any unit; null = no weights, all rows of all parts.
        dataset_config: configuration of a hub data set; null = that of `data`, as for all that follow.
        split: split of a hub data set.
        text_column: column that holds the text.
        messages_column: column that holds conversations.
        format: of the documents.
    """

    dataset: str | list[str]
    weight: float | None = None
    dataset_config: str | None = None
    split: str | None = None
    text_column: str | None = None
    messages_column: str | None = None
    format: FormOption | None = None

    def options(self) -> dict[str, Any]:
        """How `load_documents` and `open_stream` are to read it."""
        return {
            "config": self.dataset_config,
            "split": self.split,
            "text_column": self.text_column,
            "messages_column": self.messages_column,
            "form": self.format,
        }


def sources_of(dataset: str | list[str | dict[str, Any]], **defaults: Any) -> list[Source]:
    """The parts that `data.dataset` names; a name or a list of names is one part.

    Args:
        dataset: what the user gave.
        defaults: for fields that a part leaves open.

    Raises:
        UserError: nothing is named, a part has an unknown key or a value of the wrong kind, or the weights are not
            positive or not of every part.
    """
    parts = [dataset] if isinstance(dataset, str) else dataset
    names = [part for part in parts if isinstance(part, str)]
    if not parts:
        raise UserError("data.dataset: []; name at least one source")
    sources = (
        [Source(dataset if isinstance(dataset, str) else names)]
        if len(names) == len(parts)
        else [Source(p) if isinstance(p, str) else part_of(p, f"data.dataset[{i}]") for i, p in enumerate(parts)]
    )
    weights = [source.weight for source in sources]
    for place, weight in enumerate(weights):
        if weight is not None and not 0 < weight < float("inf"):
            raise UserError(f"data.dataset[{place}].weight: {weight} must be above 0; leave the part out instead")
        if weight is None and any(other is not None for other in weights):
            raise UserError(
                f"data.dataset[{place}].weight: null, while other parts have one; give every part a weight, or none"
            )
    return [
        replace(source, **{name: value for name, value in defaults.items() if getattr(source, name) is None})
        for source in sources
    ]


def part_of(given: dict[str, Any], where: str) -> Source:
    """The part that a user wrote down.

    Args:
        given: its keys and values.
        where: the YAML key under which it stands.

    Raises:
        UserError: an unknown key, a value of the wrong kind, or no source.
    """
    kinds: dict[str, Any] = {field.name: str for field in fields(Source)} | {
        "dataset": (str, list),
        "weight": (int, float),
    }
    for name, value in given.items():
        key = f"{where}.{name}"
        if name not in kinds:
            raise UserError(f"{key}: is no key of a part; {did_you_mean(name, kinds)}")
        if value is not None and (not isinstance(value, kinds[name]) or isinstance(value, bool)):
            raise UserError(f"{key}: {value!r} is no {'number' if name == 'weight' else 'text'}; correct it")
    if not given.get("dataset"):
        raise UserError(f"{where}.dataset: missing; name its source")
    if (form := given.get("format")) not in (None, *get_args(FormOption)):
        raise UserError(f"{where}.format: {form!r}; {did_you_mean(str(form), get_args(FormOption))}")
    return Source(**given)


def validation_sources(
    sources: Sequence[Source], split: float | str, key: str = "data.validation_split"
) -> list[tuple[Source, str]]:
    """Sources of validation rows alone and the YAML key that names them; none where rows are held out.

    Args:
        sources: of the training rows.
        split: a fraction, a split that all of them have, or another local source.
        key: YAML key that names it.

    Raises:
        UserError: local data have no such split, and it is no local source.
    """
    if not isinstance(split, str):
        return []
    names = [(name, s) for s in sources for name in ([s.dataset] if isinstance(s.dataset, str) else s.dataset)]
    places = [find_files(name, "data.dataset", source.dataset_config) for name, source in names]
    wanted = split.partition("[")[0]
    if all(found is None or wanted in found.splits for found in places):
        return [(replace(source, split=split), "data.dataset") for source in sources]
    if (found := find_files(split, key)) is not None:
        if found.splits:
            raise UserError(
                f"{key}: the folder {split!r} has the splits {', '.join(found.splits)}; give a file of one of them"
            )
        return [(replace(sources[0], dataset=split, weight=None, split="train"), key)]
    there = [name for found in places if found is not None for name in found.splits]
    have = f"have the splits {', '.join(there)}" if there else "have no splits"
    raise UserError(f"{key}: {split!r} is no local file, and local data {have}; give a file or a fraction")
