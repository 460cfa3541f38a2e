"""This process's resident memory in MB as Linux counts it, since torch keeps no account of a CPU's.

`resource` and psutil know the peak of the whole life alone; /proc can be told to forget, but there is one on Linux
only.
"""

import ctypes
from pathlib import Path


def resident_mb() -> float:
    """What is resident now."""
    return _status_mb("VmRSS")


def peak_mb() -> float:
    """The most that was, since the process began or `forget_peak` was called."""
    return _status_mb("VmHWM")


def forget_peak() -> None:
    """Gives back what is allocated but free, and lets the peak start anew."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def _status_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e6
