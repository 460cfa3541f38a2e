"""What cache of teacher targets is asked for, and what its rows are to hold so that a run learns the same from it."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from distill.curriculum import Schedule
from distill.errors import UserError, did_you_mean
from distill.models import load
from distill.models.trace import Needs
from distill.teachers.cached_states import check_storable
from distill.teachers.encodings import KINDS, Encoding, Hidden, Sampled, TopK
from distill.training.build import teacher_needs
from distill.training.from_cache import check_components
from distill.training.options import ModelOptions
from distill.training.start import student_skeleton


@dataclass(frozen=True)
class Request:
    """What to build.

    Args:
        output: folder.
        encoding: name; None = what `model.kd_loss` learns from.
        dtype: that hidden states are rounded to; None = the teacher's.
        states: whether to write what the configured losses on layers look at, too.
        max_rows: of training and of validation rows, the first ones; None = all.
        shard_rows: rows of a shard; None = as many as 64 MiB hold.
    """

    output: str
    encoding: str | None = None
    dtype: str | None = None
    states: bool = False
    max_rows: int | None = None
    shard_rows: int | None = None

    def __post_init__(self) -> None:
        if self.encoding is not None and self.encoding not in KINDS:
            raise UserError(f"--encoding: {self.encoding!r} is no encoding; {did_you_mean(self.encoding, KINDS)}")
        if self.dtype not in (None, "float32", "bfloat16"):
            raise UserError(f"--dtype: {self.dtype!r}; give float32 or bfloat16")
        for name in ("max_rows", "shard_rows"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"--{name}: {value}; give 1 or more")


def chosen_encodings(
    request: Request, options: ModelOptions, temperature: Schedule, dtype: torch.dtype, shared: int
) -> dict[str, Encoding]:
    """Encodings of training and validation rows.

    Raises:
        UserError: an encoding that is not what `kd_loss` would learn from, or a temperature that moves.
    """
    kd = options.kd_loss
    implied = "hidden" if kd is None or (kd.top_k is None and kd.samples is None) else ""
    implied = implied or ("top_k" if kd is not None and kd.top_k is not None else "sampled")
    name = request.encoding or implied
    hidden = Hidden(hidden_dtype(request) or dtype)
    if name == "hidden":
        return {"training": hidden, "validation": hidden}
    key = {"top_k": "top_k", "sampled": "samples"}[name]
    count = getattr(kd, key, None)
    if count is None:
        raise UserError(f"--encoding: {name} needs model.kd_loss.{key}, which is null; set it to a number of ids")
    values = {float(knot[1]) for knot in temperature} if isinstance(temperature, list) else {float(temperature)}
    if len(values) > 1:
        raise UserError(
            f"curriculum.temperature: {temperature} moves, and {name} targets are bound to one; set a number, or "
            "build with --encoding hidden"
        )
    (constant,) = values
    sparse: Encoding = (
        TopK(min(count, shared), constant, shared) if name == "top_k" else Sampled(count, constant, shared)
    )
    return {"training": sparse, "validation": hidden}


def hidden_dtype(request: Request) -> torch.dtype | None:
    """That hidden states are rounded to, None = the teacher's."""
    return None if request.dtype is None else getattr(torch, request.dtype)


def states_to_store(
    request: Request, options: ModelOptions, teacher: PreTrainedModel, vocabulary: int
) -> dict[str, Needs]:
    """What losses on layers look at that are to be stored, by the key of `model:` that says so; nothing unless asked.

    The losses are built beside a student without memory, since its depth and width choose layers too.

    Args:
        request: what to build.
        options: of the run.
        teacher: as it was loaded.
        vocabulary: ids of its head.

    Raises:
        UserError: no such loss is on, or it looks at what no cache holds.
    """
    if not request.states:
        return {}
    if not options.components:
        raise UserError("--states: true, but no loss looks at layers; configure those of the runs, or leave it out")
    check_components(options)
    student = student_skeleton(options, teacher.config, vocabulary, torch.float32)
    for component in options.components.values():
        component.build(teacher, student)
    needs = teacher_needs(options.components)
    for key, each in needs.items():
        check_storable(key, each)
    return needs


def shared_vocabulary(options: ModelOptions, teacher_vocab: int) -> int:
    """Ids that the teacher shares with the student of these options."""
    source = options.student if options.student is not None else options.student_config
    if source is None:
        return teacher_vocab
    config = load.load_config(
        source, vocab_size=teacher_vocab, trust_remote_code=options.trust_remote_code, key="model.student"
    )
    return min(teacher_vocab, config.get_text_config(decoder=True).vocab_size)
