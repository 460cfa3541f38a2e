"""A cache of teacher targets on disk: shards of rows, the teacher's head, and a manifest that says what they belong to.

    cache/
      manifest.json            what it holds, of whom, and the checksum of every file; there once all shards are
      building.json            the same while it is being built
      shard-00000.safetensors  rows: their digests, where their tokens begin, and the encoded tokens; with states of
                               layers those of every position, and where a row's begin
      head.safetensors         the teacher's head
      config.json, tokenizer.json, ...  the teacher's, as transformers writes them

Shards are memory-mapped and read a row at a time, wherever it stands. A file appears whole or not at all.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import accumulate
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
from distill.teachers.cached_states import States
from distill.teachers.encodings import Block

FORMAT = 2  # 1 had no states of layers
MANIFEST, BUILDING, HEAD = "manifest.json", "building.json", "head.safetensors"
STATES = "states"  # of a shard's tensors
OPEN_SHARDS = 32  # that are mapped at a time


@dataclass(frozen=True)
class Shard:
    """A file of rows.

    Args:
        file: its name.
        encoding: "training" or "validation", which of the manifest's encodings its rows are in.
        rows, tokens, bytes: how many of each.
        checksum: of the file.
        positions: whose states of layers it has.
    """

    file: str
    encoding: str
    rows: int
    tokens: int
    bytes: int
    checksum: str
    positions: int = 0


@dataclass(frozen=True)
class Manifest:
    """What a cache holds and what it belongs to.

    Args:
        teacher: source, revision, weights and embeddings (their digests), kind, parameters, dtype, top_k, quantization.
        tokenizer: digest.
        encodings: "training" and "validation" -> an encoding, described.
        head: scale and softcap.
        data: keys of `data:` that made the rows, for errors that say what has changed.
        files: name -> checksum of what is no shard.
        shards: the files of rows, in the order of their names.
        plan: digest of the rows that are being added, while they are.
        format: of all this.
        states: of layers, described, that a position has beside its target; none without losses on layers.
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
    states: list[dict[str, Any]] = field(default_factory=list)

    @property
    def identity(self) -> str:
        """Digest of the targets' meaning: teacher, tokenizer, encodings and states, not which rows there are."""
        what = [self.teacher["weights"], self.teacher["top_k"], self.tokenizer, self.encodings]
        what += [self.states] if self.states else []
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


def write_shard(path: Path, digests_R2: np.ndarray, blocks: list[Block], states: Sequence[Tensor] = ()) -> None:
    """Writes encoded rows; see the module.

    Args:
        path: of the file.
        digests_R2: of the rows, uint64 [R, 2].
        blocks: of the rows, in the same order.
        states: of the layers at the positions of each row, uint8 [positions, W], on the CPU; none where none are kept.
    """
    content = {
        "rows": torch.from_numpy(digests_R2.view(np.int64)),
        "first_token": _beginnings(len(block.record_NW) for block in blocks),
        "first_byte": _beginnings(block.stream.numel() for block in blocks),
        "record": torch.cat([block.record_NW for block in blocks]).cpu(),
        "stream": torch.cat([block.stream for block in blocks]).cpu(),
    }
    if states:
        content |= {"first_position": _beginnings(map(len, states)), STATES: torch.cat(list(states))}
    write_atomically(path, save(content))


def _beginnings(lengths: Iterable[int]) -> Tensor:
    """Where each of some pieces begins that lie behind each other, and where the last one ends, int64."""
    return torch.tensor([0, *accumulate(lengths)])


def described_shard(path: Path, encoding: str) -> Shard:
    """What the manifest says of a shard, read from it."""
    with safe_open(path, framework="np") as file:
        rows, tokens = file.get_slice("rows").get_shape()[0], file.get_slice("record").get_shape()[0]
        names = file.keys()
        positions = file.get_slice(STATES).get_shape()[0] if STATES in names else 0
    return Shard(path.name, encoding, rows, tokens, path.stat().st_size, file_digest(path), positions)


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
        part -> encoding, rows, tokens, positions, bytes but those of states of layers, bytes_per_target.
    """
    found: dict[str, Any] = {}
    position_bytes = States.described_by(manifest.states).bytes
    for part, described in manifest.encodings.items():
        shards = [asdict(shard) for shard in manifest.shards if shard.encoding == part]
        sums = {key: sum(shard[key] for shard in shards) for key in ("rows", "tokens", "positions", "bytes")}
        sums["bytes"] -= sums["positions"] * position_bytes
        each = sums["bytes"] / sums["tokens"] if sums["tokens"] else 0.0
        found[part] = {"encoding": described["name"], **sums, "bytes_per_target": each}
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

    def _open(self, number: int) -> tuple[Any, dict[str, np.ndarray]]:
        file = safe_open(self._paths[number], framework="np")
        names = file.keys()
        return file, {name: file.get_tensor(name) for name in names if name.startswith("first_")}

    def _find(self, place: int) -> tuple[Any, dict[str, np.ndarray], int]:
        """The file of a row, where its rows' pieces begin, and which row of it that is."""
        number = int(np.searchsorted(self._first_S, place, "right")) - 1
        return *self._opened(number), place - int(self._first_S[number])

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
            file, first, row = self._find(place)
            records.append(_piece(file, "record", first["first_token"], row))
            if first["first_byte"][-1]:  # safetensors slices no empty tensor
                streams.append(_piece(file, "stream", first["first_byte"], row))
        return Block(_joined(records), _joined(streams))

    def read_states(self, places: Sequence[int], shape: tuple[int, int], width: int) -> Tensor:
        """The states of layers of some rows, uint8 (*shape, width), zeros behind the end of a row.

        Args:
            places: of at most as many rows as the shape has.
            shape: B, L of the batch.
            width: bytes of a position.
        """
        read_BLW = torch.zeros(*shape, width, dtype=torch.uint8)
        for row, place in enumerate(places):
            file, first, here = self._find(place)
            piece = _piece(file, STATES, first["first_position"], here)
            read_BLW[row, : len(piece)] = torch.from_numpy(piece)
        return read_BLW


def _piece(file: Any, name: str, first: np.ndarray, row: int) -> np.ndarray:
    """A row's piece of a tensor whose rows begin there."""
    piece: np.ndarray = file.get_slice(name)[int(first[row]) : int(first[row + 1])]
    return piece


def _joined(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint8))
