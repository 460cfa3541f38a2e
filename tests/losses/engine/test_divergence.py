"""The divergences against scipy, hand computation and plain loops over floats."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr
from scipy.stats import entropy

from distill.errors import UserError
from distill.losses.engine.divergence import (
    KDLoss,
    divergence_rows_,
    forward_kl,
    generalized_jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    total_variation,
)


@pytest.fixture
def pair():
    """Student and teacher log-probabilities, 6 rows of 11, fp64."""
    student, teacher = torch.randn(2, 6, 11, dtype=torch.float64) * 3
    return student.log_softmax(-1), teacher.log_softmax(-1)


def loop(divergence, row_q, row_p, beta=0.5, alpha=0.1) -> float:
    """The definitions, one float at a time."""
    p, q = [math.exp(x) for x in row_p], [math.exp(x) for x in row_q]
    kl = lambda a, b: sum(x * (math.log(x) - math.log(y)) for x, y in zip(a, b, strict=True))  # noqa: E731
    mix = lambda a, b, w: [w * x + (1 - w) * y for x, y in zip(a, b, strict=True)]  # noqa: E731
    match divergence:
        case "forward_kl":
            return kl(p, q)
        case "reverse_kl":
            return kl(q, p)
        case "jsd":
            return beta * kl(p, mix(p, q, beta)) + (1 - beta) * kl(q, mix(p, q, beta))
        case "skew_forward_kl":
            return kl(p, mix(p, q, alpha))
        case "skew_reverse_kl":
            return kl(q, mix(q, p, alpha))
        case "total_variation":
            return sum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2
    raise AssertionError(divergence)


FUNCTIONS = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": generalized_jsd,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "total_variation": total_variation,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_matches_loop_over_floats(name, pair):
    expected = [loop(name, q, p) for q, p in zip(*(x.tolist() for x in pair), strict=True)]
    torch.testing.assert_close(FUNCTIONS[name](*pair), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_kl_matches_scipy(pair):
    q, p = (x.exp().numpy() for x in pair)
    np.testing.assert_allclose(forward_kl(*pair), entropy(p, q, axis=-1), rtol=1e-12)
    np.testing.assert_allclose(reverse_kl(*pair), rel_entr(q, p).sum(-1), rtol=1e-12)


def test_jsd_matches_scipy(pair):
    q, p = (x.exp().numpy() for x in pair)
    np.testing.assert_allclose(generalized_jsd(*pair, beta=0.5), jensenshannon(p, q, axis=-1) ** 2, rtol=1e-12)


def test_hand_computed_values():
    p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    assert forward_kl(q, p).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert reverse_kl(q, p).item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert total_variation(q, p).item() == pytest.approx(0.25)
    mixture = (0.375, 0.625)
    assert generalized_jsd(q, p).item() == pytest.approx(
        0.5 * (0.5 * math.log(0.5 / mixture[0]) + 0.5 * math.log(0.5 / mixture[1]))
        + 0.5 * (0.25 * math.log(0.25 / mixture[0]) + 0.75 * math.log(0.75 / mixture[1]))
    )


def test_jsd_end_points_are_the_kls_where_the_formula_tends_to_zero(pair):
    assert torch.equal(generalized_jsd(*pair, beta=0), forward_kl(*pair))
    assert torch.equal(generalized_jsd(*pair, beta=1), reverse_kl(*pair))
    assert (generalized_jsd(*pair, beta=1e-6) < 1e-4 * forward_kl(*pair)).all()


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_is_symmetric_under_exchange_of_roles(pair, beta):
    q, p = pair
    torch.testing.assert_close(generalized_jsd(q, p, beta), generalized_jsd(p, q, 1 - beta), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_zero_at_the_teacher_and_positive_elsewhere(name, pair):
    torch.testing.assert_close(FUNCTIONS[name](pair[1], pair[1]), torch.zeros(6).double(), rtol=0, atol=1e-15)
    assert (FUNCTIONS[name](*pair) > 0.01).all()


def test_skewed_divergences_are_bounded_where_the_kls_are_not():
    p = torch.tensor([0.0, -torch.inf], dtype=torch.float64)  # the two have nothing in common
    q = torch.tensor([-torch.inf, 0.0], dtype=torch.float64)
    assert skew_forward_kl(q, p).item() == pytest.approx(-math.log(0.1))
    assert skew_reverse_kl(q, p).item() == pytest.approx(-math.log(0.1))
    assert total_variation(q, p).item() == 1
    assert generalized_jsd(q, p).item() == pytest.approx(math.log(2))
    assert forward_kl(q, p).item() == 1e5  # the floor of a log-probability


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ids_that_the_teacher_excludes_add_nothing(name, dtype):
    student = torch.tensor([1.0, 0.5, -torch.inf], dtype=dtype).log_softmax(-1)
    teacher = torch.tensor([0.0, 2.0, -torch.inf], dtype=dtype).log_softmax(-1)
    expected = FUNCTIONS[name](student[:2], teacher[:2])
    torch.testing.assert_close(FUNCTIONS[name](student, teacher), expected)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("beta", [0, 0.3, 1])
def test_rows_with_gradient_match_autograd_through_the_function(name, beta):
    kd = KDLoss(name, beta=beta, alpha=0.2)
    options = {"jsd": {"beta": beta}, "skew_forward_kl": {"alpha": 0.2}, "skew_reverse_kl": {"alpha": 0.2}}
    logits, teacher = torch.randn(2, 6, 11, dtype=torch.float64) * 3
    logits.requires_grad_()
    log_q, log_p = logits.log_softmax(-1), teacher.log_softmax(-1)
    expected = FUNCTIONS[name](log_q, log_p, **options.get(name, {}))
    (expected_gradient,) = torch.autograd.grad(expected.sum(), logits)
    rows = [x.detach().clone() for x in (log_q, log_p, log_q.exp(), log_p.exp(), log_p)]
    value, gradient = divergence_rows_(kd, *rows, gradient=True)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"divergence": "kl"}, "divergence: 'kl'"),
        ({"beta": 1.5}, "beta: 1.5"),
        ({"alpha": 0.0}, "alpha: 0.0"),
        ({"coefficient": 0.0}, "coefficient: 0.0"),
        ({"coefficient": math.nan}, "coefficient: nan"),
    ],
)
def test_options_outside_their_range_are_refused(options, said):
    with pytest.raises(UserError, match=said):
        KDLoss(**options)


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 1])
@pytest.mark.filterwarnings("ignore")
def test_matches_trl(pair, beta):
    """TRL takes logits, returns the mean over tokens, has no T^2; the gradient passes through its mixture as here."""
    gkd = pytest.importorskip("trl.experimental.gkd")
    student, teacher = (x.clone() for x in pair)
    student.requires_grad_()
    labels = torch.zeros(1, 6, dtype=torch.long)
    theirs = gkd.GKDTrainer.generalized_jsd_loss(student[None], teacher[None], labels, beta=beta, temperature=2.0)
    (their_gradient,) = torch.autograd.grad(theirs, student)
    ours = generalized_jsd((student / 2).log_softmax(-1), (teacher / 2).log_softmax(-1), beta).mean()
    (our_gradient,) = torch.autograd.grad(ours, student)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-8, atol=1e-14)
