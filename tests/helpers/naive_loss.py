"""The KD and LM loss with all logits at once, by autograd, and the cases that the engine is held to it on."""

import torch
from torch.nn.functional import cross_entropy

from distill.losses.engine import divergence
from distill.models.head import LMHead
from distill.teachers.targets import DenseTargets, SampledTargets, TopKTargets, sampled_targets, top_k_targets

DIVERGENCES = {
    "forward_kl": divergence.forward_kl,
    "reverse_kl": divergence.reverse_kl,
    "jsd": divergence.generalized_jsd,
    "skew_forward_kl": divergence.skew_forward_kl,
    "skew_reverse_kl": divergence.skew_reverse_kl,
    "total_variation": divergence.total_variation,
}
HEADS = {
    "plain": {},
    "soft-cap": {"softcap": 6.0},
    "scale": {"scale": 0.4},
    "bias": {"bias": True},
    "all": {"softcap": 6.0, "scale": 1.5, "bias": True},
}
N, STUDENT_D, TEACHER_D, V = 11, 6, 9, 37


def make_head(width, vocab=V, bias=False, dtype=torch.float64, **options) -> LMHead:
    weight = torch.randn(vocab, width, dtype=dtype, requires_grad=True)
    return LMHead(weight, torch.randn(vocab, dtype=dtype, requires_grad=True) if bias else None, **options)


def make_case(head="plain", student_vocab=V, teacher_vocab=V, dtype=torch.float64):
    """Student hidden states, head, labels and dense targets."""
    hidden = torch.randn(N, STUDENT_D, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, min(student_vocab, teacher_vocab), (N,))
    targets = DenseTargets(
        torch.randn(N, TEACHER_D, dtype=dtype), make_head(TEACHER_D, teacher_vocab, dtype=dtype, **HEADS[head])
    )
    return hidden, make_head(STUDENT_D, student_vocab, dtype=dtype, **HEADS[head]), labels, targets


def bucketed(logprobs, ids):
    """Log-probabilities of the ids and of all others together, by a loop over rows."""
    rows = []
    for row, kept in zip(logprobs, ids, strict=True):
        others = [row[i] for i in range(len(row)) if i not in kept.tolist()]
        rows.append(torch.cat([row[kept], torch.stack(others).logsumexp(0, keepdim=True)]))
    return torch.stack(rows)


def naive(hidden, head, labels, targets, kd, temperature, kd_weight, lm_weight, dense=None):
    """The same loss with all logits at once, by autograd; `dense` are the targets that sparse ones were made from."""
    dense = dense or targets
    logits = head.logits(hidden)
    shared = min(logits.shape[1], dense.head.vocab_size)
    log_q = (logits[:, :shared] / temperature).log_softmax(-1)
    log_p = (dense.head.logits(dense.hidden_ND).detach()[:, :shared] / temperature).log_softmax(-1)
    option = {"jsd": {"beta": kd.beta}, "skew_forward_kl": {"alpha": kd.alpha}, "skew_reverse_kl": {"alpha": kd.alpha}}
    measure = DIVERGENCES[kd.divergence]
    if isinstance(targets, TopKTargets):
        log_q, log_p = bucketed(log_q, targets.ids_NK), bucketed(log_p, targets.ids_NK)
    if isinstance(targets, SampledTargets):
        value = torch.zeros((), dtype=hidden.dtype)
        for n in range(len(hidden)):
            draws = targets.counts_NS[n].sum()
            for index, count in zip(targets.ids_NS[n], targets.counts_NS[n], strict=True):
                value = value - count / draws * log_q[n, index]
            value = value + (log_p[n].exp() * log_p[n]).sum()
    else:
        value = measure(log_q, log_p, **option.get(kd.divergence, {})).sum()
    factor = temperature if kd.divergence == "total_variation" else temperature**2
    kd_sum = kd.coefficient * factor * value
    lm_sum = cross_entropy(logits, labels, reduction="sum")
    return (kd_weight or 0) * kd_sum + (lm_weight or 0) * lm_sum, kd_sum, lm_sum


def gradients(loss, hidden, head):
    inputs = [hidden, head.weight] + ([] if head.bias is None else [head.bias])
    return torch.autograd.grad(loss, inputs)


def assert_same(ours, theirs, tolerance):
    """Equal up to the tolerance, relative to the largest element."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * max(theirs.abs().max().item(), 1e-3))


TAUGHT = [*(("dense", d) for d in DIVERGENCES), *(("top-k", d) for d in DIVERGENCES), ("sampled", "forward_kl")]


def sparse(kind, targets, temperature, shared=None):
    if kind == "top-k":
        return top_k_targets(targets, 5, temperature, shared)
    if kind == "sampled":
        return sampled_targets(targets, 12, temperature, shared)
    return targets
