"""The data of a distillation run: documents in, batches out that carry the unit counts of their optimizer step.

Tables are packed once into a cache and read by row number; streams are packed while they train, so that a stream needs
`trainer.max_steps`, and takes its validation rows from elsewhere or by content.
"""

from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from distill.data.documents.chat import Chat, read_template
from distill.data.documents.files import load_documents, place_of
from distill.data.documents.forms import FormOption, form_of, has_turns
from distill.data.documents.sources import Source, sources_of
from distill.data.documents.validation_sets import ValidationSet, validation_sets
from distill.data.order.loader import Reader, ResumableLoader, training_loader, validation_loader
from distill.data.order.mixing import Split, split_rows
from distill.data.order.stream import Stream, open_streams, validation_rows
from distill.data.order.stream_loader import StreamLoader, stream_loader
from distill.data.rows.packing import Packer, fingerprint, pack_with
from distill.data.rows.statistics import (
    describe_held_out,
    describe_read,
    describe_rows,
    describe_stream,
    describe_table,
)
from distill.data.rows.table import PackedRows, joined
from distill.data.tokenizers import Tokenizers, load_tokenizers
from distill.errors import UserError
from distill.models.digests import tokenizer_digest
from distill.teachers.source import ReadData

if TYPE_CHECKING:
    from datasets import Dataset

STREAM_VALIDATION = 256  # rows to validate on where a stream could give any number


class DistillationDataModule(L.LightningDataModule):
    """Text, conversations, completions or tokens for causal language models, packed with the tokenizers of both.

    Args:
        dataset: hub name, local file (text, JSON, JSON lines, Parquet, CSV), folder, glob or package://name/path,
            or a list of them. A text file is one document. A list of `{dataset: ..., weight: ...}` is a mixture whose
            weights are shares of rows, so of tokens where rows are packed; each part may set the next five keys.
        dataset_config: configuration of a hub data set.
        split: split of a hub data set to train on; slices such as `train[:1%]` work.
        text_column: column that holds the text, in tables.
        messages_column: column that holds conversations, lists of messages with role and content.
        format: form of the documents; auto = by their columns: messages; prompt and completion (texts, or lists of
            messages); input_ids, with labels or not; else text.
        completion_only_loss: of conversations and completions, only what the model has to say is a target.
        chat_template: Jinja file, or template, for conversations; null = the tokenizer's. A teacher with a tokenizer of
            its own has its own.
        chat_template_kwargs: further variables of the template, such as `enable_thinking`.
        validation_split: fraction of the rows to hold out, chosen by `seed`, of a stream's documents by their content;
            or a split of the hub data set; or another local source.
        validation: several sets in its place, name -> the same (a fraction once at most), or a source with the keys of
            a part. Metrics of each are called `val/NAME/...`; totals, and the names without one, are of the first.
        tokenizer: source of the tokenizer, of the teacher's where the student has its own; by default the teacher's.
        sequence_length: tokens per row. Text that is longer goes on in the next row, other documents are cut.
        packing: put documents together into full rows; otherwise each starts a row of its own.
        group_by_length: without packing, form steps of rows of about one length and pad to the longest of a batch.
        streaming: read while training; needs `trainer.max_steps`.
        shuffle_buffer: of a stream, documents that are read, packed and shuffled at once.
        per_device_batch_size: rows per micro-batch and device.
        num_workers: processes that read ahead.
        seed: of the held-out rows and of the order of training.
        max_sequences: use this many training rows at most.
        max_validation_sequences: use this many rows of a validation set at most; null = all, of a stream 256.
        trust_remote_code: run code that comes with `tokenizer`; the teacher's own goes by `model.trust_remote_code`.

    Raises:
        UserError: an option out of range; later, in `prepare_data`, bad or missing data.
    """

    def __init__(
        self,
        dataset: str | list[str | dict[str, Any]],
        dataset_config: str | None = None,
        split: str = "train",
        text_column: str = "text",
        messages_column: str = "messages",
        format: FormOption = "auto",
        completion_only_loss: bool = True,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        validation_split: float | str = 0.05,
        validation: dict[str, Any] | None = None,
        tokenizer: str | None = None,
        sequence_length: int = 512,
        packing: bool = True,
        group_by_length: bool = False,
        streaming: bool = False,
        shuffle_buffer: int = 1000,
        per_device_batch_size: int = 4,
        num_workers: int = 0,
        seed: int = 0,
        max_sequences: int | None = None,
        max_validation_sequences: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.dataset, self.validation_split, self.validation = dataset, validation_split, validation
        self.tokenizer_source = tokenizer
        self.sequence_length, self.packing, self.group_by_length = sequence_length, packing, group_by_length
        self.streaming, self.shuffle_buffer = streaming, shuffle_buffer
        self.per_device_batch_size, self.num_workers, self.seed = per_device_batch_size, num_workers, seed
        self.max_sequences, self.max_validation_sequences = max_sequences, max_validation_sequences
        self.trust_remote_code = trust_remote_code
        self.student_tokenizer: Any = None  # where there is no module to name one
        self.tokenizers: Tokenizers | None = None
        self.tokenizer: Any = None  # of the student's side
        self.train_rows: PackedRows | None = None
        self.validation_rows: PackedRows | None = None  # of the first set
        self.held_out: dict[str, PackedRows] = {}  # name -> rows, of all sets
        self.streams: list[Stream] = []
        self.conversations = False  # whether any documents are rendered by a chat template
        self._stream_loader: StreamLoader | None = None
        self._parts: tuple[list[int], list[int]] | None = None
        self._check_options()
        self.sources = sources_of(
            dataset,
            dataset_config=dataset_config,
            split=split,
            text_column=text_column,
            messages_column=messages_column,
            format=format,
        )
        self.chat = Chat(read_template(chat_template), chat_template_kwargs or {}, completion_only_loss)

    def _check_options(self) -> None:
        for name, least in (
            ("sequence_length", 2),
            ("per_device_batch_size", 1),
            ("num_workers", 0),
            ("seed", 0),
            ("shuffle_buffer", 1),
            ("max_sequences", 1),
            ("max_validation_sequences", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"data.{name}: {value}; give {least} or more")
        if self.validation is not None and self.validation_split != 0.05:
            raise UserError(
                f"data.validation_split: {self.validation_split} beside data.validation; name it there as a set"
            )
        self.validation_sets: list[ValidationSet] = validation_sets(self.validation_split, self.validation)
        if self.group_by_length and (self.packing or self.streaming):
            other = "packing" if self.packing else "streaming"
            raise UserError(f"data.group_by_length: true with data.{other} true groups nothing; set one to false")
        if self.streaming and self.max_sequences is not None:
            raise UserError(
                f"data.max_sequences: {self.max_sequences} of a stream is unknown; limit trainer.max_steps instead"
            )

    def prepare_data(self) -> None:
        """Download, tokenise and pack into the cache, on one process per node."""
        self._check()
        if not self.streaming:
            self._tables()

    def setup(self, stage: str | None = None) -> None:
        """Open the cached rows and split them, or the streams."""
        if self.validation_rows is not None:
            return
        self._check()
        if self.streaming:
            self._setup_streams()
            return
        tables, held_out, lines = self._tables()
        if not self._weights():
            tables, held_out = joined(tables), {name: joined(own) for name, own in held_out.items()}
        limits = (self.max_sequences, self.max_validation_sequences)
        splits: list[Split] = []
        numbered = sum(table.num_rows for table in tables)  # rows of other tables go on counting there
        for one in self.validation_sets:
            own = held_out[one.name]
            kept: list[int] | float = one.share or [table.num_rows for table in own]
            sizes = [table.num_rows for table in tables]
            splits.append(split_rows(sizes, kept, self._weights(), self.seed, limits, one.key))
            self.held_out[one.name] = self._rows(joined(own or tables)[0], splits[-1].validation, numbered * bool(own))
            numbered += sum(table.num_rows for table in own)
        holding = next((place for place, one in enumerate(self.validation_sets) if one.share is not None), 0)
        split = splits[holding]
        self._parts = split.parts
        self.train_rows = self._rows(joined(tables)[0], split.train)
        self.validation_rows = self.held_out[self.validation_sets[0].name]
        epoch = sum(split.parts[1]) if split.parts is not None else len(self.train_rows)
        for line in (*lines, *describe_rows(self.train_rows, self.held_out, epoch)):
            rank_zero_info(line)

    def _check(self) -> None:
        """Loads the tokenizer, once, and refuses what trainer and models cannot do."""
        module = self.trainer.lightning_module if self.trainer is not None else None
        context = getattr(module, "max_context", None)
        if context is not None and self.sequence_length > context:
            raise UserError(
                f"data.sequence_length: {self.sequence_length} exceeds the {context} tokens that the models were built "
                "for; lower it"
            )
        if self.streaming and self.trainer is not None and self.trainer.training and self.trainer.max_steps < 1:
            raise UserError("data.streaming: true gives data without an end; set trainer.max_steps")
        if self.tokenizers is None:
            named = (self.tokenizer_source, self.trust_remote_code, self.student_tokenizer)
            self.tokenizers = load_tokenizers(module, *named)
            self.tokenizer = self.tokenizers.student

    def _weights(self) -> list[float] | None:
        return [s.weight for s in self.sources if s.weight is not None] or None

    def _tables(self) -> tuple[list["Dataset"], dict[str, list["Dataset"]], list[str]]:
        """Packed rows of each source to train on and, where they come from elsewhere, of each set; statistics."""
        weights = self._weights()
        lines: list[str] = []

        def packed(source: Source, key: str, what: str) -> "Dataset":
            documents = load_documents(source.dataset, **source.options(), key=key, tell=lines.append)
            place = partial(place_of, source.dataset, config=source.dataset_config, split=source.split or "train")
            self.conversations |= has_turns(documents.column_names, documents.features)
            rows = pack_with(self._packer(), documents, key, place)
            form = form_of(documents.column_names)
            lines.append(describe_table(what, documents, rows, form, self.sequence_length))
            return rows

        whats = [f"{weight / sum(weights):.1%} of the rows from " for weight in weights] if weights else []
        whats = whats or [""] * len(self.sources)
        tables = [packed(source, "data.dataset", what) for source, what in zip(self.sources, whats, strict=True)]
        held_out = {
            one.name: [packed(*where, f"for validation{one.name and ' on ' + one.name} ") for where in own]
            for one, own in self._own_sources()
        }
        return tables, held_out, lines

    def _own_sources(self) -> list[tuple[ValidationSet, list[tuple[Source, str]]]]:
        """Each validation set with the sources that it has for itself."""
        return [(one, one.sources(self.sources)) for one in self.validation_sets]

    def _share(self) -> float | str:
        """On which depends which rows are trained on."""
        if self.validation is None:
            return self.validation_split
        return next((one.share for one in self.validation_sets if one.share is not None), 0.0)

    def _rows(self, table: "Dataset", indices: np.ndarray, first: int = 0) -> PackedRows:
        assert self.tokenizers is not None
        sides = (self.tokenizers.pad_id, self.group_by_length, first, self.tokenizers.pairing)
        return PackedRows(table, indices, self.sequence_length, *sides)

    def _packer(self) -> Packer:
        assert self.tokenizers is not None
        return self.tokenizers.packer(self.chat, self.sequence_length, self.packing)

    def read_data(self) -> ReadData:
        """What the run reads, as far as a teacher's targets depend on it; after `setup`."""
        assert self.tokenizers is not None
        rows = (self.train_rows, tuple(self.held_out.values()))
        return ReadData(tokenizer_digest(self.tokenizers.teacher), self._read(), *rows)

    def _setup_streams(self) -> None:
        from datasets import Dataset

        packer = self._packer()
        held_out = next((one.share for one in self.validation_sets if one.share is not None), 0.0)
        opened = partial(open_streams, packer=packer, block=self.shuffle_buffer, seed=self.seed, tell=rank_zero_info)
        self.streams = opened([(source, "data.dataset") for source in self.sources], held_out=held_out)
        for stream in self.streams:
            self.conversations |= has_turns(list(stream.columns), stream.documents.features)
            rank_zero_info(describe_stream(*stream.first_block(), form_of(list(stream.columns)), self.sequence_length))
        for one, own in self._own_sources():
            rows = validation_rows(opened(own) or self.streams, self.max_validation_sequences or STREAM_VALIDATION)
            if not rows:
                raise UserError(
                    f"{one.key}: {one.given} of the stream holds no rows; give a larger fraction, or a split or file "
                    "of its own"
                )
            found = self._rows(Dataset.from_list(rows, features=packer.features()), np.arange(len(rows)))
            self.held_out[one.name] = found
            rank_zero_info(f"Data: {describe_held_out(one.name, found)}.")
        self.validation_rows = self.held_out[self.validation_sets[0].name]

    def teardown(self, stage: str) -> None:
        """Tells what was read of streams."""
        if stage == "fit" and self._stream_loader is not None:
            rank_zero_info(describe_read(self._stream_loader.counts()))

    def _reader(self) -> Reader:
        """How this process reads, once it is sure that Lightning won't deal out the rows a second time."""
        trainer = self.trainer
        ranks: dict[str, Any] = {}
        if trainer is not None:
            if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
                raise UserError(
                    "trainer.use_distributed_sampler: true deals out rows that are dealt out already; set it to false"
                )
            ranks = {"rank": trainer.global_rank, "world_size": trainer.world_size}
            ranks["pin"] = trainer.strategy.root_device.type == "cuda"
        return Reader(self.per_device_batch_size, self.num_workers, self.seed, **ranks)

    def train_dataloader(self) -> ResumableLoader | StreamLoader:
        """Training rows in the order of (seed, epoch), or the streams; resumable anywhere."""
        if overfit := getattr(self.trainer, "overfit_batches", 0):
            raise UserError(
                f"trainer.overfit_batches: {overfit} would reorder the rows; set data.max_sequences instead"
            )
        self._check()
        reader, read = self._reader(), self._read()
        if self.streaming:
            sources = [repr(source) for source in self.sources]
            made_of = [sources, self.packing, self.sequence_length, self._share()]
            assert self.tokenizers is not None
            pads = (self.tokenizers.pad_id, self.tokenizers.pairing)
            self._stream_loader = stream_loader(self.streams, reader, self.trainer, read, made_of, *pads)
            return self._stream_loader
        assert self.train_rows is not None
        return training_loader(self.train_rows, reader, self.trainer, read, self._share(), self._parts)

    def _read(self) -> dict[str, Any]:
        """What the rows were made of, for an error that says what has changed since a checkpoint was written."""
        names = ("dataset", "validation_split", "sequence_length", "packing", "max_sequences")
        read = {f"data.{name}": getattr(self, name) for name in names}
        first = asdict(self.sources[0])  # all that parts of a mixture differ in stands in data.dataset
        read |= {f"data.{name}": first[name] for name in first.keys() - {"dataset", "weight"}}
        if self.validation is not None:
            read["data.validation"] = self.validation
        return read | {
            "data.tokenizer": self.tokenizer_source,
            "data.chat_template": self.chat.template and fingerprint(self.chat.template),
            "data.completion_only_loss": self.chat.completion_only_loss,
            "data.chat_template_kwargs": dict(self.chat.template_options),
        }

    def val_dataloader(self) -> DataLoader | dict[str, DataLoader]:
        """Every validation row once, a loader for each set by its name where they have names."""
        assert self.validation_rows is not None
        self._check()
        loaders = {name: validation_loader(rows, self._reader()) for name, rows in self.held_out.items()}
        return loaders if self.validation is not None else loaders[""]

    def test_dataloader(self) -> DataLoader | dict[str, DataLoader]:
        """The validation rows."""
        return self.val_dataloader()
