"""The loader of a table's micro-batches, which resumes at the micro-batch where a checkpoint was written."""

import math
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from distill.data.order.sampler import StepSampler
from distill.errors import UserError


class ResumableLoader(DataLoader):
    """A training loader that Lightning saves and resumes in the middle of an epoch, to the micro-batch.

    It stores how many micro-batches were processed rather than handed out, since workers read ahead.

    Args:
        dataset: see `PackedRows`.
        sampler: of the training rows.
        trainer: whose accumulation, limit and progress count; without one, every micro-batch is a step.
        layout: what makes a place within an epoch meaningful (data, seed, sizes); plain values.
        options: of `DataLoader`.
    """

    def __init__(
        self, dataset: Any, sampler: StepSampler, trainer: L.Trainer | None, layout: dict[str, Any], **options: Any
    ) -> None:
        # A generator of its own: the default draws from the global one, and a resumed run would draw once more.
        generator = torch.Generator().manual_seed(sampler.seed)
        # torch types a request as a list of indices, but hands whatever it is to `__getitems__`.
        super().__init__(dataset, batch_sampler=sampler, generator=generator, **options)  # type: ignore[arg-type]
        self.steps, self.trainer, self.layout = sampler, trainer, layout
        self._start = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator function: Lightning calls iter() before it sets the epoch and counts the batches.
        if self.trainer is not None:
            self.steps.accumulate = self.trainer.accumulate_grad_batches
            self.steps.limit = self.trainer.num_training_batches
        self.steps.start, self._start = self._start, 0
        yield from super().__iter__()

    def _layout(self) -> dict[str, Any]:
        assert self.trainer is not None
        return self.layout | {"trainer.accumulate_grad_batches": self.trainer.accumulate_grad_batches}

    def state_dict(self) -> dict[str, Any]:
        """Place within the epoch, and what it refers to."""
        assert self.trainer is not None
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return {
            "processed": progress.processed % max(1, int(self.trainer.num_training_batches)),
            "layout": self._layout(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the stored place.

        Raises:
            UserError: the place lies within an epoch over other data, or otherwise dealt out.
        """
        if state["processed"]:
            stored, now = state["layout"], self._layout()
            sizes = ("data.per_device_batch_size", "trainer.devices")
            if math.prod(stored[size] for size in sizes) == math.prod(now[size] for size in sizes):
                now |= {size: stored[size] for size in sizes}  # the same rows in every micro-batch, dealt out otherwise
            check_layout(stored, now, "stands within an epoch")
        self._start = state["processed"]


def check_layout(stored: dict[str, Any], now: dict[str, Any], stands: str) -> None:
    """Refuses a place in data that are not those of the configuration.

    Raises:
        UserError: something differs.
    """
    remedy = ", or from a checkpoint at the end of an epoch" if "epoch" in stands else ""
    for name, value in stored.items():
        if name == "data" and now[name] != value:
            raise UserError(_other_data(stored["read"], now["read"], stands, remedy))
        if name != "read" and now.get(name) != value:
            raise UserError(
                f"{name}: {now.get(name)!r}, but the checkpoint {stands} with {value!r}; resume with the same "
                f"value{remedy}"
            )


def _other_data(stored: dict[str, Any], now: dict[str, Any], stands: str, remedy: str) -> str:
    """What the checkpoint's run read, and what to do about it."""
    differing = [name for name in stored if now.get(name) != stored[name]]
    anew = f"{remedy}, or start anew from the student's weights (distill export, model.student)"
    if not differing:
        return (
            f"data.dataset: {now['data.dataset']!r} holds other rows than when the checkpoint was written, which "
            f"{stands} of it, or other keys of data made them; restore it{anew}"
        )
    key, *others = differing
    also = "".join(f", {name}: {stored[name]!r} (now {now.get(name)!r})" for name in others)
    return (
        f"{key}: {now.get(key)!r}, but the checkpoint {stands} of rows made with {key}: {stored[key]!r}{also}; resume "
        f"with the same{anew}"
    )
