"""Building a cache of teacher targets for the rows of a run, over ranks, resumable after any kill.

A shard is a fixed set of rows, read in batches of its own, so that its bytes don't depend on who makes it or when:
ranks take turns, one that is there is left alone, and a build that was broken off goes on with the next. Rows that a
finished cache has already are left out, so that data which grew are appended.
"""

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import xxhash
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from distill.curriculum import Schedules
from distill.data.datamodule import DistillationDataModule
from distill.data.rows.table import MicroBatch, PackedRows
from distill.errors import UserError
from distill.models import load
from distill.models.digests import file_digest, tensor_digest, weights_digest
from distill.models.head import lm_head_of
from distill.models.precision import teacher_dtype
from distill.models.quiet import quiet_transformers
from distill.models.trace import four_tokens, merged
from distill.teachers.cache_files import (
    BUILDING,
    HEAD,
    MANIFEST,
    Manifest,
    Shard,
    described_shard,
    is_cache,
    read_manifest,
    save_head,
    trouble,
    write_manifest,
    write_shard,
)
from distill.teachers.cached import find, shelves
from distill.teachers.cached_states import States
from distill.teachers.encodings import Block, Encoding, described
from distill.teachers.online import OnlineTeacher, quantize
from distill.teachers.targets import DenseTargets
from distill.training.build import prepared_teacher
from distill.training.cache_request import (
    Request,
    chosen_encodings,
    hidden_dtype,
    shared_vocabulary,
    states_to_store,
)
from distill.training.options import ModelOptions

SHARD_BYTES = 64 << 20  # a shard has as many batches as this holds
MARGIN = 1.05  # of the disk's room over what is estimated


@dataclass(frozen=True)
class Task:
    """A shard that is to be there.

    Args:
        file: its name.
        part: "training" or "validation".
        rows: where its rows come from.
        indices: of them.
        digests_R2: of them, uint64.
        encoding: of its targets.
    """

    file: str
    part: str
    rows: PackedRows
    indices: list[int]
    digests_R2: np.ndarray
    encoding: Encoding


class CacheBuilder:
    """One rank's part in building a cache.

    Args:
        request: what to build.
        options: of the run.
        trainer: connected, its environment set up.
        data: set up, no stream.
        curriculum: of the run, for temperature and experts per token.
        tell: prints a line.

    Raises:
        UserError: teacher, data or options that cannot be cached, or a folder that holds something else.
    """

    def __init__(
        self, request: Request, options: ModelOptions, trainer: L.Trainer, data: DistillationDataModule,
        curriculum: Schedules, tell: Callable[[str], None],
    ) -> None:  # fmt: skip
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise UserError(
                "trainer.strategy: a sharded teacher cannot be cached yet; use ddp, or a device that holds it"
            )
        if is_cache(options.teacher):
            raise UserError(f"model.teacher: {options.teacher} is a cache itself; name the model that it is of")
        self.request, self.trainer, self.data, self.tell = request, trainer, data, tell
        self.folder = Path(request.output).expanduser()
        self.tokenizer = data.tokenizer if data.tokenizers is None else data.tokenizers.teacher
        device = trainer.strategy.root_device
        dtype = teacher_dtype(options.teacher_dtype, str(trainer.precision), device.type)
        model = load.load_model(options.teacher, dtype=dtype, key="model.teacher", **options.load_options)
        prepared_teacher(options, trainer, model, dtype)
        known = weights_digest(model)
        needs = states_to_store(request, options, model, lm_head_of(model).vocab_size)
        self.needs = merged(needs.values())
        self.teacher = OnlineTeacher(model, options.teacher_top_k)
        if options.teacher_quantization is not None:
            quantize(model)
        self.teacher.to(device)
        self.head = lm_head_of(model)
        embeddings: Any = model.get_input_embeddings()
        shared = shared_vocabulary(options, self.head.vocab_size)
        self.encodings = chosen_encodings(request, options, curriculum.temperature, dtype, shared)
        self.states = States.like(
            self.teacher.trace(four_tokens(device), self.needs), self.needs, hidden_dtype(request)
        )
        self.states.check("what would be stored", needs, curriculum.top_k_experts)
        read = data.read_data()
        self.manifest = Manifest(
            teacher={
                "source": options.teacher,
                "revision": getattr(model.config, "_commit_hash", None),
                "weights": known,
                "embeddings": tensor_digest(embeddings.weight),
                "kind": type(model).__name__,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "vocabulary": self.head.vocab_size,
                "dtype": str(dtype).removeprefix("torch."),
                "top_k": options.teacher_top_k,
                "quantization": options.teacher_quantization,
            },
            tokenizer=read.tokenizer,
            encodings={part: described(encoding) for part, encoding in self.encodings.items()},
            head={"scale": self.head.scale, "softcap": self.head.softcap},
            data=dict(read.read),
            states=self.states.described(),
        )

    def build(self, track: Callable[[Sequence[Task]], Iterable[Task]] = iter) -> Manifest:
        """Makes what is missing; every rank must call it.

        Args:
            track: iterates over the shards of this rank, with a progress bar.

        Raises:
            UserError: the folder holds something else, or the disk is too small.
        """
        before = self._before()
        tasks = self._tasks(before)
        if before.plan and before.plan != self._plan(tasks):
            raise trouble(
                self.folder,
                "was begun for other rows, batches or shards",
                "finish it with the configuration that it was begun with, or remove it",
            )
        missing = [task for task in tasks if not (self.folder / task.file).is_file()]
        self._estimate(tasks, missing)
        self.trainer.strategy.barrier()  # all have looked at the folder before one changes it
        if self.trainer.is_global_zero and tasks:
            self._begin(before, tasks)
        self.trainer.strategy.barrier()
        mine = missing[self.trainer.global_rank :: self.trainer.world_size]
        for task in track(mine):
            self._make(task)
        self.trainer.strategy.barrier()
        finished = before
        if self.trainer.is_global_zero and tasks:
            finished = self._finish(before, tasks)
        return finished

    def _before(self) -> Manifest:
        """What the folder holds already of the same teacher: a finished cache, an unfinished one, or nothing."""
        name = BUILDING if (self.folder / BUILDING).is_file() else MANIFEST
        if not (self.folder / name).is_file():
            there_is = self.folder.iterdir() if self.folder.is_dir() else ()
            if self.folder.is_file() or any(path.name[0] != "." for path in there_is):
                raise UserError(f"--output: {self.folder} exists and is no cache; name another folder or move it away")
            return self.manifest
        there = read_manifest(self.folder, name)
        for key, what in (("weights", "another teacher"), ("dtype", "a teacher in another dtype")):
            if there.teacher[key] != self.manifest.teacher[key]:
                raise trouble(self.folder, f"is of {what}", "name another --output, or remove it")
        if there.tokenizer != self.manifest.tokenizer:
            raise trouble(self.folder, "was made with another tokenizer", "name another --output, or remove it")
        if there.states != self.manifest.states:
            held = States.described_by(there.states)
            raise trouble(
                self.folder,
                f"holds {held}, not {self.states}",
                "name another --output, remove it, or set --states and the losses on layers to what it was made with",
            )
        if there.identity != self.manifest.identity:
            raise trouble(
                self.folder,
                f"holds {there.encodings['training']}, not {self.manifest.encodings['training']}",
                "name another --output, or remove it",
            )
        return replace(self.manifest, files=there.files, shards=there.shards, plan=there.plan)

    def _tasks(self, before: Manifest) -> list[Task]:
        """The shards that must be added, in order; the same on all ranks, and after a kill."""
        sparse, whole = shelves(self.folder, before)
        same = self.encodings["training"] == self.encodings["validation"]
        stored = {"validation": whole.digests(), "training": whole.digests() if same else sparse.digests()}
        tasks: list[Task] = []
        assert self.data.train_rows is not None
        for part, rows in (
            ("training", self.data.train_rows),
            *(("validation", r) for r in self.data.held_out.values()),
        ):
            order = np.argsort(rows.numbers_R(), kind="stable")[: self.request.max_rows]
            wanted_R2 = rows.digests_R2()[order]
            _, first = np.unique(wanted_R2, axis=0, return_index=True)  # a row that comes twice is stored once
            new = np.zeros(len(order), dtype=bool)
            new[first] = True
            new &= find(wanted_R2, stored[part]) < 0
            left, left_R2 = order[new].tolist(), wanted_R2[new]
            size = self._shard_rows(self.encodings[part])
            for at in range(0, len(left), size):
                file = f"shard-{len(before.shards) + len(tasks):05}.safetensors"
                here = slice(at, at + size)
                tasks.append(Task(file, part, rows, left[here], left_R2[here], self.encodings[part]))
        return tasks

    def _plan(self, tasks: list[Task]) -> str:
        """Digest of what decides the bytes of the shards that are to be added."""
        digest = xxhash.xxh3_128(str(self.data.per_device_batch_size).encode())
        for task in tasks:
            digest.update(f"{task.file} {task.part}".encode())
            digest.update(task.digests_R2.tobytes())
        return digest.hexdigest()

    def _shard_rows(self, encoding: Encoding) -> int:
        """Rows of a shard: whole batches."""
        if self.request.shard_rows is not None:
            return self.request.shard_rows
        token_bytes = encoding.record_bytes(self.head.weight.shape[1]) + self.states.bytes
        row_bytes = token_bytes * self.data.sequence_length
        batch = self.data.per_device_batch_size
        return max(1, SHARD_BYTES // (row_bytes * batch)) * batch

    def _rows(self, task: Task) -> Iterator[tuple[np.ndarray, Block, Tensor]]:
        """Each row of a shard: its digest, encoded targets and states of layers."""
        size, digests_R2 = self.data.per_device_batch_size, task.digests_R2
        for at in range(0, len(task.indices), size):
            batch = task.rows.__getitems__(MicroBatch(task.indices[at : at + size], {}))
            tokens_B = np.bincount(batch.teacher.positions // batch.teacher.labels.shape[1], minlength=len(batch.rows))
            tokens = batch.to(self.trainer.strategy.root_device).teacher
            seen = self.teacher.trace(tokens, self.needs)
            states_B = self.states.encode(seen, tokens)
            for row, part in enumerate(tokens.valid(seen.last_BLD).split(tokens_B.tolist())):
                digest = digests_R2[at + row]
                block = task.encoding.encode(DenseTargets(part, self.head), int(digest[0] >> np.uint64(1)))
                yield digest, block.to(torch.device("cpu")), states_B[row]

    @torch.no_grad()
    def _make(self, task: Task) -> None:
        """Writes one shard."""
        digests, blocks, states = zip(*self._rows(task), strict=True)
        write_shard(self.folder / task.file, np.stack(digests), list(blocks), states if self.states.fields else ())

    @torch.no_grad()
    def _estimate(self, tasks: list[Task], missing: list[Task]) -> None:
        """Tells rows, bytes and time before anything is written, by one batch of each part.

        Raises:
            UserError: the disk has no room.
        """
        room, total_bytes, total_s = self.data.per_device_batch_size, 0.0, 0.0
        for part in {task.part: task for task in missing}.values():
            sample = replace(part, indices=part.indices[:room], digests_R2=part.digests_R2[:room])
            list(self._rows(sample))  # what is done once and for all is not in the time
            start = time.perf_counter()
            made = list(self._rows(sample))
            seconds = time.perf_counter() - start
            made_bytes = sum(block.record_NW.numel() + block.stream.numel() + kept.numel() for _, block, kept in made)
            rows = sum(len(task.indices) for task in missing if task.part == part.part)
            total_bytes += rows * (made_bytes / len(made) + 32)
            total_s += rows * seconds / len(made) / self.trainer.world_size
        rows, there = sum(len(task.indices) for task in tasks), len(tasks) - len(missing)
        self.tell(
            f"Cache: {rows:,} rows to add in {len(tasks):,} shards, {there:,} of them there already; about "
            f"{total_bytes / 1e6:,.1f} MB and {total_s:,.0f} s on {self.trainer.world_size} x "
            f"{self.trainer.strategy.root_device.type}."
        )
        if self.states.fields:
            self.tell(f"Each position has {self.states.bytes:,} B of {self.states}.")
        here = next(parent for parent in (self.folder, *self.folder.absolute().parents) if parent.exists())
        free = shutil.disk_usage(here).free
        if missing and free < total_bytes * MARGIN:
            raise UserError(
                f"--output: {self.folder} needs {total_bytes / 1e9:,.2f} GB and the disk has {free / 1e9:,.2f}; give "
                "another folder, a smaller encoding, or --max_rows"
            )

    def _begin(self, before: Manifest, tasks: list[Task]) -> None:
        """Writes that the cache is unfinished, and what every shard will rely on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        before = replace(before, plan=self._plan(tasks))
        if not before.files:
            write_manifest(self.folder, before, BUILDING)
            save_head(self.folder, self.head)
            model = self.teacher.model
            with quiet_transformers():
                model.config.save_pretrained(self.folder)
                model.generation_config.save_pretrained(self.folder)
                self.tokenizer.save_pretrained(self.folder)
            found = sorted(path.name for path in self.folder.iterdir() if path.is_file() and path.name[0] != ".")
            names = [name for name in found if name != BUILDING]
            assert HEAD in names
            before = replace(before, files={name: file_digest(self.folder / name) for name in names})
        write_manifest(self.folder, before, BUILDING)

    def _finish(self, before: Manifest, tasks: list[Task]) -> Manifest:
        """Writes the manifest with the checksums of all shards."""
        begun = read_manifest(self.folder, BUILDING)
        added: list[Shard] = [described_shard(self.folder / task.file, task.part) for task in tasks]
        finished = replace(begun, shards=[*before.shards, *added], plan="")
        write_manifest(self.folder, finished)
        (self.folder / BUILDING).unlink()
        return finished
