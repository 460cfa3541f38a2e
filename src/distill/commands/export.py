"""`distill export`: a checkpoint's student as a plain transformers folder that needs nothing of this program.

The folder appears whole or not at all, and only where what was written says to a row of the run what the run's own
student said. Only the student is in it: projections and gate probes serve the training.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from distill.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from distill.checkpoints.students import Student

DTYPES = ("bfloat16", "float16", "float32")


def export(
    checkpoint: str,
    folder: str,
    *,
    dtype: str | None = None,
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Writes the student of a checkpoint as safetensors with tokenizer, generation config and model card.

    Args:
        checkpoint: a run's `.ckpt` file.
        folder: to write; must not exist or be empty.
        dtype: bfloat16, float16 or float32; as the checkpoint has them when None.
        tokenizer: source of the tokenizer, where the checkpoint's is no longer to be had.
        trust_remote_code: run code that comes with the tokenizer.

    Returns:
        The folder.

    Raises:
        UserError: a checkpoint that cannot be read, a folder with something in it or that cannot be written, an unknown
            dtype, a student whose logits on a row are not those of the run.
    """
    import torch

    from distill.checkpoints.students import is_checkpoint, load_student

    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype: {dtype!r} is no dtype of an export; {did_you_mean(dtype, DTYPES)}")
    target = Path(folder).expanduser().absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"folder: {folder} exists and is not empty; name another or move it away")
    if not is_checkpoint(checkpoint):
        raise UserError(f"checkpoint: {checkpoint!r} is no .ckpt file; give one of a run's checkpoints folder")
    student = load_student(
        checkpoint,
        tokenizer=tokenizer,
        dtype=getattr(torch, dtype) if dtype else None,
        trust_remote_code=trust_remote_code,
        key="checkpoint",
    )
    _write(student, target)
    return target


def _write(student: "Student", target: Path) -> None:
    """Writes a folder, whole or not at all.

    Raises:
        UserError: it cannot be written, or what was written is another model.
    """
    from distill.checkpoints.card import model_card
    from distill.checkpoints.proof import prove
    from distill.models.load import load_model
    from distill.models.quiet import quiet_transformers

    here = next(parent for parent in target.parents if parent.exists())  # the same file system, and nothing is left
    try:
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=here))
    except OSError as error:
        raise UserError(f"folder: {here} can't be written ({error.strerror}); name a folder elsewhere") from error
    try:
        with quiet_transformers():
            student.model.save_pretrained(partial)
            student.tokenizer.save_pretrained(partial)
        written = load_model(str(partial), dtype=student.model.dtype, key="folder")
        assert student.checkpoint is not None
        if (expected := student.checkpoint["student"].get("proof")) is not None:
            prove(written, expected, "folder")
        (partial / "README.md").write_text(model_card(target.name, student), encoding="utf-8")
        partial.chmod(0o755)  # mkdtemp keeps others out, and so does who wrote the weights
        for file in partial.iterdir():
            file.chmod(0o644)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main(arguments: list[str]) -> int:
    """Runs `distill export`; its exit code is 0."""
    from distill.commands.arguments import Parser

    parser = Parser(prog="distill export", description="A checkpoint's student as a transformers folder.")
    parser.add_argument("checkpoint", help="a run's .ckpt file")
    parser.add_argument("folder", help="to write; must not exist or be empty")
    parser.add_argument("--dtype", help=f"{', '.join(DTYPES)}; as the checkpoint has them by default")
    parser.add_argument("--tokenizer", help="its source, where the checkpoint's is no longer to be had")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the tokenizer")
    given = parser.parse(arguments)
    written = export(given.pop("checkpoint"), given.pop("folder"), **given)
    size_MB = sum(item.stat().st_size for item in written.iterdir()) / 1e6
    print(f"{written}: {size_MB:,.1f} MB in {', '.join(sorted(item.name for item in written.iterdir()))}")
    return 0
