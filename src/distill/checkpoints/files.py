"""How checkpoints get onto the disk, and which of those found there can be loaded.

A checkpoint is written beside its place, forced to the disk and renamed: whatever happens, the name holds the old one
or the new one, whole. Lightning's own writer fills a buffer in memory and moves a file from the temporary directory,
which is a copy where that is another file system. A writer that is killed leaves `*.tmp` behind.
"""

import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from distill.errors import RunError, UserError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's single-file checkpoints, written atomically and loaded without running code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes `path`; what was there before stays whole where that fails.

        Raises:
            RunError: the disk is full, or the file can't be written for another reason.
        """
        if _is_local_file_protocol(path):
            write(checkpoint, Path(path))
        else:
            super().save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Loads tensors and plain values; pickled code only where `weights_only` is false."""
        return super().load_checkpoint(path, map_location, weights_only is not False)


def write(checkpoint: dict[str, Any], path: Path) -> None:
    """`torch.save` to `path`, atomically.

    Raises:
        RunError: it can't be written.
    """
    beside = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        sync(path.parent)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):  # torch hides the disk's error behind one of its own
            raise
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        free_gib = shutil.disk_usage(path.parent).free / 2**30 if path.parent.exists() else 0.0
        raise RunError(
            f"checkpoint: {path} can't be written ({cause.strerror}, {free_gib:.2f} GiB free), earlier ones are whole: "
            "make room and go on with --ckpt_path last"
        ) from error


def check_writable(directory: Path, key: str) -> None:
    """Refuses a directory that can't be made, or in which nothing can be written; leaves nothing there.

    Permissions alone do not tell: file systems may be read-only, full, or of a kind that makes no files.

    Args:
        directory: to be made with its parents.
        key: YAML key that error messages name.

    Raises:
        UserError: names the directory and the system's reason.
    """
    whole = directory.absolute()
    try:
        here = next(parent for parent in (whole, *whole.parents) if parent.exists())
        os.rmdir(tempfile.mkdtemp(prefix=".distill.", dir=here))
    except OSError as error:
        raise UserError(f"{key}: {directory} can't be written ({error.strerror}); name another place") from error


def remove(path: Path) -> None:
    """Removes a checkpoint, a file or a sharded one's folder, where it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(directory: Path) -> None:
    """Forces a directory's renames to the disk, where the system can."""
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def is_whole(path: Path) -> bool:
    """Whether a checkpoint was written to its end and every byte still has its checksum.

    Sharded ones, which are folders, are taken for whole where their index, which is written last, is there.
    """
    if path.is_dir():
        return (path / ".metadata").exists() and is_whole(path / "meta.pt")
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (OSError, EOFError, zipfile.BadZipFile):
        return False


def find_last(runs: Iterable[Path]) -> Path | None:
    """The whole checkpoint with most steps of the newest run that has one; damaged ones are passed over with a warning.

    Of those with as many steps it is the one written last. The times of files alone say nothing: copying changes them.

    Args:
        runs: their directories, the newest first.
    """
    for run in runs:
        found = (path for path in (run / "checkpoints").glob("*.ckpt") if not path.is_symlink())  # best.ckpt
        for path in sorted(found, key=lambda path: (-_step(path), -path.stat().st_mtime_ns, path.name)):
            if _step(path) < 0:
                break  # weights alone, from which nothing goes on
            if is_whole(path):
                rank_zero_info(f"ckpt_path: last is {path}{_told(run)}")
                return path
            rank_zero_warn(f"ckpt_path: {path} is damaged and passed over, an earlier one is taken.")
    return None


def _step(path: Path) -> float:
    """Optimizer steps of a checkpoint; infinite where it cannot be read, so that it is looked at and named; -1 of
    weights alone.
    """
    try:
        file = path / "meta.pt" if path.is_dir() else path
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        step = float(content["global_step"])
        return step if "callbacks" in content else -1.0
    except Exception:  # a damaged archive fails in whatever line reads it
        return float("inf")


def _told(run: Path) -> str:
    """What a run distilled, and with which data, by its config.yaml."""
    try:
        config = yaml.safe_load((run / "config.yaml").read_text())
        return f" (teacher {config['model']['teacher']}, data {config['data']['dataset']})"
    except (OSError, yaml.YAMLError, KeyError, TypeError):  # a run of the library has none
        return ""


def earlier_runs(root: str | Path, logger: Logger | list[Logger] | bool | None = None) -> list[Path]:
    """Directories of the runs that were written where a new one will be, the newest first.

    Only the file system is asked, so that all ranks find the same and no logger opens a run.

    Args:
        root: the trainer's `default_root_dir`.
        logger: as for `DistillTrainer`.
    """
    if logger is False or logger == []:
        return [Path(root)]
    first = logger[0] if isinstance(logger, list) else logger
    if not isinstance(first, Logger):
        first = CSVLogger(root, name="lightning_logs")
    if not isinstance(first, CSVLogger | TensorBoardLogger):
        found = [path.parent for path in Path(first.save_dir or root).glob("*/*/checkpoints")]
        runs = [run for run in found if run.parent.name != "lightning_logs"]  # the default loggers' own
        return sorted(runs, key=lambda run: -(run / "checkpoints").stat().st_mtime_ns)
    if first._version is not None:  # given, not counted up
        name = first._version if isinstance(first._version, str) else f"version_{first._version}"
        return [Path(first.root_dir, name)]
    runs = [path.parent for path in Path(first.root_dir).glob("version_*/checkpoints")]
    return sorted((run for run in runs if re.fullmatch(r"version_\d+", run.name)), key=lambda run: -int(run.name[8:]))
