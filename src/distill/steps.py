"""What a whole optimizer step was: micro-batches added up on the device, over all ranks, and tokens per second.

The sums are added only on steps that a logger or a dump reads. The price is that the module must know beforehand which
those are.
"""

import resource
import time

import torch
import torch.distributed as dist

from distill.breakdown import LossBreakdown


class StepSums:
    """Adds up the breakdowns of one accumulation window."""

    def __init__(self) -> None:
        self._sums = torch.zeros(0)

    def add(self, breakdown: LossBreakdown, accumulation: int, starts: bool) -> None:
        """Adds a micro-batch, whose raw values carry the factor `accumulation`; `starts` opens a new window."""
        if not breakdown.raw:
            return
        values = torch.stack([value.double() / accumulation for value in breakdown.raw.values()])
        self._sums = values if starts or len(self._sums) != len(values) else self._sums + values

    def whole(self, breakdown: LossBreakdown) -> LossBreakdown:
        """The breakdown of the whole step over all ranks; `breakdown` is of its last micro-batch here."""
        if not breakdown.raw:
            return breakdown
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self._sums)  # unlike Lightning's reduce, without a barrier that the host waits at
            self._sums /= dist.get_world_size()
        return LossBreakdown(dict(zip(breakdown.raw, self._sums.unbind(), strict=True)), breakdown.weights)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory that this process has held: allocated tensors on a GPU, resident pages on a CPU; in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Throughput:
    """Tokens per second of training, without the time that validation took."""

    def __init__(self) -> None:
        self._tokens, self._since, self._paused = 0, time.perf_counter(), 0.0

    def add(self, tokens: int) -> None:
        """Counts the tokens of an optimizer step."""
        self._tokens += tokens

    def pause(self) -> None:
        """Stops the clock."""
        self._paused = time.perf_counter()

    def resume(self) -> None:
        """Lets the clock go on."""
        self._since += time.perf_counter() - self._paused

    def read(self) -> float:
        """Tokens per second since the last reading."""
        now = time.perf_counter()
        rate = self._tokens / (now - self._since)
        self._tokens, self._since = 0, now
        return rate
