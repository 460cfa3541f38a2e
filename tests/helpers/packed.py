"""Batches as the datamodule's collate makes them, of made-up tokens in chosen documents."""

import torch

from distill.batch import Batch, Tokens
from helpers.tiny import VOCAB


def make_batch(documents, length, masked=()):
    """Rows of documents, given as lists of their lengths; each row's rest is padding, a document of its own.

    Args:
        documents: per row, lengths in tokens.
        length: of the rows.
        masked: (row, position) of labels that do not count, beside those of the documents' first tokens.
    """
    generator = torch.Generator().manual_seed(sum(map(sum, documents)))
    return batch_of(
        [[torch.randint(3, VOCAB, (n,), generator=generator) for n in row] for row in documents], length, masked
    )


def batch_of(rows, length, masked=()):
    """The batch of rows of documents, each a vector of ids."""
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    positions, mask, labels = torch.zeros_like(ids), torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, documents in enumerate(rows):
        start = 0
        for document in documents:
            place = slice(start, start + len(document))
            ids[row, place], positions[row, place], mask[row, place] = document, torch.arange(len(document)), 1
            labels[row, start + 1 : place.stop] = document[1:]
            start = place.stop
        positions[row, start:] = torch.arange(length - start)
    for row, position in masked:
        labels[row, position] = -100
    valid = torch.zeros_like(ids, dtype=torch.bool)
    valid[:, :-1] = labels[:, 1:] != -100
    places, packed = valid.flatten().nonzero().flatten(), any(len(documents) > 1 for documents in rows)
    tokens = Tokens(ids, labels, mask, positions, places, packed)
    units = {"tokens": int(valid.sum()), "queries": int((valid & (positions > 0)).sum()), "micro_batches": 1}
    return Batch(tokens, tokens, units, bytes=0)


def separate(batch):
    """Every document of a batch as a batch of its own, without padding; document's labels as they were."""
    found = []
    for row in range(len(batch.student.input_ids)):
        starts = (batch.student.position_ids[row] == 0).nonzero().flatten().tolist()
        for start, stop in zip(starts, [*starts[1:], batch.student.input_ids.shape[1]], strict=True):
            if batch.student.attention_mask[row, start]:
                labels = batch.student.labels[row, start:stop]
                masked = [(0, i) for i in range(1, stop - start) if labels[i] == -100]
                found.append(batch_of([[batch.student.input_ids[row, start:stop]]], stop - start, masked))
    return found
