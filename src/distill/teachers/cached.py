"""A teacher that is not there: its targets come from a cache on disk, which proves that it belongs to the run.

Before the first step every file is read once and compared with its checksum, and the digest of every row that the run
will read is looked up, so rows may come in any order, in any split over ranks, and be fewer than the cache holds. What
the cache has for another temperature, tokenizer or thinning is refused there.

What losses on layers look at comes from it too, as far as it was built with that; what is not there is refused. Draws
are those of the cache: the same in every epoch, where a live teacher draws anew each step.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from transformers import PreTrainedModel

from distill.batch import Batch
from distill.curriculum import CurriculumState, Schedule
from distill.errors import UserError
from distill.losses.engine.divergence import KDLoss
from distill.models.head import LMHead
from distill.models.trace import Needs, Trace
from distill.teachers.cache_files import Manifest, Shelf, damage, load_head, read_manifest, trouble
from distill.teachers.cached_states import States
from distill.teachers.encodings import Block, Encoding, Hidden, Sampled, TopK, encoding_of
from distill.teachers.source import KnownRows, ReadData, Run, Taught, thinned
from distill.teachers.targets import Targets

# Keys of `data:` in the order in which an error names one that differs: those that change every row first.
TELLING = ("data.packing", "data.sequence_length", "data.tokenizer", "data.chat_template", "data.completion_only_loss")


class CachedTeacher:
    """Serves the targets of a cache; a plain class, so that assigning it to a module registers nothing.

    Args:
        folder: of the cache.
        model: the teacher on the meta device, see `skeleton`.

    Raises:
        UserError: the cache is unfinished, damaged or of a newer format.
    """

    def __init__(self, folder: str, model: PreTrainedModel) -> None:
        self.folder = Path(folder).expanduser()
        self.manifest = read_manifest(self.folder)
        self.model: PreTrainedModel = model.requires_grad_(False).eval()
        self.kd: KDLoss | None = None
        self.student_vocab = 0
        self.training: Encoding = encoding_of(self.manifest.encodings["training"])
        hidden = encoding_of(self.manifest.encodings["validation"])
        assert isinstance(hidden, Hidden)
        self.hidden = hidden
        self.states = States.described_by(self.manifest.states)
        self.head: LMHead | None = None
        self._sparse, self._whole = shelves(self.folder, self.manifest)
        self._sparse_place, self._whole_place = (np.full(0, -1) for _ in range(2))

    def open(self, run: Run) -> None:
        """Proves that the cache serves the run; see `TargetSource`.

        Raises:
            UserError: it does not; says what differs.
        """
        self.kd, self.student_vocab = run.kd, run.student_vocab
        self.states.check(f"the cache {self.folder}", run.needs, run.top_k_experts)
        if run.data is None:
            raise trouble(self.folder, "is addressed by the rows of a DistillationDataModule", "give the trainer one")
        if run.data.training is None:
            raise UserError(
                f"data.streaming: true, but a window of a stream has no row number by which the cache {self.folder} "
                "could be read; set it to false, or give a live teacher"
            )
        if run.data.tokenizer != self.manifest.tokenizer:
            raise trouble(
                self.folder, "was made with another tokenizer than data.tokenizer", "use that one, or build it anew"
            )
        if run.kd is not None:
            self._check_thinning(run.kd)
            self._check_temperature(run.temperature)
        if (wrong := damage(self.folder, self.manifest)) is not None:
            raise trouble(self.folder, wrong, "copy it again, or remove the folder and build it anew")
        self.head = load_head(self.folder, self.manifest)
        self._find_rows(run.data, training=run.kd is not None or bool(run.needs))

    def _check_thinning(self, kd: KDLoss) -> None:
        """Refuses other targets than `kd_loss` would learn from with the teacher at hand."""
        made = self.training
        if isinstance(made, TopK) and (kd.top_k is None or kd.top_k > made.k):
            raise UserError(
                f"model.kd_loss.top_k: {kd.top_k}, but the cache {self.folder} holds {made.k} ids a token; set it to "
                "at most that, or build a cache for it"
            )
        if isinstance(made, Sampled) and kd.samples != made.draws:
            raise UserError(
                f"model.kd_loss.samples: {kd.samples}, but the cache {self.folder} holds {made.draws} draws a token; "
                "set it to that, or build a cache for it"
            )
        if isinstance(made, TopK | Sampled):
            assert self.manifest.teacher["vocabulary"] >= made.vocab_size
            shared = min(self.student_vocab, self.manifest.teacher["vocabulary"])
            if shared != made.vocab_size:
                raise trouble(
                    self.folder,
                    f"was made for {made.vocab_size} ids and the student shares {shared} with the teacher",
                    "build one for this student",
                )

    def _check_temperature(self, schedule: Schedule) -> None:
        """Refuses a schedule that leaves the temperature of sparse targets."""
        made = self.training
        if isinstance(made, Hidden):
            return
        assert isinstance(made, TopK | Sampled)
        values = [knot[1] for knot in schedule] if isinstance(schedule, list) else [schedule]
        if any(abs(value - made.temperature) > 1e-6 * made.temperature for value in values):
            raise UserError(
                f"curriculum.temperature: {schedule}, but the {made.name} targets of the cache {self.folder} were "
                f"made at {made.temperature:g}; set it to that constant, or build with --encoding hidden"
            )

    def _find_rows(self, data: ReadData, training: bool) -> None:
        """Looks up where each row stands, by number; training rows where something of them will be read."""
        assert data.training is not None
        whole_S2 = self._whole.digests()
        for rows in data.validation:
            self._whole_place = self._found(rows, whole_S2, self._whole_place, data, "validation")
        if not training:
            return
        if isinstance(self.training, Hidden):
            self._whole_place = self._found(data.training, whole_S2, self._whole_place, data, "training")
        else:
            stored_S2 = self._sparse.digests()
            self._sparse_place = self._found(data.training, stored_S2, self._sparse_place, data, "training")

    def _found(
        self, rows: KnownRows, stored_S2: np.ndarray, place: np.ndarray, data: ReadData, what: str
    ) -> np.ndarray:
        """Places by number with those of some rows among stored ones added.

        Raises:
            UserError: rows that are not stored; what has changed among the keys of `data:` is named.
        """
        numbers_R, place_R = rows.numbers_R(), find(rows.digests_R2(), stored_S2)
        if missing := int((place_R < 0).sum()):
            self._refuse_missing(data, what, missing, len(numbers_R))
        longer = np.full(max(len(place), int(numbers_R.max(initial=-1)) + 1), -1)
        longer[: len(place)] = place
        longer[numbers_R] = place_R
        return longer

    def _refuse_missing(self, data: ReadData, what: str, missing: int, rows: int) -> NoReturn:
        ours, theirs = dict(data.read), self.manifest.data
        differing = [key for key in ours if key in theirs and theirs[key] != ours[key]]
        differing.sort(key=lambda key: TELLING.index(key) if key in TELLING else len(TELLING))
        if differing and missing == rows:
            key = differing[0]
            raise UserError(
                f"{key}: {ours[key]!r}, but the cache {self.folder} was made with {theirs[key]!r}; use that, or build "
                "it anew"
            )
        also = f" ({differing[0]} was {theirs[differing[0]]!r})" if differing else ""
        raise UserError(
            f"data.dataset: {ours.get('data.dataset')!r} gives {rows:,} {what} rows, of which the cache {self.folder} "
            f"lacks {missing:,}{also}; run distill cache --output {self.folder} with this configuration to add them"
        )

    def to(self, device: torch.device) -> None:
        """Moves the head to the student's device."""
        assert self.head is not None
        head, bias = self.head, self.head.bias
        self.head = LMHead(head.weight.to(device), None if bias is None else bias.to(device), head.scale, head.softcap)

    @torch.no_grad()
    def __call__(self, batch: Batch, needs: Needs, state: CurriculumState, kd: bool) -> Taught:
        """Reads the rows of a batch from disk; see `TargetSource`."""
        assert self.head is not None
        if (places := _at(self._whole_place, batch.rows)) is not None:
            block = self._read(self._whole, places, self.hidden)
            whole = self.hidden.decode(block.to(_device(batch)), self.head)
            targets = thinned(whole, self.kd, self.student_vocab, state, batch) if kd else None
            return Taught(self._trace(self._whole, places, batch, needs), whole, targets)
        places = _at(self._sparse_place, batch.rows)
        return Taught(self._trace(self._sparse, places, batch, needs), None, self._learned(batch) if kd else None)

    def _trace(self, shelf: Shelf, places: Sequence[int] | None, batch: Batch, needs: Needs) -> Trace:
        """The states of layers of some rows that are needed; nothing is read where none are."""
        if needs == Needs():
            return Trace(torch.zeros(0), {}, {})
        assert places is not None, "rows that the run did not name"
        rows, length = batch.teacher.input_ids.shape
        read_BLW = shelf.read_states(places, (rows, length), self.states.bytes)
        return self.states.decode(read_BLW.to(_device(batch), non_blocking=True), needs)

    def stored(self, batch: Batch) -> Targets:
        """What the cache holds of training rows, as the engine learns from it; whole states where it holds those."""
        assert self.head is not None
        if not isinstance(self.training, Hidden):
            return self._learned(batch)
        places = _at(self._whole_place, batch.rows)
        assert places is not None
        return self.training.decode(self._read(self._whole, places, self.training).to(_device(batch)), self.head)

    def _read(self, shelf: Shelf, places: Sequence[int], encoding: Encoding) -> Block:
        """The encoded tokens of some rows, none for the row that only keeps ranks in step."""
        if places:
            return shelf.read(places)
        assert self.head is not None
        width = encoding.record_bytes(self.head.weight.shape[1])
        return Block(torch.zeros(0, width, dtype=torch.uint8), torch.zeros(0, dtype=torch.uint8))

    def _learned(self, batch: Batch) -> Targets:
        """Sparse targets, cut to as many ids as `kd_loss` asks for."""
        assert self.head is not None
        places = _at(self._sparse_place, batch.rows)
        assert places is not None, "rows that the run did not name"
        block = self._read(self._sparse, places, self.training).to(_device(batch))
        if isinstance(self.training, TopK):
            assert self.kd is not None
            assert self.kd.top_k is not None
            return self.training.first(self.training.decode(block, self.head), self.kd.top_k)
        return self.training.decode(block, self.head)


def shelves(folder: Path, manifest: Manifest) -> tuple[Shelf, Shelf]:
    """Rows in the encoding of training, and rows as whole states, which may be the same ones."""
    sparse = [shard for shard in manifest.shards if shard.encoding == "training"]
    same = manifest.encodings["training"] == manifest.encodings["validation"]
    whole = [shard for shard in manifest.shards if same or shard.encoding == "validation"]
    return Shelf(folder, sparse), Shelf(folder, whole)


def find(wanted_R2: np.ndarray, stored_S2: np.ndarray) -> np.ndarray:
    """Index of each wanted digest among the stored ones, -1 for none, int64 [R]."""
    if not len(stored_S2):
        return np.full(len(wanted_R2), -1)
    order_S = np.argsort(stored_S2[:, 0], kind="stable")
    at_R = np.searchsorted(stored_S2[order_S, 0], wanted_R2[:, 0]).clip(max=len(order_S) - 1)
    place_R = order_S[at_R]
    return np.where((stored_S2[place_R] == wanted_R2).all(-1), place_R, -1)


def _device(batch: Batch) -> torch.device:
    return batch.teacher.positions.device


def _at(place: np.ndarray, rows: Sequence[int]) -> list[int] | None:
    """Places of rows by number, None where one has none."""
    if any(row >= len(place) or place[row] < 0 for row in rows):
        return None
    return [int(place[row]) for row in rows]
