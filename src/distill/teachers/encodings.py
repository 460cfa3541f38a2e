"""How targets of a row become bytes, and what that loses: the whole state, k ids with a tail, or draws with counts.

Every token takes a record of fixed width; draws, whose number of distinct ids varies, put their ids into a stream
behind the records. Ids take the bits that the vocabulary needs. Nothing here knows of files.

Errors: the hidden state is rounded to its dtype. Of the k log-probabilities the first is within 1/131070 of ln V, the
next two within 0.0005 nats, each later one within 1.52% of its distance to the one before plus 0.0005 nats, or no
further off than that one; a distance above 64 nats counts as 64. The tail's mass is in fp32. Draws, counts and the
entropy lose nothing but what fp32 rounds off the entropy.

Shapes: N tokens, D teacher hidden width, V vocabulary, K ids kept, S draws, W bytes of a record.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from distill.models.head import LMHead
from distill.teachers.targets import (
    DenseTargets,
    SampledTargets,
    Targets,
    TopKTargets,
    sampled_targets,
    top_k_targets,
)

WIDEST_GAP = 64.0  # nats between neighbours
GAP_STEP, GAP_RATE = WIDEST_GAP / 65535, 0.03
GAP_SCALE = WIDEST_GAP / math.expm1(255 * GAP_RATE)  # of the logarithmic code: 0.03 nats
FINE_GAPS = 2  # of the most probable neighbours, in 16 bits; later ones in 8


@dataclass(frozen=True, eq=False)
class Block:
    """Encoded tokens.

    Args:
        record_NW: uint8.
        stream: uint8, the tokens' ids behind each other, each token's begun at a whole byte; empty where records say
            everything.
    """

    record_NW: Tensor
    stream: Tensor

    def to(self, device: torch.device) -> "Block":
        """The same on another device."""
        return Block(self.record_NW.to(device, non_blocking=True), self.stream.to(device, non_blocking=True))


class Encoding(Protocol):
    """One way to store the targets of a token."""

    @property
    def name(self) -> str:
        """Of the kind."""

    def record_bytes(self, width: int) -> int:
        """W for a teacher of this hidden width."""

    def encode(self, whole: DenseTargets, seed: int) -> Block:
        """The targets of the tokens of one row; `seed` is all that draws depend on."""

    def decode(self, block: Block, head: LMHead) -> Targets:
        """What the engine learns from, on the device of the block and the head."""


@dataclass(frozen=True)
class Hidden:
    """The last hidden state: everything the teacher says, for who has its head.

    Args:
        dtype: that it is rounded to.
    """

    dtype: torch.dtype
    name: str = "hidden"

    def record_bytes(self, width: int) -> int:
        """See `Encoding`."""
        return width * self.dtype.itemsize

    def encode(self, whole: DenseTargets, seed: int) -> Block:
        """See `Encoding`."""
        record_NW = whole.hidden_ND.to(self.dtype).contiguous().view(torch.uint8)
        return Block(record_NW, record_NW.new_empty(0))

    def decode(self, block: Block, head: LMHead) -> DenseTargets:
        """See `Encoding`; in the dtype of the head."""
        return DenseTargets(block.record_NW.contiguous().view(self.dtype).to(head.weight.dtype), head)


@dataclass(frozen=True)
class TopK:
    """The k most probable ids in descending order, and the log of all other ids' mass.

    Args:
        k: K.
        temperature: T.
        vocab_size: V, ids that the probabilities are over.
    """

    k: int
    temperature: float
    vocab_size: int
    name: str = "top_k"

    @property
    def _widths(self) -> list[int]:
        """Bytes of a record's fields: ids, first log-probability, fine gaps, gaps, tail."""
        fine = min(FINE_GAPS, self.k - 1)
        return [-(-self.k * id_bits(self.vocab_size) // 8), 2, 2 * fine, self.k - 1 - fine, 4]

    def record_bytes(self, width: int) -> int:
        """See `Encoding`."""
        return sum(self._widths)

    def encode(self, whole: DenseTargets, seed: int) -> Block:
        """See `Encoding`."""
        kept = top_k_targets(whole, self.k, self.temperature, self.vocab_size)
        ids = pack_ids(kept.ids_NK, torch.full_like(kept.ids_NK[:, 0], self.k), id_bits(self.vocab_size))
        exact_NK = kept.logprobs_NK.double()
        top_N = (-exact_NK[:, 0] / self._top_step).round().clamp(0, 65535)
        now_N, codes = -top_N * self._top_step, []
        for place in range(1, self.k):  # each distance is to what will be read, so errors do not add up
            gap_N = (now_N - exact_NK[:, place]).clamp(0, WIDEST_GAP)
            codes.append(_gap_codes(gap_N, place <= FINE_GAPS))
            now_N = now_N - _gaps(codes[-1], place <= FINE_GAPS)
        fine = _stacked(codes[:FINE_GAPS], kept.ids_NK)
        gaps_NG = _stacked(codes[FINE_GAPS:], kept.ids_NK).to(torch.uint8)
        tail_N4 = kept.log_tail_N.float()[:, None].contiguous().view(torch.uint8)
        fields = [ids.view(len(exact_NK), -1), _two_bytes(top_N[:, None]), _two_bytes(fine), gaps_NG, tail_N4]
        return Block(torch.cat(fields, -1), ids.new_empty(0))

    def decode(self, block: Block, head: LMHead) -> TopKTargets:
        """See `Encoding`."""
        ids_N, top, fine, gaps_NG, tail_N4 = block.record_NW.split(self._widths, -1)
        counts_N = torch.full((len(ids_N),), self.k, device=ids_N.device)
        ids_NK = unpack_ids(ids_N.reshape(-1), counts_N, id_bits(self.vocab_size), self.k)
        top_N1 = -_whole_numbers(top).double() * self._top_step
        steps = [_gaps(_whole_numbers(fine).double(), True), _gaps(gaps_NG.double(), False)]
        logprobs_NK = torch.cat([top_N1, top_N1 - torch.cat(steps, -1).cumsum(-1)], -1)
        return TopKTargets(
            ids_NK=ids_NK,
            logprobs_NK=logprobs_NK.float(),
            log_tail_N=_floats(tail_N4),
            temperature=self.temperature,
            vocab_size=self.vocab_size,
        )

    @property
    def _top_step(self) -> float:
        return max(math.log(self.vocab_size), 1e-3) / 65535  # no largest probability is below 1 / V

    def first(self, targets: TopKTargets, k: int) -> TopKTargets:
        """The same with fewer ids, whose mass goes to the tail."""
        if k >= self.k:
            return targets
        dropped = torch.cat([targets.logprobs_NK[:, k:], targets.log_tail_N[:, None]], -1)
        return TopKTargets(
            ids_NK=targets.ids_NK[:, :k],
            logprobs_NK=targets.logprobs_NK[:, :k],
            log_tail_N=dropped.logsumexp(-1),
            temperature=targets.temperature,
            vocab_size=targets.vocab_size,
        )


@dataclass(frozen=True)
class Sampled:
    """Ids drawn with replacement, how often each was, and the exact entropy of what they were drawn from.

    Args:
        draws: S.
        temperature: T.
        vocab_size: V, ids that the probabilities are over.
    """

    draws: int
    temperature: float
    vocab_size: int
    name: str = "sampled"

    def record_bytes(self, width: int) -> int:
        """See `Encoding`; ids come on top, in the stream."""
        return -(-self.draws // 8) + 4

    def encode(self, whole: DenseTargets, seed: int) -> Block:
        """See `Encoding`. A bit for each draw says whether it is the first of its id."""
        generator = torch.Generator(whole.hidden_ND.device).manual_seed(seed)
        drawn = sampled_targets(whole, self.draws, self.temperature, self.vocab_size, generator)
        counts_NS = drawn.counts_NS.long()
        first_NS = (counts_NS.cumsum(-1) - counts_NS).clamp(max=self.draws - 1)
        is_new_NS = torch.zeros_like(counts_NS).scatter_add_(1, first_NS, (counts_NS > 0).long())
        bits_N = pack_ids(is_new_NS, torch.full_like(counts_NS[:, 0], self.draws), 1)
        entropy_N4 = drawn.entropy_N.float()[:, None].contiguous().view(torch.uint8)
        ids = pack_ids(drawn.ids_NS, (counts_NS > 0).sum(-1), id_bits(self.vocab_size))
        return Block(torch.cat([bits_N.view(len(counts_NS), -1), entropy_N4], -1), ids)

    def decode(self, block: Block, head: LMHead) -> SampledTargets:
        """See `Encoding`."""
        bits_NB, entropy_N4 = block.record_NW.split([-(-self.draws // 8), 4], -1)
        counts_N = torch.full((len(bits_NB),), self.draws, device=bits_NB.device)
        is_new_NS = unpack_ids(bits_NB.reshape(-1), counts_N, 1, self.draws)
        place_NS = is_new_NS.cumsum(-1) - 1
        counts_NS = torch.zeros_like(is_new_NS, dtype=torch.float32)
        counts_NS.scatter_add_(1, place_NS, torch.ones_like(counts_NS))
        return SampledTargets(
            ids_NS=unpack_ids(block.stream, is_new_NS.sum(-1), id_bits(self.vocab_size), self.draws),
            counts_NS=counts_NS,
            entropy_N=_floats(entropy_N4),
            temperature=self.temperature,
            vocab_size=self.vocab_size,
        )


KINDS: dict[str, Any] = {"hidden": Hidden, "top_k": TopK, "sampled": Sampled}


def described(encoding: Encoding) -> dict[str, Any]:
    """What a manifest says of an encoding, from which `encoding_of` makes it again: its name and options.

    Example:
        >>> described(Hidden(torch.bfloat16))
        {'dtype': 'bfloat16', 'name': 'hidden'}
    """
    return {
        key: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
        for key, value in vars(encoding).items()
    }


def encoding_of(told: dict[str, Any]) -> Encoding:
    """The encoding that a manifest describes.

    Example:
        >>> encoding_of({"name": "top_k", "k": 64, "temperature": 2.0, "vocab_size": 49152}).record_bytes(576)
        199
    """
    options = {key: value for key, value in told.items() if key != "name"}
    if "dtype" in options:
        options["dtype"] = getattr(torch, options["dtype"])
    made: Encoding = KINDS[told["name"]](**options)
    return made


def id_bits(vocab_size: int) -> int:
    """Bits of an id.

    Example:
        >>> id_bits(49_152), id_bits(262_144), id_bits(256)
        (16, 18, 8)
    """
    return max(1, (vocab_size - 1).bit_length())


def _bit_places(counts_N: Tensor, bits: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """First bit (N, width) of each token's ids in a stream, which of them there are, and the bytes of each token."""
    bytes_N = (counts_N * bits + 7) // 8
    start_N1 = ((bytes_N.cumsum(0) - bytes_N) * 8)[:, None]
    place_S = torch.arange(width, device=counts_N.device)
    return start_N1 + place_S * bits, place_S < counts_N[:, None], bytes_N


def pack_ids(ids_NS: Tensor, counts_N: Tensor, bits: int) -> Tensor:
    """The first so many ids of each token in `bits` bits each, at most 25, as a uint8 stream."""
    at_NS, there_NS, bytes_N = _bit_places(counts_N, bits, ids_NS.shape[1])
    at, size = at_NS[there_NS], int(bytes_N.sum())
    value = ids_NS[there_NS] << (at & 7)
    wide = torch.zeros(size + 4, dtype=torch.int32, device=ids_NS.device)
    for byte in range(4):  # no two ids share a bit, so sums are unions
        wide.index_add_(0, (at >> 3) + byte, ((value >> (8 * byte)) & 255).int())
    return wide[:size].to(torch.uint8)


def unpack_ids(stream: Tensor, counts_N: Tensor, bits: int, width: int) -> Tensor:
    """What `pack_ids` packed, int64 (N, width); 0 in places that no token filled."""
    if bits in (8, 16) and stream.numel() == len(counts_N) * width * bits // 8:  # all places are filled
        whole = stream if bits == 8 else _whole_numbers(stream.view(-1, 2))
        return whole.reshape(len(counts_N), width).long()
    at_NS, there_NS, _ = _bit_places(counts_N, bits, width)
    padded = torch.cat([stream, stream.new_zeros(4)]).int()
    first_NS = torch.where(there_NS, at_NS >> 3, 0)
    word_NS = padded[first_NS]
    for byte in range(1, (bits + 14) // 8):
        word_NS = word_NS.long() + (padded[first_NS + byte].long() << (8 * byte))
    return torch.where(there_NS, (word_NS.long() >> (at_NS & 7)) & ((1 << bits) - 1), 0)


def _two_bytes(codes_NM: Tensor) -> Tensor:
    """Whole numbers below 65,536 as their two bytes, the low one first, (N, M) -> (N, 2 M)."""
    wide_NM = codes_NM.long()
    return torch.stack([wide_NM & 255, wide_NM >> 8], -1).flatten(1).to(torch.uint8)


def _whole_numbers(bytes_NM: Tensor) -> Tensor:
    """The inverse of `_two_bytes`."""
    return bytes_NM[:, 0::2].int() + (bytes_NM[:, 1::2].int() << 8)


def _floats(bytes_N4: Tensor) -> Tensor:
    """fp32 numbers from their bytes, (N, 4) -> (N); copied, since a view would have to begin at a fourth byte."""
    return bytes_N4.clone(memory_format=torch.contiguous_format).view(torch.float32)[:, 0]


def _gap_codes(gap_N: Tensor, fine: bool) -> Tensor:
    """Nearest code of a distance between neighbours."""
    if fine:
        return (gap_N / GAP_STEP).round()
    return (torch.log1p(gap_N / GAP_SCALE) / GAP_RATE).round().clamp(max=255)


def _gaps(codes: Tensor, fine: bool) -> Tensor:
    """Distances in nats that codes mean."""
    return codes * GAP_STEP if fine else GAP_SCALE * torch.expm1(GAP_RATE * codes)


def _stacked(columns: list[Tensor], like_NK: Tensor) -> Tensor:
    """Columns side by side, (N, 0) where there are none."""
    return torch.stack(columns, -1) if columns else like_NK.new_empty(len(like_NK), 0)
