"""What a loss may know about the teacher: one of three kinds of targets per token, never the model itself.

Dense targets are exact and carry the teacher's head. Sparse ones are small on disk and lose something: top-k keeps k
probabilities and puts the rest into one bucket, a lower bound of the dense value; samples are unbiased, but for forward
KL only, and noisy. Both are bound to the temperature that they were made at.

Shapes: N tokens, D teacher hidden width, V shared vocabulary, K ids kept, S distinct ids drawn.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distill.models.head import LMHead, logits_dtype, mm_into

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


@dataclass(frozen=True, eq=False)
class TopKTargets:
    """The k most probable ids; everything else is one bucket of the remaining probability.

    Args:
        ids_NK: distinct ids per row, inside the shared vocabulary, int64.
        logprobs_NK: their log-probabilities under the whole shared vocabulary, not renormalised.
        temperature: that the probabilities were made at.
        vocab_size: V, the ids that they were normalised over; the student's softmax is cut to the same.
    """

    ids_NK: Tensor
    logprobs_NK: Tensor
    temperature: float
    vocab_size: int

    def rows(self, rows: slice) -> "TopKTargets":
        """The targets of some tokens."""
        return replace(self, ids_NK=self.ids_NK[rows], logprobs_NK=self.logprobs_NK[rows])


@dataclass(frozen=True, eq=False)
class SampledTargets:
    """Ids drawn from the teacher with replacement.

    Args:
        ids_NS: ids drawn, inside the shared vocabulary, int64; repetitions add up.
        counts_NS: how often each was drawn; 0 marks an unused place.
        entropy_N: exact entropy of the teacher's distribution in nats.
        temperature: that the distribution was made at.
        vocab_size: V, the ids that it was normalised over; the student's softmax is cut to the same.

    Source:
        Sparse Logit Sampling, arXiv 2503.16870.
    """

    ids_NS: Tensor
    counts_NS: Tensor
    entropy_N: Tensor
    temperature: float
    vocab_size: int

    def rows(self, rows: slice) -> "SampledTargets":
        """The targets of some tokens."""
        return replace(self, ids_NS=self.ids_NS[rows], counts_NS=self.counts_NS[rows], entropy_N=self.entropy_N[rows])


Targets = DenseTargets | TopKTargets | SampledTargets


def teacher_logprobs(targets: DenseTargets, temperature: float, shared_vocab: int) -> Tensor:
    """log p at temperature T over the shared ids, (N, D) -> (N, V); fp32, or fp64 for an fp64 teacher."""
    hidden_ND, head = targets.hidden_ND, targets.head
    dtype = logits_dtype(hidden_ND.dtype, hidden_ND.device)
    logits_NV = hidden_ND.new_empty(len(hidden_ND), head.vocab_size, dtype=dtype)
    mm_into(logits_NV, hidden_ND, head.weight.T)
    logits_NV = head.finish_(logits_NV.to(torch.promote_types(dtype, torch.float32)))[:, :shared_vocab]
    return torch.log_softmax(logits_NV / temperature, dim=-1)


def _chunked(targets: DenseTargets) -> list[DenseTargets]:
    rows = max(1, _CHUNK_ELEMENTS // targets.head.vocab_size)
    return [DenseTargets(hidden_ND, targets.head) for hidden_ND in targets.hidden_ND.split(rows)]


@torch.no_grad()
def top_k_targets(targets: DenseTargets, k: int, temperature: float, shared_vocab: int | None = None) -> TopKTargets:
    """Dense targets cut down to k ids per token, (N, D) -> 2 x (N, K).

    Args:
        targets: the dense ones.
        k: ids to keep; all of them if there are fewer.
        temperature: KD temperature T of the run that will use them.
        shared_vocab: ids that student and teacher share; the teacher's whole vocabulary when None.
    """
    vocab = targets.head.vocab_size if shared_vocab is None else shared_vocab
    parts = [teacher_logprobs(t, temperature, vocab).topk(min(k, vocab), dim=-1) for t in _chunked(targets)]
    return TopKTargets(torch.cat([p.indices for p in parts]), torch.cat([p.values for p in parts]), temperature, vocab)


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
    for part in _chunked(targets):
        logprobs_NV = teacher_logprobs(part, temperature, vocab)
        probs_NV = logprobs_NV.exp()
        drawn_NS = torch.multinomial(probs_NV, draws, replacement=True, generator=generator).sort(-1).values
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
        entropy.append(-torch.xlogy(probs_NV, probs_NV).sum(-1))
    return SampledTargets(torch.cat(ids), torch.cat(counts), torch.cat(entropy), temperature, vocab)
