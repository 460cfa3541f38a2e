"""Targets across tokenizers in a world that can be counted out, and through the engine as any others."""

import itertools

import numpy as np
import pytest
import torch

from distill.losses.engine.divergence import KDLoss
from distill.losses.engine.loss import distillation_loss
from distill.models.head import LMHead
from distill.teachers.mapped import MappedTargets
from distill.teachers.targets import DenseTargets
from helpers.toy_world import CROSSING, LENGTH, LONG, SHORT, toy, world

CASES = {"shorter": (LONG, SHORT), "longer": (SHORT, LONG), "crossing": CROSSING, "identical": (LONG, LONG)}
# total variation of the mean target from what is right: by tables, and looking ahead; of classes
EXPECTED = {
    "shorter": (0.0, 0.0), "longer": (0.0541, 0.0011), "crossing": (0.1208, 0.0), "identical": (0.0, 0.0)
}  # fmt: skip


@pytest.fixture(scope="module")
def toys():
    return {name: toy(*merges) for name, merges in CASES.items()}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("look_ahead", [False, True])
def test_the_mean_target_is_what_the_student_should_learn(toys, name, look_ahead):
    found = toys[name]
    p_NS, mapped_N, _ = found.targets(look_ahead)
    assert torch.allclose(p_NS.sum(-1), torch.ones_like(mapped_N))
    error = found.error(p_NS.numpy(), classes=found.pair.classes)
    assert error == pytest.approx(EXPECTED[name][look_ahead], abs=6e-5)


def test_aligned_places_alone_are_biased(toys):
    found = toys["shorter"]
    p_NS, _, _ = found.targets()
    assert found.error(p_NS.numpy(), found.pairs.spelling.group_N == 0) > 0.05


def test_within_the_class_that_was_looked_ahead_to_ids_are_nearly_right(toys):
    found = toys["longer"]
    p_NS, _, class_N = found.targets(True)
    assert (class_N >= 0).any()
    assert found.error(p_NS.numpy()) < 0.3 * found.error(found.targets()[0].numpy())


def test_a_student_of_letters_learns_the_odds_of_letters():
    found = toy(LONG, [])
    p_NS, _, _ = found.targets()
    texts = world()
    student = found.pair.student
    mean: dict[bytes, np.ndarray] = {}
    odds: dict[bytes, float] = {}
    for key, weight, row in zip(found.key_N, found.weight_N, p_NS.numpy(), strict=True):
        written = student.text(key)
        mean[written] = mean.get(written, 0) + weight * row
        odds[written] = odds.get(written, 0.0) + weight
    for length in range(LENGTH):
        for letters in itertools.product(b"abc", repeat=length):
            written = bytes(letters)
            behind = [sum(w for text, w in texts if text.startswith(written + x)) for x in (b"a", b"b", b"c")]
            row = mean[written] / odds[written]
            ids = [student.ids[x] for x in (b"a", b"b", b"c")]
            np.testing.assert_allclose(row[ids], np.array(behind) / sum(behind), atol=1e-9)


def test_finer_boundaries_lose_those_of_the_teacher_and_nothing_else(toys):
    """-log q along a text is the teacher's nats, less those that it spends on where its tokens end."""
    found = toys["shorter"]
    p_NS, _, _ = found.targets()
    spelling, logits = found.pairs.spelling, found.logits_TV
    tokens, ids = found.pair.teacher.tokens, spelling.ids_T
    place, inside, label = spelling.place_N, spelling.inside_N, spelling.label_N
    for n in range(0, len(place), 97):
        row, seen = logits[place[n]].exp(), tokens[ids[place[n] + 1]][: inside[n]]
        mass = sum(row[t] for t, token in enumerate(tokens) if token and token.startswith(seen) and token != seen)
        rest = {t: token[len(seen) :] for t, token in enumerate(tokens) if token and token.startswith(seen)}
        led = sum(row[t] for t, left in rest.items() if left and found.pair.student.encode(left)[0] == label[n])
        if not seen:
            mass = mass + row[0]  # the end
        torch.testing.assert_close(p_NS[n, label[n]], led / mass)


def through_the_engine(found, look_ahead=False, **options):
    """The loss of some positions and its gradients, a random student's."""
    torch.manual_seed(1)
    count, width = 60, 5
    hidden = torch.randn(count, width, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(found.pair.student.size + 2, width, dtype=torch.float64, requires_grad=True)
    teacher = LMHead(torch.eye(found.pair.teacher.size, dtype=torch.float64))
    targets = MappedTargets(found.logits_TV[found.pairs.teacher_N], teacher, found.tables, found.pairs)
    labels = torch.zeros(count, dtype=torch.long)
    out = distillation_loss(hidden, LMHead(weight), labels, targets, **{"kd": KDLoss(), **options})
    return out, torch.autograd.grad(out.loss, [hidden, weight])


@pytest.mark.parametrize("chunk_size", [1, 7, 60])
@pytest.mark.parametrize("name", ["longer", "crossing"])
def test_chunks_make_no_difference(toys, chunk_size, name):
    options = {"kd_weight": 0.7, "lm_weight": 0.2, "temperature": 1.5}
    whole, parts = (through_the_engine(toys[name], chunk_size=size, **options) for size in (None, chunk_size))
    torch.testing.assert_close(whole[0].loss, parts[0].loss)
    torch.testing.assert_close(whole[1], parts[1])


def test_the_same_tokenizer_gives_the_loss_of_plain_distillation(toys):
    found = toys["identical"]
    out, gradients = through_the_engine(found, kd_weight=1.0, temperature=2.0)
    torch.manual_seed(1)
    hidden = torch.randn(60, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(found.pair.student.size + 2, 5, dtype=torch.float64, requires_grad=True)
    head = LMHead(torch.eye(found.pair.teacher.size, dtype=torch.float64))
    dense = DenseTargets(found.logits_TV[found.pairs.teacher_N[:60]], head)
    plain = distillation_loss(
        hidden, LMHead(weight), torch.zeros(60, dtype=torch.long), dense, kd=KDLoss(), kd_weight=1.0, temperature=2.0
    )
    torch.testing.assert_close(out.loss, plain.loss)
    torch.testing.assert_close(gradients, torch.autograd.grad(plain.loss, [hidden, weight]))


def test_statistics_are_of_the_student_alone(toys):
    out, _ = through_the_engine(toys["longer"], kd_weight=1.0, metrics=True)
    assert out.stats is not None
    assert out.stats.teacher_nll is None
    assert out.kd_sum > 0
