"""Digests by which a model, a tokenizer or a file is known again, against mistakes and damage, not malice."""

import json
from pathlib import Path
from typing import Any

import torch
import xxhash
from transformers import PreTrainedModel


def weights_digest(model: PreTrainedModel) -> str:
    """Of a whole model's weights by name, wherever they lie and however files split them."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        there = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(there.shape)} {there.dtype}".encode())
        digest.update(there.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def tensor_digest(tensor: torch.Tensor) -> str:
    """Of a tensor's numbers, wherever they lie."""
    numbers: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return xxhash.xxh3_128(numbers).hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """Of what turns text into ids; how batches are padded or cut is no part of it."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = {key: value for key, value in state.items() if key not in ("truncation", "padding")}
    return xxhash.xxh3_128(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Of a file's bytes, read a few at a time."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()
