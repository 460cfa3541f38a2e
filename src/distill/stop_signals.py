"""SIGTERM and SIGINT ask a run to stop where it can be resumed exactly, not where they happen to arrive.

The handlers only take a note. With several ranks the notes are compared over a channel of their own on the hosts, one
round late, so that no rank waits for another or for its device. A run therefore stops up to one step later than it
could, and it takes a second SIGINT to stop at once.
"""

import atexit
import multiprocessing
import signal
import threading
from typing import Any

import torch
import torch.distributed as dist

STOPPING = (signal.SIGTERM, signal.SIGINT)


def leave_signals_to_the_run(worker: int = 0) -> None:
    """For data workers: a signal to the whole process group must not kill them before the run has saved itself."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


def end_workers_at_exit() -> None:
    """Python ends its daemons by SIGTERM, which data workers ignore, and would wait for them without end.

    To be called after workers were started: what is registered last runs first, before torch waits for each of them.
    """
    atexit.unregister(_end_workers)
    atexit.register(_end_workers)


def _end_workers() -> None:
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


class StopSignals:
    """Takes note of signals from `install` to `restore`."""

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Replaces the handlers of SIGTERM and SIGINT; only the main thread may."""
        if threading.current_thread() is threading.main_thread() and not self._before:
            self._before = {number: signal.signal(number, self._note) for number in STOPPING}

    def restore(self) -> None:
        """Puts the handlers back that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number


class Agreement:
    """The largest of the numbers that the ranks hand in, one round late; at once where there is one rank."""

    def __init__(self) -> None:
        self._several = dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo") if self._several else None
        self._round: tuple[Any, torch.Tensor] | None = None

    def __call__(self, *mine: int) -> list[int]:
        """Hands in this rank's numbers; those of the round before, zeros in the first."""
        if not self._several:
            return list(mine)
        agreed = [0] * len(mine)
        if self._round is not None:
            work, numbers = self._round
            work.wait()
            agreed = numbers.tolist()
        numbers = torch.tensor(mine)
        self._round = (dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self._group, async_op=True), numbers)
        return agreed

    def finish(self) -> None:
        """Waits for the round under way, so that no rank leaves while another still needs it."""
        if self._round is not None:
            self._round[0].wait()
            self._round = None
