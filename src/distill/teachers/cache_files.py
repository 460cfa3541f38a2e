"""A cache of teacher targets on disk: shards of rows, the teacher's head, and a manifest that says what they belong to.

    cache/
      manifest.json            what it holds, of whom, and the checksum of every file; there once all shards are
      building.json            the same while it is being built
      shard-00000.safetensors  rows: their digests, where their tokens begin, and the encoded tokens
      head.safetensors         the teacher's head
      config.json, tokenizer.json, ...  the teacher's, as transformers writes them

Shards are memory-mapped and read a row at a time, wherever it stands. A file appears whole or not at all.
"""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from distill.errors import UserError
from distill.models.digests import file_digest
from distill.models.head import LMHead
from distill.teachers.encodings import Block, encoding_of

FORMAT = 1
MANIFEST, BUILDING, HEAD = "manifest.json", "building.json", "head.safetensors"
OPEN_SHARDS = 32  # that are mapped at a time


@dataclass(frozen=True)
class Shard:
    """A file of rows.

    Args:
        file: its name.
        encoding: "training" or "validation", which of the manifest's encodings its rows are in.
        rows, tokens, bytes: how many of each.
        checksum: of the file.
    """

    file: str
    encoding: str
    rows: int
    tokens: int
    bytes: int
    checksum: str


@dataclass(frozen=True)
class Manifest:
    """What a cache holds and what it belongs to.

    Args:
        teacher: source, revision, weights (their digest), kind, parameters, dtype, top_k, quantization.
        tokenizer: digest.
        encodings: "training" and "validation" -> an encoding, described.
        head: scale and softcap.
        data: keys of `data:` that made the rows, for errors that say what has changed.
        files: name -> checksum of what is no shard.
        shards: the files of rows, in the order of their names.
        plan: digest of the rows that are being added, while they are.
        format: of all this.
    """

    teacher: dict[str, Any]
    tokenizer: str
    encodings: dict[str, dict[str, Any]]
    head: dict[str, Any]
    data: dict[str, Any]
    files: dict[str, str] = field(default_factory=dict)
    shards: list[Shard] = field(default_factory=list)
    plan: str = ""
    format: int = FORMAT

    @property
    def identity(self) -> str:
        """Digest of the targets' meaning: teacher, tokenizer and encodings, not which rows there are."""
        what = [self.teacher["weights"], self.teacher["top_k"], self.tokenizer, self.encodings]
        return xxhash.xxh3_128(json.dumps(what, sort_keys=True).encode()).hexdigest()

    @property
    def tokens(self) -> int:
        """Targets in all shards."""
        return sum(shard.tokens for shard in self.shards)


def is_cache(source: str) -> bool:
    """Whether a source of a teacher is the folder of a cache, finished or not."""
    return any(Path(source).expanduser().joinpath(name).is_file() for name in (MANIFEST, BUILDING))


def teacher_behind(source: str) -> str:
    """The source of the model that a cache is of; other sources as they are."""
    return str(read_manifest(Path(source).expanduser()).teacher["source"]) if is_cache(source) else source


def trouble(folder: Path, what: str, remedy: str) -> UserError:
    """An error about a cache."""
    return UserError(f"model.teacher: the cache {folder} {what}; {remedy}")


def read_manifest(folder: Path, name: str = MANIFEST) -> Manifest:
    """The manifest of a cache.

    Raises:
        UserError: it is unfinished, damaged or of a newer format.
    """
    path = folder / name
    if not path.is_file():
        unfinished = "is unfinished" if (folder / BUILDING).is_file() else f"has no {name}"
        raise trouble(folder, unfinished, f"run distill cache --output {folder} with its configuration again")
    damaged = trouble(folder, f"has a damaged {name}", "build it anew")
    try:
        content = json.loads(path.read_text())
        number, checksum = content["format"], content.pop("checksum")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise damaged from error
    if isinstance(number, int) and number > FORMAT:
        raise trouble(folder, f"is of format {number}, newer than {FORMAT}", "update student-aware-distillation")
    if checksum != _checksum(content):
        raise damaged
    return Manifest(**(content | {"shards": [Shard(**shard) for shard in content["shards"]]}))


def write_manifest(folder: Path, manifest: Manifest, name: str = MANIFEST) -> None:
    """Writes the manifest, atomically."""
    content = asdict(manifest)
    content["checksum"] = _checksum(content)
    write_atomically(folder / name, json.dumps(content, indent=1, sort_keys=True).encode())


def _checksum(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file beside its place, forces it to the disk and renames it."""
    beside = path.with_name(f".{path.name}.tmp")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(f"--output: {path} can't be written ({error.strerror}); make room and run it again") from error


def write_shard(path: Path, digests_R2: np.ndarray, blocks: list[Block]) -> None:
    """Writes encoded rows; see the module.

    Args:
        path: of the file.
        digests_R2: of the rows, uint64 [R, 2].
        blocks: of the rows, in the same order.
    """
    tokens_R = torch.tensor([len(block.record_NW) for block in blocks])
    bytes_R = torch.tensor([block.stream.numel() for block in blocks])
    content = {
        "rows": torch.from_numpy(digests_R2.view(np.int64)),
        "first_token": torch.cat([torch.zeros(1, dtype=torch.int64), tokens_R.cumsum(0)]),
        "first_byte": torch.cat([torch.zeros(1, dtype=torch.int64), bytes_R.cumsum(0)]),
        "record": torch.cat([block.record_NW for block in blocks]).cpu(),
        "stream": torch.cat([block.stream for block in blocks]).cpu(),
    }
    write_atomically(path, save(content))


def described_shard(path: Path, encoding: str) -> Shard:
    """What the manifest says of a shard, read from it."""
    with safe_open(path, framework="np") as file:
        rows, tokens = file.get_slice("rows").get_shape()[0], file.get_slice("record").get_shape()[0]
    return Shard(path.name, encoding, rows, tokens, path.stat().st_size, file_digest(path))


def damage(folder: Path, manifest: Manifest, tell: Callable[[str], None] = lambda line: None) -> str | None:
    """What is wrong with the first file that is not as the manifest says, None where all are.

    Args:
        folder: of the cache.
        manifest: of it.
        tell: is told of every file that is as it should be.
    """
    sizes = {shard.file: shard.bytes for shard in manifest.shards}
    checksums = manifest.files | {shard.file: shard.checksum for shard in manifest.shards}
    for name, checksum in checksums.items():
        path = folder / name
        if not path.is_file():
            return f"lacks {name}"
        if name in sizes and path.stat().st_size != sizes[name]:
            return f"has {path.stat().st_size:,} bytes of the {sizes[name]:,} of {name}"
        if file_digest(path) != checksum:
            return f"has a damaged {name}, whose checksum is another"
        tell(name)
    return None


def save_head(folder: Path, head: LMHead) -> dict[str, Any]:
    """Writes a whole head; returns what the manifest says of it."""
    tensors = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
    write_atomically(
        folder / HEAD, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    )
    return {"scale": head.scale, "softcap": head.softcap}


def load_head(folder: Path, manifest: Manifest) -> LMHead:
    """The teacher's head, frozen."""
    tensors = load_file(folder / HEAD)
    return LMHead(tensors["weight"], tensors.get("bias"), **manifest.head)


def summary(manifest: Manifest) -> dict[str, Any]:
    """Rows, targets and bytes of each part of a cache.

    Returns:
        part -> encoding, rows, tokens, bytes, bytes_per_target.
    """
    found: dict[str, Any] = {}
    for part, described in manifest.encodings.items():
        shards = [asdict(shard) for shard in manifest.shards if shard.encoding == part]
        sums = {key: sum(shard[key] for shard in shards) for key in ("rows", "tokens", "bytes")}
        each = sums["bytes"] / sums["tokens"] if sums["tokens"] else 0.0
        found[part] = {"encoding": encoding_of(described).name, **sums, "bytes_per_target": each}
    return found


class Shelf:
    """Rows of one encoding by their place among the rows of all its shards; files are mapped as they are asked for.

    Args:
        folder: of the cache.
        shards: in order.
    """

    def __init__(self, folder: Path, shards: Iterable[Shard]) -> None:
        self.shards = list(shards)
        self._paths = [folder / shard.file for shard in self.shards]
        self._first_S = np.cumsum([0, *(shard.rows for shard in self.shards)])
        self._opened = lru_cache(OPEN_SHARDS)(self._open)

    def _open(self, number: int) -> tuple[Any, np.ndarray, np.ndarray]:
        file = safe_open(self._paths[number], framework="np")
        return file, file.get_tensor("first_token"), file.get_tensor("first_byte")

    def digests(self) -> np.ndarray:
        """Of all rows, uint64 [R, 2]."""
        found = []
        for path in self._paths:
            with safe_open(path, framework="np") as file:
                found.append(file.get_tensor("rows").view(np.uint64))
        return np.concatenate(found) if found else np.zeros((0, 2), dtype=np.uint64)

    def read(self, places: Iterable[int]) -> Block:
        """The encoded tokens of some rows, one behind the other."""
        records, streams = [], []
        for place in places:
            number = int(np.searchsorted(self._first_S, place, "right")) - 1
            file, first_token, first_byte = self._opened(number)
            row = place - int(self._first_S[number])
            records.append(file.get_slice("record")[int(first_token[row]) : int(first_token[row + 1])])
            if first_byte[-1]:  # safetensors slices no empty tensor
                streams.append(file.get_slice("stream")[int(first_byte[row]) : int(first_byte[row + 1])])
        return Block(_joined(records), _joined(streams))


def _joined(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint8))
