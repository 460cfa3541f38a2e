"""What a checkpoint says of itself, so that one that cannot be meant is refused in a sentence before it is loaded.

The configuration beats the checkpoint, and a warning says where they differ.
"""

import dataclasses
import inspect
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from distill.checkpoints.proof import proof, proof_row
from distill.errors import UserError
from distill.models.lora import LoRA

FORMAT = 1
# Paths, where they exist.
SOURCES = ("model.teacher", "model.student", "model.student_config", "model.student_tokenizer", "data.tokenizer")
# Another one would mean other targets or tokens, or moments that do not fit.
BINDING = (
    "model.teacher",
    "model.teacher_cache",
    "model.student_tokenizer",
    "data.tokenizer",
    "data.packing",
    "model.optimizer",
)


def describe(settings: dict[str, Any]) -> dict[str, Any]:
    """The entry that a checkpoint carries under `distill`."""
    return {"format": FORMAT, "settings": settings, "folders": folders(settings)}


def folders(settings: dict[str, Any]) -> dict[str, str]:
    """Absolute paths of the sources that are local, however they were spelled."""
    local = {key: Path(settings[key]).expanduser() for key in SOURCES if isinstance(settings.get(key), str)}
    return {key: str(path.resolve()) for key, path in local.items() if path.exists()}


def read(path: str, key: str = "ckpt_path") -> dict[str, Any]:
    """A checkpoint file with its tensors mapped from disk, none of its code run.

    Raises:
        UserError: no such file, truncated, of another program or a newer format; messages call it `key`.
    """
    if not Path(path).is_file():
        raise UserError(f"{key}: {path} does not exist: give a .ckpt file of a run's checkpoints folder")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{key}: {path} is truncated or no checkpoint: take an earlier one")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged archive fails in whatever line reads it, and so does code in one
        reason = str(error).partition("\n")[0]
        raise UserError(f"{key}: {path} cannot be read ({reason}): take an earlier one") from error
    _known(checkpoint, key)
    return checkpoint


def _known(checkpoint: dict[str, Any], key: str) -> dict[str, Any]:
    """The entry that says what a checkpoint is, of a format that this version reads."""
    stored = checkpoint.get("distill")
    if stored is None:
        raise UserError(f"{key}: this is no checkpoint of distill: give one from a run's checkpoints folder")
    if stored["format"] > FORMAT:
        raise UserError(f"{key}: format {stored['format']} is newer than {FORMAT}: update student-aware-distillation")
    return stored


def check(checkpoint: dict[str, Any], settings: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Refuses what cannot be loaded into `state` and warns where the settings differ.

    Raises:
        UserError: a checkpoint of a newer format, not of this program, or of tensors with other shapes.
    """
    stored = _known(checkpoint, "ckpt_path")
    theirs: dict[str, Any] = {"model.optimizer": "adamw", **stored["settings"]}  # the only one at first
    mine, others = settings | folders(settings), theirs | stored["folders"]
    # The same words for a folder elsewhere are the same model, moved; other words for the same folder are, too.
    different = [key for key in settings if settings[key] != theirs.get(key) and mine[key] != others.get(key)]
    for key in BINDING:
        if key in different:
            raise UserError(
                f"{key}: {settings[key]!r}, but the checkpoint was made with {theirs.get(key)!r}: use that, or "
                "start anew from the student's weights"
            )
    differing = [f"{key} {theirs.get(key)} -> {settings[key]}" for key in different]
    shapes = {name: tensor.shape for name, tensor in state.items()}
    # FSDP2's strategy has loaded the tensors by itself, and refused other shapes.
    saved = {name: tensor.shape for name, tensor in checkpoint.get("state_dict", state).items()}
    if shapes != saved:
        names = sorted(n for n in shapes.keys() | saved.keys() if shapes.get(n) != saved.get(n))
        raise UserError(
            f"ckpt_path: {len(names)} tensors differ from this configuration's, {names[0]} first "
            f"(changed: {', '.join(differing) or 'the models behind the names'}): use the run's own configuration"
        )
    if differing:
        rank_zero_warn(f"The configuration differs from the checkpoint's and wins: {', '.join(differing)}.")


def check_goes_on(checkpoint: dict[str, Any], trainer: L.Trainer) -> None:
    """Refuses to train on from weights alone.

    Args:
        checkpoint: that is being loaded.
        trainer: that loads it.

    Raises:
        UserError: names the file and what to give instead.
    """
    if trainer.training and "callbacks" not in checkpoint:
        raise UserError(
            f"ckpt_path: {trainer.ckpt_path} holds weights alone (save_weights_only), from which no run goes on; give "
            "the run's last.ckpt, or make a model.student of it by distill export"
        )


def record(
    student: PreTrainedModel,
    generation: GenerationConfig,
    tokenizer: str,
    lora: LoRA | None,
    data: L.LightningDataModule | None,
    run: Mapping[str, Any],
) -> dict[str, Any]:
    """What a checkpoint says of its student and its run, as plain values.

    Args:
        student: the model.
        generation: how it is to write, where it stops among others.
        tokenizer: source of its tokenizer.
        lora: adapters that its weights carry.
        data: whose first validation row its proof is of.
        run: what `run_record` says.

    Returns:
        `student`: config, generation_config, lora, tokenizer, proof; `run`.
    """
    return {
        "student": {
            "config": plain(student.config.to_dict()),
            "generation_config": plain(generation.to_dict()),
            "lora": dataclasses.asdict(lora) if lora is not None else None,
            "tokenizer": str(Path(tokenizer).resolve()) if Path(tokenizer).exists() else tokenizer,
            "proof": proof(student, proof_row(data)),
        },
        "run": dict(run),
    }


def run_record(trainer: L.Trainer, losses: Sequence[str]) -> dict[str, Any]:
    """What a checkpoint says of its run: losses, data, curriculum, trainer, metrics of the last validation."""
    data = getattr(trainer, "datamodule", None)
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    curriculum = next((c for c in callbacks if type(c).__name__ == "Curriculum"), None)
    return {
        "components": list(losses),
        "data": arguments(data) | _parts(data) if data is not None else {},
        "curriculum": plain(getattr(curriculum, "schedules", {})),
        "trainer": {
            "precision": str(trainer.precision),
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "world_size": trainer.world_size,
        },
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")},
    }


def plain(value: Any) -> Any:
    """A value as JSON has it, so that it loads with `weights_only=True`; what JSON has no word for becomes a string."""
    return json.loads(json.dumps(value, default=_word))


def _word(value: Any) -> Any:
    """What JSON has for a value that it does not know."""
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else str(value)


def _parts(data: L.LightningDataModule) -> dict[str, Any]:
    """Where a datamodule's documents come from, and how conversations are rendered."""
    return {name: plain(getattr(data, name)) for name in ("sources", "chat") if hasattr(data, name)}


def arguments(instance: object) -> dict[str, Any]:
    """Constructor arguments of an object that keeps them under their names; what is no plain value is left out."""
    names = [name for name in inspect.signature(type(instance)).parameters if hasattr(instance, name)]
    values = {name: getattr(instance, name) for name in names}
    return {
        name: plain(value)
        for name, value in values.items()
        if isinstance(value, str | int | float | list | dict | None) or dataclasses.is_dataclass(value)
    }
