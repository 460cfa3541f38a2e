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
from distill.data.documents.sources import Source, sources_of, validation_sources
from distill.data.order.loader import Reader, ResumableLoader, training_loader, validation_loader
from distill.data.order.mixing import split_rows
from distill.data.order.stream import Stream, open_streams, validation_rows
from distill.data.order.stream_loader import StreamLoader, stream_loader
from distill.data.rows.packing import Packer, encoder_of, features, fingerprint, pack
from distill.data.rows.statistics import describe_read, describe_rows, describe_stream, describe_table
from distill.data.rows.table import PackedRows
from distill.errors import UserError
from distill.models.load import load_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset

STREAM_VALIDATION = 256  # rows to validate on where a stream could give any number


class DistillationDataModule(L.LightningDataModule):
    """Text, conversations, completions or tokens for causal language models, packed with the teacher's tokenizer.

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
        chat_template: Jinja file, or template, for conversations; null = the tokenizer's.
        chat_template_kwargs: further variables of the template, such as `enable_thinking`.
        validation_split: fraction of the rows to hold out, chosen by `seed`, of a stream's documents by their content;
            or a split of the hub data set; or another local source.
        tokenizer: source of the tokenizer; by default the teacher's.
        sequence_length: tokens per row. Text that is longer goes on in the next row, other documents are cut.
        packing: put documents together into full rows; otherwise each starts a row of its own.
        group_by_length: without packing, form steps of rows of about one length and pad to the longest of a batch.
        streaming: read while training; needs `trainer.max_steps`.
        shuffle_buffer: of a stream, documents that are read, packed and shuffled at once.
        per_device_batch_size: rows per micro-batch and device.
        num_workers: processes that read ahead.
        seed: of the held-out rows and of the order of training.
        max_sequences: use this many training rows at most.
        max_validation_sequences: use this many validation rows at most; null = all, of a stream 256.
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
        self.dataset, self.validation_split, self.tokenizer_source = dataset, validation_split, tokenizer
        self.sequence_length, self.packing, self.group_by_length = sequence_length, packing, group_by_length
        self.streaming, self.shuffle_buffer = streaming, shuffle_buffer
        self.per_device_batch_size, self.num_workers, self.seed = per_device_batch_size, num_workers, seed
        self.max_sequences, self.max_validation_sequences = max_sequences, max_validation_sequences
        self.trust_remote_code = trust_remote_code
        self.tokenizer: Any = None
        self.train_rows: PackedRows | None = None
        self.validation_rows: PackedRows | None = None
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
        if not isinstance(self.validation_split, str) and not 0 < self.validation_split < 1:
            raise UserError(
                f"data.validation_split: {self.validation_split}; give a fraction between 0 and 1, or a split's name"
            )
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
            tables, held_out = _joined(tables), _joined(held_out)
        split = split_rows(
            [table.num_rows for table in tables],
            [table.num_rows for table in held_out] or float(self.validation_split),
            self._weights(),
            self.seed,
            (self.max_sequences, self.max_validation_sequences),
        )
        self._parts = split.parts
        self.train_rows = self._rows(_joined(tables)[0], split.train)
        self.validation_rows = self._rows(_joined(held_out or tables)[0], split.validation)
        epoch = sum(split.parts[1]) if split.parts is not None else len(self.train_rows)
        for line in (*lines, describe_rows(self.train_rows, self.validation_rows, epoch)):
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
        if self.tokenizer is None:
            source = self.tokenizer_source or getattr(module, "teacher_source", None)
            if source is None:
                raise UserError("data.tokenizer: null, and there is no teacher to take it from; name a model source")
            teachers = getattr(module, "load_options", {}) if self.tokenizer_source is None else {}
            trusted = self.trust_remote_code or teachers.get("trust_remote_code", False)
            self.tokenizer = load_tokenizer(source, trust_remote_code=trusted)

    def _weights(self) -> list[float] | None:
        return [s.weight for s in self.sources if s.weight is not None] or None

    def _tables(self) -> tuple[list["Dataset"], list["Dataset"], list[str]]:
        """Packed rows of each source to train on and, where they come from elsewhere, to validate on; statistics."""
        weights = self._weights()
        lines: list[str] = []

        def packed(source: Source, key: str, what: str) -> "Dataset":
            documents = load_documents(source.dataset, **source.options(), key=key, tell=lines.append)
            place = partial(place_of, source.dataset, config=source.dataset_config, split=source.split or "train")
            self.conversations |= has_turns(documents.column_names, documents.features)
            rows = pack(documents, self.tokenizer, self.sequence_length, self.packing, self.chat, key, place)
            form = form_of(documents.column_names)
            lines.append(describe_table(what, documents, rows, form, self.sequence_length))
            return rows

        whats = [f"{weight / sum(weights):.1%} of the rows from " for weight in weights] if weights else []
        whats = whats or [""] * len(self.sources)
        tables = [packed(source, "data.dataset", what) for source, what in zip(self.sources, whats, strict=True)]
        held_out = validation_sources(self.sources, self.validation_split)
        return tables, [packed(*where, "for validation ") for where in held_out], lines

    def _rows(self, table: "Dataset", indices: np.ndarray) -> PackedRows:
        return PackedRows(table, indices, self.sequence_length, self._pad_id(), self.group_by_length)

    def _pad_id(self) -> int:
        return next(i for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0) if i is not None)

    def _setup_streams(self) -> None:
        from datasets import Dataset

        packer = Packer(encoder_of(self.tokenizer, self.chat), self.sequence_length, self.packing)
        held_out = 0.0 if isinstance(self.validation_split, str) else self.validation_split
        opened = partial(open_streams, packer=packer, block=self.shuffle_buffer, seed=self.seed, tell=rank_zero_info)
        self.streams = opened([(source, "data.dataset") for source in self.sources], held_out=held_out)
        for stream in self.streams:
            self.conversations |= has_turns(list(stream.columns), stream.documents.features)
            rank_zero_info(describe_stream(*stream.first_block(), form_of(list(stream.columns)), self.sequence_length))
        validating = opened(validation_sources(self.sources, self.validation_split)) or self.streams
        rows = validation_rows(validating, self.max_validation_sequences or STREAM_VALIDATION)
        if not rows:
            raise UserError(
                f"data.validation_split: {self.validation_split} of the stream holds no rows; give a larger fraction, "
                "or a split or file of its own"
            )
        self.validation_rows = self._rows(Dataset.from_list(rows, features=features()), np.arange(len(rows)))
        targets = self.validation_rows.units_R["tokens"].sum()
        rank_zero_info(f"Data: {len(rows):,} validation rows ({targets:,} targets).")

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
            made_of = [sources, self.packing, self.sequence_length, self.validation_split]
            self._stream_loader = stream_loader(self.streams, reader, self.trainer, read, made_of, self._pad_id())
            return self._stream_loader
        assert self.train_rows is not None
        return training_loader(self.train_rows, reader, self.trainer, read, self.validation_split, self._parts)

    def _read(self) -> dict[str, Any]:
        """What the rows were made of, for an error that says what has changed since a checkpoint was written."""
        names = ("dataset", "validation_split", "sequence_length", "packing", "max_sequences")
        read = {f"data.{name}": getattr(self, name) for name in names}
        first = asdict(self.sources[0])  # all that parts of a mixture differ in stands in data.dataset
        read |= {f"data.{name}": first[name] for name in first.keys() - {"dataset", "weight"}}
        return read | {
            "data.tokenizer": self.tokenizer_source,
            "data.chat_template": self.chat.template and fingerprint(self.chat.template),
            "data.completion_only_loss": self.chat.completion_only_loss,
            "data.chat_template_kwargs": dict(self.chat.template_options),
        }

    def val_dataloader(self) -> DataLoader:
        """Every validation row once."""
        assert self.validation_rows is not None
        self._check()
        return validation_loader(self.validation_rows, self._reader())

    def test_dataloader(self) -> DataLoader:
        """The validation rows."""
        return self.val_dataloader()


def _joined(tables: list["Dataset"]) -> list["Dataset"]:
    """The tables as one."""
    from datasets import concatenate_datasets

    return tables if len(tables) < 2 else [concatenate_datasets(tables)]
