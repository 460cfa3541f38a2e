"""What a whole optimizer step was: micro-batches added up on the device, over all ranks, and tokens per second.

The sums are added only on steps that a logger or a dump reads, so the module must know beforehand which those are.
"""

import resource
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distill.batch import Batch
from distill.breakdown import LossBreakdown
from distill.curriculum import WEIGHT_KEY, CurriculumState
from distill.training.objective import Losses


class StepSums:
    """Adds up what the micro-batches of one accumulation window yielded, where somebody reads it; and the clock."""

    def __init__(self) -> None:
        self.throughput = Throughput()
        self._sums = torch.zeros(0)

    def step(
        self, result: Losses, batch: Batch, accumulation: int, window: tuple[bool, bool], due: bool
    ) -> tuple[LossBreakdown, dict[str, Tensor]] | None:
        """Takes in a micro-batch.

        Args:
            result: of it; raw values carry the factor `accumulation`.
            batch: itself.
            accumulation: micro-batches of an optimizer step.
            window: whether it opens an optimizer step, and whether it ends one.
            due: whether a logger or a dump reads the step.

        Returns:
            Where it ends a step that is read: the breakdown of the whole step over all ranks, and means of the
            statistics over its tokens. Collective there.
        """
        starts, ends = window
        if due:
            self._add(result.breakdown, result.stats, len(batch.student.positions), accumulation, starts)
        if ends:
            self.throughput.add(batch.units["tokens"])
        return self._whole(result.breakdown, result.stats) if due and ends else None

    def _add(
        self, breakdown: LossBreakdown, stats: dict[str, Tensor], tokens: int, accumulation: int, starts: bool
    ) -> None:
        values = [value.double() / accumulation for value in breakdown.raw.values()]
        values += [value.double() * tokens for value in stats.values()]
        if values:
            counted = torch.stack([*values, torch.full_like(values[0], tokens)])
            self._sums = counted if starts else self._sums + counted

    def _whole(self, breakdown: LossBreakdown, stats: dict[str, Tensor]) -> tuple[LossBreakdown, dict[str, Tensor]]:
        """The sums under the names that the step's last micro-batch has here."""
        if not breakdown.raw and not stats:
            return breakdown, stats
        if dist.is_initialized():
            dist.all_reduce(self._sums)  # unlike Lightning's reduce, without a barrier that the host waits at
            self._sums /= dist.get_world_size()
        raw, means, tokens = self._sums.split([len(breakdown.raw), len(stats), 1])
        step = LossBreakdown(dict(zip(breakdown.raw, raw.unbind(), strict=True)), breakdown.weights)
        return step, dict(zip(stats, (means / tokens.clamp(min=1e-9)).unbind(), strict=True))


def step_figures(step: LossBreakdown, state: CurriculumState) -> dict[str, Any]:
    """A whole step's losses and what the curriculum said of them, under their names in the log."""
    figures: dict[str, Any] = {"train/loss": step.total}
    figures |= {f"train/{name}": step.raw[name] for name in step.active}
    figures |= {f"train/{name}_scaled": value for name, value in step.scaled.items()}
    figures |= {f"curriculum/{WEIGHT_KEY[name]}": weight for name, weight in step.weights.items()}
    return figures | {"curriculum/temperature": state.temperature}


def on_host(figures: dict[str, Any]) -> dict[str, Tensor]:
    """The same figures as tensors on the host, in one copy, for a logger reads each by itself."""
    there = {name: value for name, value in figures.items() if isinstance(value, Tensor)}
    here = {name: torch.tensor(value) for name, value in figures.items() if name not in there}
    if there:
        copied = torch.stack([value.detach().double() for value in there.values()]).cpu()
        here |= {name: one.to(value.dtype) for (name, value), one in zip(there.items(), copied, strict=True)}
    return {name: here[name] for name in figures}


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held: allocated tensors on an accelerator, resident pages on a CPU."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


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

    def figures(self, device: torch.device) -> dict[str, float]:
        """Tokens per second since the last reading, and the memory peak, under their names in the log."""
        return {"train/tokens_per_s": self.read(), "train/peak_memory_gib": peak_memory(device) / 2**30}
