"""What a loss may know about the teacher: one of three kinds of targets per token, never the model itself.

Dense targets are exact and carry the teacher's head. Sparse ones are small on disk and lose something: top-k keeps k
probabilities and puts the rest into one bucket, a lower bound of the dense value; samples are unbiased, but for forward
KL only, and noisy. Both are bound to the temperature that they were made at.

Another kind is a class of its own with the members of `Targets`, in a file of its own.

Shapes: N tokens, D teacher hidden width, V shared vocabulary, K ids kept, S distinct ids drawn.
R rows and, in what the engine hands over, S shared ids of the student.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from distill.errors import UserError
from distill.losses.engine.divergence import LOG_FLOOR, KDLoss
from distill.losses.engine.rows import Buffers, dense_rows, sampled_rows, top_k_rows
from distill.losses.engine.targets import Targets as Targets
from distill.models.head import LMHead, logits_dtype, mm_into

_BLOCK_ELEMENTS_CPU = 1 << 18  # of those that are looked at together: 1 MiB
_CHUNK_ELEMENTS = 1 << 25  # of logits at a time while sparse targets are made: 128 MiB in fp32


@dataclass(frozen=True, eq=False)
class DenseTargets:
    """The teacher's whole distribution, as its last hidden state and head.

    Args:
        hidden_ND: last hidden state, after the final norm.
        head: the teacher's head; its parameters are never differentiated.
    """

    hidden_ND: Tensor
    head: LMHead

    @property
    def head_and_hidden(self) -> tuple[LMHead, Tensor]:
        """The logits of all tokens, a chunk at a time."""
        return self.head, self.hidden_ND

    @property
    def whole(self) -> bool:
        """These logits are the target."""
        return True

    def shared_vocab(self, student_vocab: int) -> int:
        """Ids that both sides have: what padding of one vocabulary adds is left out."""
        return min(student_vocab, self.head.vocab_size)

    def refuse_unsuitable(self, kd: KDLoss, temperature: float, student_vocab: int) -> None:
        """They serve every run."""

    def divergence(
        self,
        kd: KDLoss,
        student_RS: Tensor,
        teacher_RV: Tensor | None,
        rows: slice,
        temperature: float,
        buffers: Buffers,
        gradient: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """See `Targets.divergence`."""
        assert teacher_RV is not None
        return dense_rows(kd, student_RS, teacher_RV[:, : student_RS.shape[1]], temperature, buffers, gradient)


@dataclass(frozen=True, eq=False, kw_only=True)
class SparseTargets:
    """What targets on some ids have in common: a temperature and a vocabulary that they were made for.

    Args:
        temperature: that the probabilities were made at.
        vocab_size: V, the ids that they were normalised over; the student's softmax is cut to the same.
    """

    temperature: float
    vocab_size: int

    @property
    def head_and_hidden(self) -> None:
        """They need no logits of the teacher."""

    @property
    def whole(self) -> bool:
        """They are a part of a distribution."""
        return False

    def shared_vocab(self, student_vocab: int) -> int:
        """Ids that both sides have."""
        return min(student_vocab, self.vocab_size)

    def refuse_unsuitable(self, kd: KDLoss, temperature: float, student_vocab: int) -> None:
        """Refuses targets that were made for another run."""
        if self.vocab_size > student_vocab:
            raise UserError(
                f"vocabulary: the teacher's stored targets cover {self.vocab_size} ids but the student has "
                f"{student_vocab}; make them anew for this student"
            )
        if not math.isclose(self.temperature, temperature, rel_tol=1e-6):
            raise UserError(
                f"temperature: {temperature:g} but the teacher's stored targets were made at {self.temperature:g}; "
                "set curriculum.temperature to that constant or make them anew"
            )


@dataclass(frozen=True, eq=False, kw_only=True)
class TopKTargets(SparseTargets):
    """The k most probable ids; everything else is one bucket of the remaining probability.

    Args:
        ids_NK: distinct ids per row, inside the shared vocabulary, int64.
        logprobs_NK: their log-probabilities under the whole shared vocabulary, not renormalised.
        log_tail_N: log of the probability of all other ids together; -inf where there are none. It is stored because
            1 minus the sum of what was kept is rounding where the teacher is sure.
    """

    ids_NK: Tensor
    logprobs_NK: Tensor
    log_tail_N: Tensor

    def rows(self, rows: slice) -> Self:
        """The targets of some tokens."""
        return replace(
            self, ids_NK=self.ids_NK[rows], logprobs_NK=self.logprobs_NK[rows], log_tail_N=self.log_tail_N[rows]
        )

    def divergence(
        self,
        kd: KDLoss,
        student_RS: Tensor,
        teacher_RV: Tensor | None,
        rows: slice,
        temperature: float,
        buffers: Buffers,
        gradient: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """See `Targets.divergence`."""
        kept = self.rows(rows)
        return top_k_rows(
            kd, student_RS, kept.ids_NK, kept.logprobs_NK, kept.log_tail_N, temperature, buffers, gradient
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class SampledTargets(SparseTargets):
    """Ids drawn from the teacher with replacement.

    Args:
        ids_NS: ids drawn, inside the shared vocabulary, int64; repetitions add up.
        counts_NS: how often each was drawn; 0 marks an unused place.
        entropy_N: exact entropy of the teacher's distribution in nats.

    Source:
        Sparse Logit Sampling, arXiv 2503.16870.
    """

    ids_NS: Tensor
    counts_NS: Tensor
    entropy_N: Tensor

    def rows(self, rows: slice) -> Self:
        """The targets of some tokens."""
        return replace(self, ids_NS=self.ids_NS[rows], counts_NS=self.counts_NS[rows], entropy_N=self.entropy_N[rows])

    def refuse_unsuitable(self, kd: KDLoss, temperature: float, student_vocab: int) -> None:
        """Refuses targets that were made for another run, and a divergence that is biased on draws."""
        super().refuse_unsuitable(kd, temperature, student_vocab)
        if kd.effective != "forward_kl":
            raise UserError(
                f"divergence: {kd.divergence} is biased on sampled targets; use forward_kl, or dense or top-k targets"
            )

    def divergence(
        self,
        kd: KDLoss,
        student_RS: Tensor,
        teacher_RV: Tensor | None,
        rows: slice,
        temperature: float,
        buffers: Buffers,
        gradient: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """See `Targets.divergence`."""
        drawn = self.rows(rows)
        return sampled_rows(student_RS, drawn.ids_NS, drawn.counts_NS, drawn.entropy_N, temperature, buffers, gradient)


def teacher_logprobs(targets: DenseTargets, temperature: float, shared_vocab: int) -> Tensor:
    """log p at temperature T over the shared ids, (N, D) -> (N, V); fp32, or fp64 for an fp64 teacher."""
    return _scaled_logits(targets, temperature, shared_vocab).log_softmax(-1)


def _scaled_logits(targets: DenseTargets, temperature: float, shared_vocab: int) -> Tensor:
    """The same without its constant: logits / T, to be overwritten."""
    hidden_ND, head = targets.hidden_ND, targets.head
    dtype = logits_dtype(hidden_ND.dtype, hidden_ND.device)
    logits_NV = hidden_ND.new_empty(len(hidden_ND), head.vocab_size, dtype=dtype)
    mm_into(logits_NV, hidden_ND, head.weight.T)
    logits_NV = head.finish_(logits_NV.to(torch.promote_types(dtype, torch.float32)))[:, :shared_vocab]
    return logits_NV if temperature == 1 else logits_NV.mul_(1 / temperature)


def _logits_in_blocks(targets: DenseTargets, temperature: float, shared_vocab: int) -> Iterator[Tensor]:
    """Logits / T, to be overwritten, as many rows at a time as stay in a CPU's cache, elsewhere as a product has."""
    rows = max(1, _CHUNK_ELEMENTS // targets.head.vocab_size)
    for hidden_ND in targets.hidden_ND.split(rows):
        logits_NV = _scaled_logits(DenseTargets(hidden_ND, targets.head), 1.0, shared_vocab)
        block = max(1, _BLOCK_ELEMENTS_CPU // shared_vocab) if logits_NV.device.type == "cpu" else rows
        for logits_RV in logits_NV.split(block):
            yield logits_RV if temperature == 1 else logits_RV.mul_(1 / temperature)


@torch.no_grad()
def top_k_targets(targets: DenseTargets, k: int, temperature: float, shared_vocab: int | None = None) -> TopKTargets:
    """Dense targets cut down to k ids per token, (N, D) -> 2 x (N, K), (N).

    Args:
        targets: the dense ones.
        k: ids to keep; all of them if there are fewer.
        temperature: KD temperature T of the run that will use them.
        shared_vocab: ids that student and teacher share; the teacher's whole vocabulary when None.
    """
    vocab = targets.head.vocab_size if shared_vocab is None else shared_vocab
    ids, logprobs, tails = [], [], []
    for logits_NV in _logits_in_blocks(targets, temperature, vocab):
        kept = logits_NV.topk(min(k, vocab), dim=-1)
        # Kept ids and the others apart make up the normaliser: one pass less than a softmax, and none is a difference.
        tail_N = logits_NV.scatter_(1, kept.indices, -torch.inf).logsumexp(-1)
        total_N = torch.logaddexp(kept.values.logsumexp(-1), tail_N)
        ids.append(kept.indices)
        logprobs.append(kept.values - total_N[:, None])
        tails.append(tail_N - total_N)
    return TopKTargets(
        ids_NK=torch.cat(ids),
        logprobs_NK=torch.cat(logprobs),
        log_tail_N=torch.cat(tails),
        temperature=temperature,
        vocab_size=vocab,
    )


@torch.no_grad()
def sampled_targets(
    targets: DenseTargets,
    draws: int,
    temperature: float,
    shared_vocab: int | None = None,
    generator: torch.Generator | None = None,
) -> SampledTargets:
    """Draws from dense targets with replacement, (N, D) -> 2 x (N, S) with S = draws, (N).

    Args:
        targets: the dense ones.
        draws: ids to draw per token.
        temperature: KD temperature T of the run that will use them.
        shared_vocab: ids that student and teacher share; the teacher's whole vocabulary when None.
        generator: source of randomness on the targets' device.
    """
    vocab = targets.head.vocab_size if shared_vocab is None else shared_vocab
    ids, counts, entropy = [], [], []
    for logits_NV in _logits_in_blocks(targets, temperature, vocab):
        probs_NV = logits_NV.softmax(-1)
        # At least two, for of a single draw CUDA checks the probabilities on the host.
        drawn_NS = torch.multinomial(probs_NV, max(2, draws), replacement=True, generator=generator)[:, :draws]
        drawn_NS = drawn_NS.sort(-1).values
        is_new_NS = torch.ones_like(drawn_NS)
        is_new_NS[:, 1:] = drawn_NS[:, 1:] != drawn_NS[:, :-1]
        place_NS = is_new_NS.cumsum(-1) - 1  # equal ids are neighbours and share a place
        ids.append(torch.zeros_like(drawn_NS).scatter_(1, place_NS, drawn_NS))
        counts.append(
            torch.zeros_like(probs_NV[:, :1])
            .expand(-1, draws)
            .clone()
            .scatter_add_(1, place_NS, torch.ones_like(place_NS, dtype=probs_NV.dtype))
        )
        # H = -log of the largest - sum p (x - largest x); an id that cannot come adds 0 x floor.
        below_NV = logits_NV.sub_(logits_NV.amax(-1, keepdim=True)).clamp_min_(LOG_FLOOR)
        entropy.append(-probs_NV.amax(-1).log() - torch.linalg.vecdot(probs_NV, below_NV))
    return SampledTargets(
        ids_NS=torch.cat(ids),
        counts_NS=torch.cat(counts),
        entropy_N=torch.cat(entropy),
        temperature=temperature,
        vocab_size=vocab,
    )
