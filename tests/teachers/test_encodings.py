"""What each encoding keeps and loses, against the targets that it was made of and float64."""

import math

import pytest
import torch

from distill.losses.engine.divergence import KDLoss
from distill.losses.engine.loss import distillation_loss
from distill.models.head import LMHead
from distill.teachers.encodings import (
    GAP_RATE,
    GAP_SCALE,
    Block,
    Hidden,
    Sampled,
    TopK,
    described,
    encoding_of,
    id_bits,
    pack_ids,
    unpack_ids,
)
from distill.teachers.targets import DenseTargets, sampled_targets, teacher_logprobs, top_k_targets

N, D = 12, 16
DIVERGENCES = ["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation"]


def dense(vocabulary: int, gap: float | None = None) -> DenseTargets:
    """Random targets; with a gap, each token's first logit stands that far above the others, which differ by a few."""
    weight_VD, hidden_ND = torch.randn(vocabulary, D), torch.randn(N, D)
    if gap is not None:
        weight_VD[:, 0], hidden_ND[:, 0] = 0.0, 1.0
        weight_VD[0] = 0.0
        weight_VD[0, 0] = gap + 12.0
    return DenseTargets(hidden_ND, LMHead(weight_VD))


@pytest.mark.parametrize("bits", [1, 3, 8, 9, 16, 18, 25])
def test_ids_take_their_bits_and_come_back(bits):
    counts_N, ids_NS = torch.randint(0, 8, (50,)), torch.randint(0, 1 << bits, (50, 7))
    stream = pack_ids(ids_NS, counts_N, bits)
    assert stream.numel() == sum(math.ceil(count * bits / 8) for count in counts_N.tolist())
    there_NS = torch.arange(7) < counts_N[:, None]
    assert torch.equal(unpack_ids(stream, counts_N, bits, 7), ids_NS * there_NS)
    all_N = torch.full((50,), 7)
    assert torch.equal(unpack_ids(pack_ids(ids_NS, all_N, bits), all_N, bits, 7), ids_NS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_states_are_exact_up_to_their_dtype(dtype):
    whole = dense(64)
    encoding = encoding_of(described(Hidden(dtype)))
    block = encoding.encode(whole, seed=0)
    assert block.record_NW.shape == (N, encoding.record_bytes(D)) == (N, D * dtype.itemsize)
    assert torch.equal(encoding.decode(block, whole.head).hidden_ND, whole.hidden_ND.to(dtype).float())


@pytest.mark.parametrize("k", [1, 2, 3, 4, 64])
@pytest.mark.parametrize("vocabulary", [64, 5000])
def test_kept_log_probabilities_are_within_the_stated_bound(k, vocabulary):
    whole, encoding = dense(vocabulary), TopK(k, 2.0, vocabulary)
    exact = top_k_targets(whole, k, 2.0)
    stored = encoding_of(described(encoding)).decode(encoding.encode(whole, seed=0), whole.head)
    assert torch.equal(stored.ids_NK, exact.ids_NK)
    assert torch.equal(stored.log_tail_N, exact.log_tail_N)
    error_NK = (stored.logprobs_NK - exact.logprobs_NK).abs()
    gap_NK = -exact.logprobs_NK.diff(dim=-1, prepend=exact.logprobs_NK[:, :1])
    allowed = torch.full_like(error_NK[:, 0], math.log(vocabulary) / 131070)
    for place in range(k):
        if place > 0:
            own = 0.0005 if place <= 2 else math.expm1(GAP_RATE / 2) * (gap_NK[:, place] + allowed + GAP_SCALE)
            allowed = torch.maximum(allowed, torch.as_tensor(own).expand(N))
        assert (error_NK[:, place] <= allowed * 1.001 + 2e-6).all(), place


def buckets(logprobs_NV: torch.Tensor, ids_NK: torch.Tensor) -> torch.Tensor:
    """log of k probabilities and of the mass of the rest, float64."""
    kept = logprobs_NV.gather(1, ids_NK)
    rest = logprobs_NV.scatter(1, ids_NK, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([kept, rest], -1)


def plain(name: str, log_p: torch.Tensor, log_q: torch.Tensor, temperature: float) -> torch.Tensor:
    """The divergences as their definitions read."""
    kl = lambda a, b: (a.exp() * (a - b)).sum()  # noqa: E731
    mixed = lambda share, a, b: torch.logaddexp(a + math.log(share), b + math.log1p(-share))  # noqa: E731
    return {
        "forward_kl": lambda: kl(log_p, log_q),
        "reverse_kl": lambda: kl(log_q, log_p),
        "jsd": lambda: 0.5 * kl(log_p, mixed(0.5, log_p, log_q)) + 0.5 * kl(log_q, mixed(0.5, log_p, log_q)),
        "skew_forward_kl": lambda: kl(log_p, mixed(0.1, log_p, log_q)),
        "skew_reverse_kl": lambda: kl(log_q, mixed(0.1, log_q, log_p)),
        "total_variation": lambda: (log_p.exp() - log_q.exp()).abs().sum() / 2,
    }[name]() * (temperature if name == "total_variation" else temperature**2)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_tail_of_a_teacher_that_stands_30_above_the_rest_is_right_from_disk(name):
    """fp32 targets from disk and the fp32 engine, beside float64 with what was stored of the kept ids."""
    vocabulary, k, temperature = 500, 8, 1.0
    whole, encoding = dense(vocabulary, gap=30.0), TopK(k, temperature, vocabulary)
    stored = encoding.decode(encoding.encode(whole, seed=0), whole.head)
    exact_NV = (whole.hidden_ND.double() @ whole.head.weight.double().T).log_softmax(-1)
    tail_N1 = buckets(exact_NV, stored.ids_NK)[:, -1:]
    assert ((exact_NV[:, 0] - exact_NV[:, 1:].amax(-1)) > 20).all()
    assert (stored.log_tail_N.double() - tail_N1[:, 0]).abs().max() < 1e-5 * tail_N1.abs().max()

    student_VD, hidden_ND = torch.randn(vocabulary, D), torch.randn(N, D, requires_grad=True)
    labels_N = torch.zeros(N, dtype=torch.long)
    kd = KDLoss(name, top_k=k)
    head = LMHead(student_VD)
    loss = distillation_loss(hidden_ND, head, labels_N, stored, kd=kd, temperature=temperature, kd_weight=1.0).loss
    (gradient,) = torch.autograd.grad(loss, hidden_ND)

    wide_ND = hidden_ND.detach().double().requires_grad_()
    log_q = buckets((wide_ND @ student_VD.double().T / temperature).log_softmax(-1), stored.ids_NK)
    log_p = torch.cat([stored.logprobs_NK.double(), tail_N1], -1).log_softmax(-1)
    expected = plain(name, log_p, log_q, temperature)
    (expected_gradient,) = torch.autograd.grad(expected, wide_ND)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (gradient - expected_gradient).norm() <= 1e-5 * expected_gradient.norm()


@pytest.mark.parametrize("vocabulary", [40, 320, 5000])
def test_draws_from_disk_are_the_live_draws_of_the_same_seed(vocabulary):
    whole, encoding = dense(vocabulary), Sampled(50, 2.0, vocabulary)
    block = encoding.encode(whole, seed=7)
    live = sampled_targets(whole, 50, 2.0, vocabulary, torch.Generator().manual_seed(7))
    stored = encoding_of(described(encoding)).decode(block, whole.head)
    for name in ("ids_NS", "counts_NS", "entropy_N"):
        assert torch.equal(getattr(stored, name), getattr(live, name)), name
    distinct = (live.counts_NS > 0).sum(-1)
    size = sum(math.ceil(count * id_bits(vocabulary) / 8) for count in distinct.tolist())
    assert (block.record_NW.shape, block.stream.numel()) == ((N, 11), size)


def test_a_thousand_draws_from_disk_are_right_on_average():
    vocabulary = 40
    whole, encoding = dense(vocabulary), Sampled(10, 1.5, vocabulary)
    hidden_ND, head, labels_N = torch.randn(N, D), LMHead(torch.randn(vocabulary, D)), torch.zeros(N, dtype=torch.long)

    def value(targets) -> float:
        options = {"kd": KDLoss(), "temperature": 1.5, "kd_weight": 0.0}
        return float(distillation_loss(hidden_ND, head, labels_N, targets, **options).kd_sum)

    values = torch.tensor([value(encoding.decode(encoding.encode(whole, s), whole.head)) for s in range(1000)])
    assert abs(values.mean() - value(whole)) < 3 * values.std() / math.sqrt(1000)


@pytest.mark.parametrize("gap", [None, 31.0])
def test_fewer_ids_than_were_stored_put_the_others_into_the_tail(gap):
    whole, temperature = dense(320, gap), 2.0 if gap is None else 1.0
    encoding = TopK(20, temperature, 320)
    fewer = encoding.first(encoding.decode(encoding.encode(whole, 0), whole.head), 5)
    exact = top_k_targets(whole, 5, temperature)
    assert gap is None or exact.log_tail_N.max() < -17, "of which fp32 knows nothing beside 1"
    assert torch.equal(fewer.ids_NK, exact.ids_NK)
    torch.testing.assert_close(fewer.log_tail_N, exact.log_tail_N, atol=2e-2, rtol=0)


def test_no_tokens_are_no_trouble():
    whole = DenseTargets(torch.zeros(0, D), LMHead(torch.randn(320, D)))
    for encoding in (Hidden(torch.float32), TopK(4, 1.0, 320), Sampled(50, 1.0, 320)):
        empty = Block(torch.zeros(0, encoding.record_bytes(D), dtype=torch.uint8), torch.zeros(0, dtype=torch.uint8))
        targets = encoding.decode(empty, whole.head)
        assert len(next(value for value in vars(targets).values() if isinstance(value, torch.Tensor))) == 0


def test_records_are_as_small_as_promised():
    assert TopK(64, 2.0, 49_152).record_bytes(576) == 199
    assert Sampled(50, 2.0, 49_152).record_bytes(576) == 11
    assert teacher_logprobs(dense(64), 1.0, 64).shape == (N, 64)
