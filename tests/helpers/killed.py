"""A command of the program in a process of its own that dies while it writes, and what it left."""

import os
import signal
import warnings
from pathlib import Path

from distill.commands.fit import run


def contents(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of each file."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def killed_at_file(at: int, *arguments: str) -> None:
    """Runs a command that is killed while it forces file number `at` to the disk, half of which is gone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads at a fork; torch has one here
        child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        return
    count, true = 0, os.fsync

    def dying(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == at:
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        true(descriptor)

    os.fsync = dying
    run([*arguments])
    os._exit(0)
