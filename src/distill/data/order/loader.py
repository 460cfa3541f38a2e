"""The loaders of a table's micro-batches; the one for training resumes at the micro-batch where a checkpoint was
written."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from distill.data.order.sampler import EveryRowOnce, StepSampler
from distill.data.rows.packing import fingerprint
from distill.data.rows.table import PackedRows, as_is
from distill.errors import UserError
from distill.stop_signals import end_workers_at_exit, leave_signals_to_the_run


@dataclass(frozen=True)
class Reader:
    """How one process reads micro-batches.

    Args:
        batch_size: rows per micro-batch and device.
        workers: processes that read ahead.
        seed: of the order.
        rank: of this process.
        world_size: ranks that share the rows.
        pin: whether batches go to a CUDA device.
    """

    batch_size: int
    workers: int
    seed: int
    rank: int = 0
    world_size: int = 1
    pin: bool = False

    def options(self) -> dict[str, Any]:
        """Of a `DataLoader` whose data set gives whole batches."""
        return {
            "num_workers": self.workers,
            "collate_fn": as_is,
            "pin_memory": self.pin,
            "worker_init_fn": leave_signals_to_the_run,
            # Of its own: the default draws from the global one, so validation or a resumed run would change training.
            "generator": torch.Generator().manual_seed(self.seed),
        }

    def layout(self, read: dict[str, Any], data: str) -> dict[str, Any]:
        """What a place depends on, as plain values by YAML key.

        Args:
            read: what the user asked for.
            data: fingerprint of what was read.
        """
        return {
            "data.seed": self.seed,
            "data.per_device_batch_size": self.batch_size,
            "trainer.devices": self.world_size,
            "read": read,
            "data": data,
        }


class TrainingLoader(DataLoader):
    """What training loaders share: the micro-batch of the epoch that they stand at, and what makes it meaningful.

    The number stored is of micro-batches that were processed rather than handed out, since workers read ahead.

    Args:
        dataset: of whole batches.
        trainer: whose accumulation, limit and progress count; without one, every micro-batch is a step.
        layout: see `Reader.layout`.
        options: of `DataLoader`.
    """

    def __init__(self, dataset: Any, trainer: L.Trainer | None, layout: dict[str, Any], **options: Any) -> None:
        super().__init__(dataset, **options)
        self.trainer, self.layout = trainer, layout
        self._start = 0

    def read(self) -> Iterator[Any]:
        """The batches; an error of a worker is told in its own words, without torch's.

        Raises:
            UserError: a document cannot be read.
        """
        batches = super().__iter__()
        if self.num_workers:
            end_workers_at_exit()
        told = None
        while told is None:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except UserError as error:
                told = str(error).rpartition("UserError: ")[2].strip()
            else:
                yield batch
        raise UserError(told)  # not within the handler: torch's own text would come with it

    def window(self) -> tuple[int, float]:
        """Micro-batches of an optimizer step, and of an epoch at most."""
        if self.trainer is None:
            return 1, float("inf")
        return self.trainer.accumulate_grad_batches, self.trainer.num_training_batches

    def laid_out(self) -> dict[str, Any]:
        """The layout under this trainer."""
        return self.layout | {"trainer.accumulate_grad_batches": self.window()[0]}

    def processed(self) -> int:
        """Micro-batches of the epoch that were trained on."""
        assert self.trainer is not None
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return progress.processed

    def state_dict(self) -> dict[str, Any]:
        """Place within the epoch, and what it refers to."""
        limit = self.window()[1]
        done = self.processed()
        return {"processed": done if limit == math.inf else done % max(1, int(limit)), "layout": self.laid_out()}


class ResumableLoader(TrainingLoader):
    """A training loader that Lightning saves and resumes in the middle of an epoch, to the micro-batch.

    Args:
        dataset: the training rows.
        sampler: of them.
        trainer: see `TrainingLoader`.
        layout: likewise.
        options: of `DataLoader`.
    """

    def __init__(
        self,
        dataset: PackedRows,
        sampler: StepSampler,
        trainer: L.Trainer | None,
        layout: dict[str, Any],
        **options: Any,
    ) -> None:
        super().__init__(dataset, trainer, layout, batch_sampler=sampler, **options)
        self.steps = sampler

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator function: Lightning calls iter() before it sets the epoch and counts the batches.
        self.steps.accumulate, self.steps.limit = self.window()
        self.steps.start, self._start = self._start, 0
        yield from self.read()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the stored place.

        Raises:
            UserError: the place lies within an epoch over other data, or otherwise dealt out.
        """
        if state["processed"]:
            stored, now = state["layout"], self.laid_out()
            sizes = ("data.per_device_batch_size", "trainer.devices")
            if math.prod(stored[size] for size in sizes) == math.prod(now[size] for size in sizes):
                now |= {size: stored[size] for size in sizes}  # the same rows in every micro-batch, dealt out otherwise
            check_layout(stored, now, "stands within an epoch")
        self._start = state["processed"]


def training_loader(
    rows: PackedRows,
    reader: Reader,
    trainer: L.Trainer | None,
    read: dict[str, Any],
    validation_split: float | str,
    parts: tuple[list[int], list[int]] | None,
) -> ResumableLoader:
    """The loader of a table's training rows, in the order of (seed, epoch).

    Args:
        rows: to train on.
        reader: how this process reads.
        trainer: see `TrainingLoader`.
        read: what the user asked for, for an error that says what has changed since a checkpoint was written.
        validation_split: on which depends which rows these are.
        parts: rows of each source, and how many of them an epoch has, see `split_rows`.
    """
    layout = reader.layout(read, fingerprint(rows.table._fingerprint, rows.indices.size, validation_split, parts))
    layout["data.group_by_length"] = rows.shortest
    lengths_R = rows.lengths_R() if rows.shortest else None
    ranks = {"rank": reader.rank, "world_size": reader.world_size}
    sampler = StepSampler(rows.units_R, reader.batch_size, reader.seed, **ranks, parts=parts, lengths_R=lengths_R)
    return ResumableLoader(rows, sampler, trainer, layout, **reader.options(), persistent_workers=reader.workers > 0)


def validation_loader(rows: PackedRows, reader: Reader) -> DataLoader:
    """The loader of validation rows, every one of them once."""
    sampler: Any = EveryRowOnce(rows.units_R, reader.batch_size, reader.rank, reader.world_size)
    return DataLoader(rows, batch_sampler=sampler, **reader.options(), persistent_workers=reader.workers > 0)


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
