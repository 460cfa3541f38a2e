"""A cache's files: rows come back from wherever they stand, and what is not as it was written is told."""

import json
import re

import numpy as np
import pytest
import torch
import xxhash

from distill.errors import UserError
from distill.models.head import LMHead
from distill.teachers import cache_files
from distill.teachers.cache_files import MANIFEST, Manifest, Shelf, damage, read_manifest, write_manifest, write_shard
from distill.teachers.cached import find
from distill.teachers.encodings import Block

TEACHER = {"weights": "w", "top_k": "native", "source": "somewhere", "vocabulary": 9}
ENCODINGS = {"training": {"name": "hidden", "dtype": "float32"}, "validation": {"name": "hidden", "dtype": "float32"}}
SIZES = [[3, 1], [4], [2, 2, 5]]  # tokens of each row of each shard


def block(tokens: int, mark: int) -> Block:
    """Tokens whose bytes say which row they are of."""
    return Block(torch.full((tokens, 6), mark, dtype=torch.uint8), torch.full((2 * tokens,), mark, dtype=torch.uint8))


@pytest.fixture
def folder(tmp_path):
    """A cache of three shards with six rows, numbered through."""
    mark, shards = 0, []
    for number, sizes in enumerate(SIZES):
        digests_R2 = np.array([[mark + row, 100 + mark + row] for row in range(len(sizes))], dtype=np.uint64)
        path = tmp_path / f"shard-{number:05}.safetensors"
        write_shard(path, digests_R2, [block(tokens, mark + row) for row, tokens in enumerate(sizes)])
        shards.append(cache_files.described_shard(path, "training"))
        mark += len(sizes)
    head = cache_files.save_head(tmp_path, LMHead(torch.randn(9, 6), scale=0.5, softcap=30.0))
    files = {cache_files.HEAD: cache_files.file_digest(tmp_path / cache_files.HEAD)}
    write_manifest(tmp_path, Manifest(TEACHER, "t", ENCODINGS, head, {}, files, shards))
    return tmp_path


def test_rows_come_back_in_any_order(folder, monkeypatch):
    monkeypatch.setattr(cache_files, "OPEN_SHARDS", 1)
    manifest = read_manifest(folder)
    shelf = Shelf(folder, manifest.shards)
    assert shelf.digests().tolist() == [[row, 100 + row] for row in range(6)]
    tokens = [size for sizes in SIZES for size in sizes]
    order = [4, 0, 5, 2, 1, 3, 4]
    read = shelf.read(order)
    assert read.record_NW[:, 0].tolist() == [row for row in order for _ in range(tokens[row])]
    assert read.stream.tolist() == [row for row in order for _ in range(2 * tokens[row])]
    assert manifest.tokens == sum(tokens)
    head = cache_files.load_head(folder, manifest)
    assert (head.scale, head.softcap) == (0.5, 30.0)
    assert damage(folder, manifest) is None


@pytest.mark.parametrize("name", ["shard-00001.safetensors", "head.safetensors"])
@pytest.mark.parametrize("harm", ["flip", "cut", "lose"])
def test_damage_names_the_file(folder, name, harm):
    path, content = folder / name, bytearray((folder / name).read_bytes())
    if harm == "flip":
        content[-3] ^= 1
        path.write_bytes(content)
    elif harm == "cut":
        path.write_bytes(content[:-5])
    else:
        path.unlink()
    assert name in damage(folder, read_manifest(folder))


def test_a_manifest_that_was_changed_or_is_newer_is_refused(folder):
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"somewhere"', '"elsewhere"'))
    with pytest.raises(UserError, match=r"damaged manifest.json; build it anew"):
        read_manifest(folder)
    (folder / MANIFEST).write_text(text[:-20])
    with pytest.raises(UserError, match="damaged manifest"):
        read_manifest(folder)
    (folder / MANIFEST).write_text(json.dumps({"format": 99, "checksum": "", "more": 1}))
    with pytest.raises(UserError, match="format 99, newer than 2; update student-aware-distillation"):
        read_manifest(folder)
    (folder / MANIFEST).rename(folder / cache_files.BUILDING)
    with pytest.raises(UserError, match=re.escape("is unfinished; run distill cache --output")):
        read_manifest(folder)


def test_a_cache_of_the_first_format_is_read(folder):
    content = json.loads((folder / MANIFEST).read_text()) | {"format": 1}
    del content["states"], content["checksum"]
    content["checksum"] = xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()
    identity = read_manifest(folder).identity
    (folder / MANIFEST).write_text(json.dumps(content))
    old = read_manifest(folder)
    assert (old.format, old.states, old.identity) == (1, [], identity)
    assert damage(folder, old) is None


def test_digests_are_found_by_all_their_bits():
    stored = np.array([[5, 1], [3, 2], [5, 2], [9, 9]], dtype=np.uint64)
    wanted = np.array([[9, 9], [3, 2], [3, 1], [7, 7], [5, 1]], dtype=np.uint64)
    assert find(wanted, stored).tolist() == [3, 1, -1, -1, 0]
    assert find(wanted, stored[:0]).tolist() == [-1] * 5


def test_what_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "file"
    cache_files.write_atomically(path, b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        cache_files.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["file"]
