"""The data of a distillation run: text in, batches out that carry the unit counts of their optimizer step.

All batches have one shape and pad on the right. Packed rows keep their documents apart through `position_ids` alone,
from which transformers derives the attention mask; the price is that models must be called without an attention mask
and without a cache where `packed` is true.

Letters: B rows of a batch, L sequence length, N valid tokens of a batch.
"""

from collections.abc import Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from datasets import Dataset
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from distill.data.packing import IGNORE, fingerprint, pack
from distill.data.sampler import EveryRowOnce, MicroBatch, ResumableLoader, StepSampler
from distill.data.text import load_documents, local_files
from distill.errors import UserError
from distill.models import load_tokenizer


class PackedRows(torch.utils.data.Dataset):
    """Some rows of a packed table, read as whole batches.

    Args:
        table: see `pack`.
        indices: which rows.
        sequence_length: L, to which batches are padded.
        pad_id: token that pads.
    """

    def __init__(self, table: Dataset, indices: np.ndarray, sequence_length: int, pad_id: int) -> None:
        self.table = table.with_format("numpy")
        self.indices, self.sequence_length, self.pad_id = indices, sequence_length, pad_id
        self.units_R = {name: np.asarray(self.table[name][:])[indices] for name in ("tokens", "queries")}

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.table[int(self.indices[index])]

    def __getitems__(self, micro_batch: MicroBatch) -> dict[str, Any]:
        """The batch that a sampler asks for; the units travel with the request."""
        rows = [self[index] for index in micro_batch.indices]
        return collate(rows, self.sequence_length, self.pad_id, micro_batch.units)


def collate(rows: Sequence[dict[str, Any]], sequence_length: int, pad_id: int, units: dict[str, int]) -> dict[str, Any]:
    """A batch of packed rows, or one dummy row without labels where there are none.

    Args:
        rows: with input_ids, labels, document_lengths and bytes.
        sequence_length: L.
        pad_id: token that pads on the right.
        units: passed through.

    Returns:
        input_ids, labels, attention_mask and position_ids, int64 [B, L]; positions, int64 [N], flat indices b L + t of
        the valid tokens; packed, whether a row holds several documents (padding aside); units; bytes behind the labels.
    """
    shape = (max(1, len(rows)), sequence_length)
    input_ids_BL, labels_BL = np.full(shape, pad_id), np.full(shape, IGNORE)
    attention_mask_BL, position_ids_BL = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for b in range(shape[0]):
        lengths = np.asarray(rows[b]["document_lengths"], dtype=np.int64) if rows else np.zeros(0, dtype=np.int64)
        used = int(lengths.sum())
        if rows:
            input_ids_BL[b, :used], labels_BL[b, :used] = rows[b]["input_ids"], rows[b]["labels"]
        attention_mask_BL[b, :used] = 1
        segments = np.append(lengths, sequence_length - used)  # padding is a document of its own
        position_ids_BL[b] = np.arange(sequence_length) - np.repeat(np.cumsum(segments) - segments, segments)
    shifted_BL = np.roll(labels_BL, -1, axis=1)
    shifted_BL[:, -1] = IGNORE
    return {
        "input_ids": torch.from_numpy(input_ids_BL),
        "labels": torch.from_numpy(labels_BL),
        "attention_mask": torch.from_numpy(attention_mask_BL),
        "position_ids": torch.from_numpy(position_ids_BL),
        "positions": torch.from_numpy(np.flatnonzero(shifted_BL != IGNORE)),
        "packed": any(len(row["document_lengths"]) > 1 for row in rows),
        "units": units,
        "bytes": int(sum(row["bytes"] for row in rows)),
    }


def _as_is(batch: dict[str, Any]) -> dict[str, Any]:
    return batch


class DistillationDataModule(L.LightningDataModule):
    """Plain text for causal language models, tokenised with the teacher's tokenizer and packed into rows.

    Args:
        dataset: hub name, local file (text, JSON, JSON lines, Parquet, CSV), folder, glob or package://name/path,
            or a list of them. A text file is one document.
        dataset_config: configuration of a hub data set.
        split: split of a hub data set to train on; slices such as `train[:1%]` work.
        text_column: column that holds the text, in tables.
        validation_split: fraction of the rows to hold out, chosen by `seed`; or a split of the hub data set; or another
            local source.
        tokenizer: source of the tokenizer; by default the teacher's.
        sequence_length: tokens per row.
        packing: join documents into full rows; otherwise each starts a row of its own.
        per_device_batch_size: rows per micro-batch and device.
        num_workers: processes that read ahead.
        seed: of the held-out rows and of the order of training.
        max_sequences: use this many training rows at most.
        max_validation_sequences: use this many validation rows at most.
        trust_remote_code: run code that comes with `tokenizer`; the teacher's own goes by `model.trust_remote_code`.

    Raises:
        UserError: an option out of range; later, in `prepare_data`, bad or missing data.
    """

    def __init__(
        self,
        dataset: str | list[str],
        dataset_config: str | None = None,
        split: str = "train",
        text_column: str = "text",
        validation_split: float | str = 0.05,
        tokenizer: str | None = None,
        sequence_length: int = 512,
        packing: bool = True,
        per_device_batch_size: int = 4,
        num_workers: int = 0,
        seed: int = 0,
        max_sequences: int | None = None,
        max_validation_sequences: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.dataset, self.dataset_config, self.split, self.text_column = dataset, dataset_config, split, text_column
        self.validation_split, self.tokenizer_source = validation_split, tokenizer
        self.sequence_length, self.packing = sequence_length, packing
        self.per_device_batch_size, self.num_workers, self.seed = per_device_batch_size, num_workers, seed
        self.max_sequences, self.max_validation_sequences = max_sequences, max_validation_sequences
        self.trust_remote_code = trust_remote_code
        self.tokenizer: Any = None
        self.train_rows: PackedRows | None = None
        self.validation_rows: PackedRows | None = None
        self._check_options()

    def _check_options(self) -> None:
        for name, least in (
            ("sequence_length", 2),
            ("per_device_batch_size", 1),
            ("num_workers", 0),
            ("seed", 0),
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

    def prepare_data(self) -> None:
        """Download, tokenise and pack into the cache, on one process per node."""
        self._check_context()
        self._tables()

    def setup(self, stage: str | None = None) -> None:
        """Open the cached rows and split them."""
        if self.train_rows is not None:
            return
        self._check_context()
        train, held_out, documents = self._tables()
        generator = np.random.default_rng(self.seed)
        order_R = generator.permutation(train.num_rows)
        if held_out is None:
            count = max(1, round(train.num_rows * float(self.validation_split)))
            validation_R, order_R, held_out = order_R[:count], order_R[count:], train
        else:
            validation_R = generator.permutation(held_out.num_rows)
        if not len(order_R):
            raise UserError(
                f"data.validation_split: {self.validation_split} of {train.num_rows} rows leaves none to train on and "
                f"to validate on; give more text or a smaller data.sequence_length than {self.sequence_length}"
            )
        train_R = np.sort(order_R[: self.max_sequences])
        validation_R = np.sort(validation_R[: self.max_validation_sequences])
        pad_id = next(i for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0) if i is not None)
        self.train_rows = PackedRows(train, train_R, self.sequence_length, pad_id)
        self.validation_rows = PackedRows(held_out, validation_R, self.sequence_length, pad_id)
        rank_zero_info(
            f"Data: {documents:,} documents, {len(train_R):,} training rows of at most {self.sequence_length} tokens "
            f"with {self.train_rows.units_R['tokens'].sum():,} targets, {len(validation_R):,} validation rows "
            f"with {self.validation_rows.units_R['tokens'].sum():,}"
        )

    def _tables(self) -> tuple[Dataset, Dataset | None, int]:
        """Rows to train on, rows to validate on if they come from elsewhere, and the number of documents."""
        if self.tokenizer is None:
            source = self.tokenizer_source or getattr(self._module(), "teacher_source", None)
            if source is None:
                raise UserError("data.tokenizer: null, and there is no teacher to take it from; name a model source")
            teachers = getattr(self._module(), "load_options", {}) if self.tokenizer_source is None else {}
            trusted = self.trust_remote_code or teachers.get("trust_remote_code", False)
            self.tokenizer = load_tokenizer(source, trust_remote_code=trusted)
        documents = self._documents(self.dataset, self.split)
        train = pack(documents, self.tokenizer, self.sequence_length, self.packing)
        if not isinstance(self.validation_split, str):
            return train, None, documents.num_rows
        key = "data.validation_split"
        sources = [self.dataset] if isinstance(self.dataset, str) else self.dataset
        if all(local_files(name, "data.dataset") is None for name in sources):
            held_out = self._documents(self.dataset, self.validation_split)
        elif local_files(self.validation_split, key) is not None:
            held_out = self._documents(self.validation_split, self.split, key)
        else:
            raise UserError(
                f"{key}: {self.validation_split!r} is no local file, and local data have no splits; "
                "give a file or a fraction"
            )
        rows = pack(held_out, self.tokenizer, self.sequence_length, self.packing)
        return train, rows, documents.num_rows + held_out.num_rows

    def _documents(self, source: str | list[str], split: str, key: str = "data.dataset") -> Dataset:
        return load_documents(source, config=self.dataset_config, split=split, text_column=self.text_column, key=key)

    def _module(self) -> L.LightningModule | None:
        return self.trainer.lightning_module if self.trainer is not None else None

    def _check_context(self) -> None:
        context = getattr(self._module(), "max_context", None)
        if context is not None and self.sequence_length > context:
            raise UserError(
                f"data.sequence_length: {self.sequence_length} exceeds the {context} tokens that the models were built "
                "for; lower it"
            )

    def _ranks(self) -> dict[str, int]:
        """Rank and world size, once it is sure that Lightning won't deal out the rows a second time."""
        trainer = self.trainer
        if trainer is None:
            return {"rank": 0, "world_size": 1}
        if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
            raise UserError(
                "trainer.use_distributed_sampler: true deals out rows that are dealt out already; set it to false"
            )
        return {"rank": trainer.global_rank, "world_size": trainer.world_size}

    def _options(self) -> dict[str, Any]:
        return {"num_workers": self.num_workers, "collate_fn": _as_is, "pin_memory": torch.cuda.is_available()}

    def train_dataloader(self) -> ResumableLoader:
        """Training rows in the order of (seed, epoch), resumable within an epoch."""
        assert self.train_rows is not None
        if overfit := getattr(self.trainer, "overfit_batches", 0):
            raise UserError(
                f"trainer.overfit_batches: {overfit} would reorder the rows; set data.max_sequences instead"
            )
        self._check_context()
        ranks = self._ranks()
        rows = fingerprint(self.train_rows.table._fingerprint, self.train_rows.indices.size, self.validation_split)
        layout = {
            "data": rows,
            "data.seed": self.seed,
            "data.per_device_batch_size": self.per_device_batch_size,
            "trainer.devices": ranks["world_size"],
        }
        sampler = StepSampler(self.train_rows.units_R, self.per_device_batch_size, self.seed, **ranks)
        return ResumableLoader(self.train_rows, sampler, self.trainer, layout, **self._options())

    def val_dataloader(self) -> DataLoader:
        """Every validation row once."""
        assert self.validation_rows is not None
        self._check_context()
        sampler: Any = EveryRowOnce(self.validation_rows.units_R, self.per_device_batch_size, **self._ranks())
        # A generator of its own keeps validation from drawing from the global one, which training depends on.
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.validation_rows, batch_sampler=sampler, generator=generator, **self._options())

    def test_dataloader(self) -> DataLoader:
        """The validation rows."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader:
        """One batch: the first validation rows."""
        assert self.validation_rows is not None
        sampler = EveryRowOnce(self.validation_rows.units_R, self.per_device_batch_size)
        batches: Any = [self.validation_rows.__getitems__(next(iter(sampler)))]
        return DataLoader(batches, batch_size=None)
