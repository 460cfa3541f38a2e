"""Routing losses on tiny teachers: batches, recorded experts and made-up student states."""

import math
from types import SimpleNamespace

import torch
from transformers import LlamaConfig

from distill.batch import Tokens
from distill.losses.routing import Routing
from distill.models.trace import recording
from helpers import tiny

STUDENT = LlamaConfig(hidden_size=24, num_hidden_layers=3, num_attention_heads=2, vocab_size=tiny.VOCAB)


def number(x):
    return x.detach().item()


def make_batch(documents, length):
    """Rows of packed documents, given as lists of lengths, with every row's rest padded as its own document."""
    generator = torch.Generator().manual_seed(sum(map(sum, documents)))
    ids = torch.randint(3, tiny.VOCAB, (len(documents), length), generator=generator)
    positions, mask, labels = torch.zeros_like(ids), torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, lengths in enumerate(documents):
        start = 0
        for document in lengths:
            positions[row, start : start + document] = torch.arange(document)
            mask[row, start : start + document] = 1
            labels[row, start + 1 : start + document] = ids[row, start + 1 : start + document]
            start += document
        positions[row, start:] = torch.arange(length - start)
    return with_positions(ids, labels, mask, positions)


def with_positions(ids, labels, mask, positions):
    valid = torch.zeros_like(labels, dtype=torch.bool)
    valid[:, :-1] = labels[:, 1:] != -100
    return Tokens(ids, labels, mask, positions, valid.flatten().nonzero().flatten(), packed=False)


def built(teacher, seed=0, **options):
    routing = Routing(**options)
    torch.manual_seed(seed)
    routing.build(teacher, SimpleNamespace(config=STUDENT))
    return routing


def recorded(routing, teacher, batch):
    with torch.no_grad(), recording(routing.teacher_needs.recorders) as records:
        teacher(batch.input_ids, attention_mask=batch.attention_mask)
    return records


def student_states(routing, batch, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shape = (*batch.input_ids.shape, 24)
    return [
        torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for _ in routing.student_layer_indices
    ]


def dense(make):
    return {"num_experts": 4} if make.__name__ in ("tiny_llama", "tiny_qwen2", "tiny_gemma", "tiny_gpt2") else {}


def plain_relation_kl(student, teacher, batch, heads):
    """Four loops in float64."""
    total, valid = 0.0, set(batch.positions.tolist())
    rows, length, _ = student.shape
    document = (batch.position_ids == 0).cumsum(-1)
    for b in range(rows):
        for i in range(length):
            keys = [j for j in range(i) if document[b, i] == document[b, j] and batch.attention_mask[b, j]]
            if b * length + i not in valid or not keys:
                continue
            for s, t in zip(student[b].chunk(heads, -1), teacher[b].chunk(heads, -1), strict=True):
                q = torch.stack([s[i] @ s[j] / math.sqrt(s.shape[-1]) for j in keys]).log_softmax(-1)
                p = torch.stack([t[i] @ t[j] / math.sqrt(t.shape[-1]) for j in keys]).log_softmax(-1)
                total = total + (p.exp() * (p - q)).sum() / heads
    return total
