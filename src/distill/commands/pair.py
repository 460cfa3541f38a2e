"""Teacher and student side by side, with the rows on which they are compared: what evaluation and prediction share.

For a checkpoint the run's config.yaml says which teacher, precision and validation rows, so that the figures are those
of `distill validate`; for other models they must be named. Both models and all baselines are on one device.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from jsonargparse import ArgumentParser

from distill.checkpoints.students import Student, is_checkpoint, load_student
from distill.commands.parser import shorten, told
from distill.data.datamodule import DistillationDataModule
from distill.data.tokenizers import Tokenizers, tokenizers_of
from distill.errors import UserError
from distill.models import load
from distill.models.precision import check_experts, student_dtype, teacher_dtype
from distill.teachers.cache_files import teacher_behind
from distill.teachers.online import OnlineTeacher, quantize


@dataclass(frozen=True)
class Pair:
    """Two models on one device.

    Args:
        student: what was trained.
        teacher: frozen.
        teacher_source: what it was loaded from.
        tokenizers: the teacher's and, where that is another, the student's.
        config: of the run, empty where the student is no checkpoint.
        fabric: device, and autocast of the precision.
        precision: Lightning's name of it.
    """

    student: Student
    teacher: OnlineTeacher
    teacher_source: str
    tokenizers: Tokenizers
    config: Mapping[str, Any]
    fabric: L.Fabric
    precision: str


def run_config(source: str) -> dict[str, Any]:
    """The config.yaml of the run that wrote a checkpoint; empty for other sources and for a checkpoint on its own."""
    if not is_checkpoint(source):
        return {}
    path = Path(source).absolute().parent.parent / "config.yaml"
    return yaml.safe_load(path.read_text()) if path.is_file() else {}


def load_pair(
    student: str,
    teacher: str | None = None,
    *,
    precision: str | None = None,
    accelerator: str = "auto",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Pair:
    """Loads both models onto one device.

    Args:
        student: checkpoint, folder, hub id, GGUF file or `package://name/file`.
        teacher: the same but for checkpoints; by default the run's.
        precision: Lightning's name of it; by default the run's, else 32-true.
        accelerator: Lightning's name of the kind of device.
        trust_remote_code: run code that comes with the models.
        allow_pickle: accept `pytorch_model.bin`.

    Raises:
        UserError: a model that cannot be had, no teacher, or two tokenizers that cannot be compared.
    """
    config = run_config(student)
    ran = config.get("model", {})
    if teacher is None and ran.get("teacher") is None:
        raise UserError(f"--teacher: none is given, and {student!r} has no config.yaml of a run beside it; name one")
    options: dict[str, Any] = {
        "trust_remote_code": trust_remote_code or ran.get("trust_remote_code", False),
        "allow_pickle": allow_pickle or ran.get("allow_pickle", False),
    }
    precision = str(precision or config.get("trainer", {}).get("precision") or "32-true")
    torch.set_float32_matmul_precision(ran.get("matmul_precision", "highest"))
    fabric: Any = L.Fabric(accelerator=accelerator, devices=1, precision=precision)  # type: ignore[arg-type]

    loaded = load_other(student, precision, **options)
    source = teacher_behind(teacher or run_teacher(loaded, ran["teacher"]))
    wanted = ran if teacher is None else {}  # options of the run's own teacher
    dtype = teacher_dtype(wanted.get("teacher_dtype", "auto"), precision, fabric.device.type)
    frozen = OnlineTeacher(
        load.load_model(source, dtype=dtype, key="--teacher", **options), wanted.get("teacher_top_k", "native")
    )
    check_experts(frozen.model, dtype, "--precision")
    if wanted.get("teacher_quantization") is not None:
        quantize(frozen.model)
    remote = {"trust_remote_code": options["trust_remote_code"]}
    tokenizer = load.load_tokenizer(source, key="--teacher", **remote)
    tokenizers = tokenizers_of(tokenizer, loaded.tokenizer)
    frozen.to(fabric.device)
    loaded.model.to(fabric.device)
    return Pair(loaded, frozen, source, tokenizers, config, fabric, precision)


def run_teacher(student: Student, named: str) -> str:
    """The teacher of a student's run: the folder that it was, wherever this is called, or what the run called it."""
    folder = student.checkpoint.get("folders", {}).get("model.teacher")
    return folder if folder is not None and Path(folder).exists() else named


def load_other(source: str, precision: str, key: str = "student", **options: Any) -> Student:
    """A student or a baseline in the dtype of a precision; checkpoints keep their own."""
    dtype = None if is_checkpoint(source) else student_dtype(precision)
    loaded = load_student(source, dtype=dtype, key=key, **options)
    check_experts(loaded.model, loaded.model.dtype, "--precision")
    return loaded


def validation_data(
    pair: Pair, text: str | None = None, options: Mapping[str, Any] | None = None
) -> DistillationDataModule:
    """A datamodule whose validation rows are those of the run, or all rows of another source.

    Args:
        pair: its tokenizer and the run's data.
        text: another source, as `data.dataset` takes it.
        options: keys of the data section that replace the run's.

    Raises:
        UserError: no data named, or bad ones.
    """
    section: dict[str, Any] = {**pair.config.get("data", {}), **(options or {})}
    if text is not None:
        split = section.get("split", "train")
        local = Path(text).exists() or text.startswith("package://") or any(sign in text for sign in "*?[")
        section |= {"dataset": text, "validation_split": text if local else split, "streaming": False}
        section["validation"] = None
        section["max_validation_sequences"] = (options or {}).get("max_validation_sequences")
    if "dataset" not in section:
        raise UserError("--text: none is given, and there is no config.yaml of a run beside the student; name some")
    section["tokenizer"] = section.get("tokenizer") or pair.teacher_source
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(DistillationDataModule, "data")
    known = {key.removeprefix("data.") for key in parser.get_defaults().keys()}  # noqa: SIM118  (leaf keys)
    try:
        config = parser.parse_object({"data": {key: value for key, value in section.items() if key in known}})
        if unknown := sorted(set(options or {}) - known):
            raise UserError(f"--data.{unknown[0]}: there is no such key; see `distill fit --help`")
        data: DistillationDataModule = parser.instantiate_classes(config).data
    except Exception as error:
        raise told(error) or UserError(f"--data: {shorten(str(error))}") from error
    if pair.tokenizers.vocabularies is not None:
        data.student_tokenizer = pair.tokenizers.student
    data.prepare_data()
    data.setup("validate")
    return data
