"""Students that were made before, so that a second run of the same configuration starts at once.

The name of an entry is a digest of all that it depends on: the teacher's configuration, weights and buffers, the shape,
how it is fitted, the calibration rows, the kind of device and its products. One process makes it under a lock while
others of the machine wait; it appears whole or not at all, so one that was killed is made again from the start.
"""

import copy
import hashlib
import json
import os
import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from distill.models.quiet import quiet_transformers
from distill.models.start.make import Place, make_student
from distill.models.start.progress import showing
from distill.models.start.shape import Shape, StudentFit
from distill.models.start.walk import Rows
from distill.sources import cache_dir

FORMAT = 3  # goes up with every change of what is made
RECORD = "student_fit.json"


def cached_student(
    teacher: PreTrainedModel, shape: Shape, rows: Rows, fit: StudentFit, place: Place, folder: Path | None = None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """`make_student`, or what it made before of the same things.

    Args:
        teacher: in eval mode.
        shape: of the student.
        rows: calibration rows.
        fit: how layers are fitted.
        place: where they run.
        folder: of the cache; by default `students` in the user's.

    Returns:
        The student in fp32 and train mode, and plain values: `seconds`, `tokens`, `layers` with a dict of each
        `LayerFit`, `cached`.
    """
    from filelock import FileLock

    target = (folder or cache_dir() / "students") / digest(teacher, shape, rows, fit, place)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if target.is_dir():
            return _read(target, teacher), json.loads((target / RECORD).read_text()) | {"cached": True}
        for left in target.parent.glob(f"{target.name}.*.partial"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        started = time.monotonic()
        with showing(len(shape.layers)) as tell:
            student, fits = make_student(teacher, shape, rows, fit, place, tell)
        record = {
            "seconds": round(time.monotonic() - started, 1),
            "tokens": int(rows.counted_RL.sum()),
            "layers": [asdict(each) for each in fits],
        }
        _write(target, student, record)
        return student, record | {"cached": False}


def made_before(
    teacher: PreTrainedModel, shape: Shape, rows: Rows, fit: StudentFit, place: Place, folder: Path | None = None
) -> dict[str, Any] | None:
    """The record of a student that is in the cache; None where there is none."""
    target = (folder or cache_dir() / "students") / digest(teacher, shape, rows, fit, place)
    return json.loads((target / RECORD).read_text()) if target.is_dir() else None


def digest(teacher: PreTrainedModel, shape: Shape, rows: Rows, fit: StudentFit, place: Place) -> str:
    """A name for all that a student depends on."""
    config = {key: value for key, value in teacher.config.to_dict().items() if not key.startswith("_")}
    words = {
        "format": FORMAT,
        "teacher": config,
        "shape": asdict(shape),
        "fit": asdict(fit),
        "device": place.device.type,
        "autocast": str(place.autocast),
        "products": torch.get_float32_matmul_precision(),
    }
    found = hashlib.sha256(json.dumps(words, sort_keys=True, default=str).encode())
    for tensor in (rows.ids_RL, rows.counted_RL, rows.positions_RL):
        if tensor is not None:
            found.update(str(tuple(tensor.shape)).encode())
            found.update(_bytes(tensor))
    for name, tensor in (*teacher.named_parameters(), *teacher.named_buffers()):  # a router's bias may be a buffer
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(_bytes(tensor))
    return found.hexdigest()[:24]


def _bytes(tensor: Tensor) -> Any:
    """The memory of a tensor."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def _write(target: Path, student: PreTrainedModel, record: dict[str, Any]) -> None:
    partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.", suffix=".partial", dir=target.parent))
    try:
        # Not by save_pretrained, which writes on rank zero alone: here it is whoever came first.
        save_model(student, str(partial / "model.safetensors"), metadata={"format": "pt"})
        student.config.to_json_file(str(partial / "config.json"), use_diff=False)
        student.generation_config.save_pretrained(partial)
        (partial / RECORD).write_text(json.dumps(record, indent=1))
        partial.chmod(0o755)  # mkdtemp keeps others out
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _read(target: Path, teacher: PreTrainedModel) -> PreTrainedModel:
    # Of the teacher's own family by its class: transformers may not know one whose code came with the weights.
    same = json.loads((target / "config.json").read_text())["model_type"] == teacher.config.model_type
    family: Any = type(teacher) if same else AutoModelForCausalLM
    with quiet_transformers():
        student: PreTrainedModel = family.from_pretrained(
            target, dtype=torch.float32, attn_implementation=teacher.config._attn_implementation
        )
    student.config.use_cache = False
    student.generation_config = copy.deepcopy(teacher.generation_config)  # which the name does not depend on
    return student.requires_grad_(True).train()
