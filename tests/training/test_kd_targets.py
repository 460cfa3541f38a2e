"""KD at the step's own temperature, on all ids, the k most probable or drawn ones, against plain softmaxes."""

import csv
from pathlib import Path

import pytest
import torch
from torch.nn.functional import kl_div

from distill.batch import Batch, Tokens
from distill.errors import UserError
from distill.losses.engine.divergence import KDLoss
from distill.losses.engine.loss import distillation_loss
from distill.models.head import lm_head_of
from distill.teachers.online import OnlineTeacher
from distill.teachers.source import Run
from distill.teachers.targets import DenseTargets, sampled_targets, top_k_targets
from distill.training.callbacks.curriculum import Curriculum
from distill.training.objective import objective
from helpers import tiny

SOFT_TO_HARD, HARD_TO_SOFT = [[0.0, 4.0], [1.0, 1.0]], [[0.0, 1.0], [1.0, 4.0]]
B, L = 2, 8


@pytest.fixture
def models():
    teacher = tiny.tiny_llama(num_hidden_layers=3)
    student = tiny.tiny_llama(hidden_size=24)
    return student, OnlineTeacher(teacher)


@pytest.fixture
def batch():
    ids = torch.randint(tiny.VOCAB, (B, L))
    positions = torch.arange(B * L).view(B, L)[:, :-1].flatten()
    tokens = Tokens(ids, ids, torch.ones_like(ids), torch.arange(L).expand(B, L), positions, packed=False)
    units = {"tokens": len(positions), "queries": len(positions), "micro_batches": 1}
    return Batch(tokens, tokens, units, bytes=40)


def losses(models, batch, state, kd, **options):
    student, teacher = models
    teacher.open(Run(kd, {}, tiny.VOCAB))
    return objective(batch, student, teacher, ["kd_loss"], state, 1.0, kd=kd, **options)


def log_softmaxes(models, batch, temperature):
    student, teacher = models
    return (
        (model(batch.student.input_ids).logits[:, :-1].flatten(0, 1) / temperature).log_softmax(-1)
        for model in (student, teacher.model)
    )


@pytest.mark.parametrize(("schedule", "expected"), [(SOFT_TO_HARD, (4.0, 2.5, 1.0)), (HARD_TO_SOFT, (1.0, 2.5, 4.0))])
def test_value_and_gradient_carry_the_square_of_the_steps_own_temperature(models, batch, schedule, expected):
    curriculum, weight = Curriculum(kd=1.0, temperature=schedule), models[0].lm_head.weight
    for step, temperature in zip((0, 5, 10), expected, strict=True):
        state = curriculum.state_at(step, 10)
        result = losses(models, batch, state, KDLoss())
        log_q, log_p = log_softmaxes(models, batch, temperature)
        plain = temperature**2 * kl_div(log_q, log_p, log_target=True, reduction="batchmean")
        torch.testing.assert_close(result.breakdown.raw["kd_loss"], plain.detach(), rtol=1e-5, atol=0.0)
        ours, theirs = (torch.autograd.grad(loss, weight)[0] for loss in (result.total, plain))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("schedule", [SOFT_TO_HARD, HARD_TO_SOFT])
@pytest.mark.parametrize("make", [top_k_targets, sampled_targets])
def test_stored_targets_refuse_a_temperature_that_moves_on(models, batch, schedule, make):
    student, teacher = models
    curriculum, head = Curriculum(temperature=schedule), lm_head_of(student)
    first, second = (curriculum.state_at(step, 10).temperature for step in (0, 1))
    hidden = {name: model.get_decoder()(batch.student.input_ids).last_hidden_state[:, :-1].flatten(0, 1)
              for name, model in (("student", student), ("teacher", teacher.model))}  # fmt: skip
    stored = make(DenseTargets(hidden["teacher"], lm_head_of(teacher.model)), 4, first)
    arguments = (hidden["student"], head, batch.student.labels[:, 1:].flatten(), stored)
    options = {"kd": KDLoss(), "kd_weight": 1.0, "lm_weight": None}
    assert distillation_loss(*arguments, temperature=first, **options).loss.isfinite()
    with pytest.raises(UserError, match=r"temperature: .* stored targets were made at .*set curriculum.temperature"):
        distillation_loss(*arguments, temperature=second, **options)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_top_k_is_the_divergence_of_k_ids_and_one_bucket(models, batch, divergence):
    state, k = Curriculum(temperature=2.0).state_at(0, 10), 5
    value = losses(models, batch, state, KDLoss(divergence, top_k=k)).breakdown.raw["kd_loss"]
    log_q, log_p = log_softmaxes(models, batch, 2.0)
    ids = log_p.topk(k, -1).indices
    p, q = (
        torch.cat([x.exp().gather(-1, ids), 1 - x.exp().gather(-1, ids).sum(-1, keepdim=True)], -1)
        for x in (log_p, log_q)
    )
    m = (p + q) / 2
    kl = {"forward_kl": p * (p / q).log(), "jsd": (p * (p / m).log() + q * (q / m).log()) / 2}[divergence]
    torch.testing.assert_close(value, 4 * kl.sum(-1).mean().detach(), rtol=1e-4, atol=1e-6)
    dense = losses(models, batch, state, KDLoss(divergence)).breakdown.raw["kd_loss"]
    whole = losses(models, batch, state, KDLoss(divergence, top_k=tiny.VOCAB)).breakdown.raw["kd_loss"]
    torch.testing.assert_close(whole, dense, rtol=1e-4, atol=1e-6)
    assert value < dense


def test_draws_are_right_on_average_repeat_with_the_step_and_leave_the_random_state_alone(models, batch):
    curriculum, kd = Curriculum(temperature=2.0), KDLoss(samples=8)
    before = torch.get_rng_state()
    draws = [losses(models, batch, curriculum.state_at(step, 150), kd).breakdown.raw["kd_loss"] for step in range(150)]
    again = losses(models, batch, curriculum.state_at(7, 150), kd).breakdown.raw["kd_loss"]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(again, draws[7])
    dense = losses(models, batch, curriculum.state_at(0, 150), KDLoss()).breakdown.raw["kd_loss"]
    values = torch.stack(draws)
    error = values.std() / len(draws) ** 0.5
    assert values.std() > 0.01 * dense
    assert abs(values.mean() - dense) < 4 * error


@pytest.mark.parametrize("kd", [KDLoss(), KDLoss(top_k=3)])
def test_measuring_kd_at_weight_zero_changes_no_bit(models, batch, kd, monkeypatch):
    """Chunks of few tokens, whose borders a second model's logits would move."""
    monkeypatch.setattr("distill.losses.engine.walk._CHUNK_BYTES_CPU", 60_000)
    student, teacher = models
    state, gradients = Curriculum(kd=[[0.0, 0.0], [0.5, 1.0]]).state_at(0, 10), []
    teacher.open(Run(kd, {}, tiny.VOCAB))
    for watched in ([], ["kd_loss"]):
        result = objective(batch, student, teacher, ["kd_loss", "lm_loss"], state, 1.0, kd=kd, measure_inactive=watched)
        assert list(result.breakdown.raw) == [*watched, "lm_loss"]
        gradients.append(torch.autograd.grad(result.total, student.lm_head.weight)[0])
    assert torch.equal(*gradients)
    expected = losses(models, batch, Curriculum(kd=1.0).state_at(0, 10), kd).breakdown.raw["kd_loss"]
    torch.testing.assert_close(result.breakdown.raw["kd_loss"], expected)


@pytest.mark.parametrize("kd", [KDLoss(top_k=3), KDLoss(samples=3)])
def test_the_weight_free_metrics_are_of_all_ids(models, batch, kd):
    state = Curriculum().state_at(0, 10)
    thinned = losses(models, batch, state, kd, metrics=True)
    whole = losses(models, batch, state, KDLoss(), metrics=True)
    assert thinned.breakdown.raw["kd_loss"] != whole.breakdown.raw["kd_loss"]
    for name in ("kl_div", "student_nll", "teacher_nll", "agreement", "calibration_B3"):
        assert torch.equal(getattr(thinned.token_stats, name), getattr(whole.token_stats, name))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, r"model.kd_loss.top_k: 0 must be at least 1"),
        ({"samples": 0}, r"model.kd_loss.samples: 0 must be at least 1"),
        ({"top_k": 4, "samples": 4}, r"model.kd_loss.samples: 4 with top_k 4; give one"),
        ({"samples": 4, "divergence": "jsd"}, r"model.kd_loss.samples: jsd is biased on drawn ids"),
    ],
)
def test_counts_that_cannot_be_meant_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        KDLoss(**options)


def test_a_whole_run_on_few_ids_with_a_falling_temperature(config, distill):
    config["model"] |= {"routing": None, "kd_loss": {"top_k": 8}}
    config["curriculum"] = {"temperature": SOFT_TO_HARD}
    config["trainer"]["max_steps"] = 4
    cli = distill("fit", config)
    rows = list(csv.DictReader(Path(cli.trainer.log_dir, "metrics.csv").read_text().splitlines()))
    temperatures = [float(row["curriculum/temperature"]) for row in rows if row["curriculum/temperature"]]
    assert temperatures == pytest.approx([4.0, 3.25, 2.5, 1.75])
    assert all(float(row["val/kl_div_T1"]) > 0 for row in rows if row["val/loss"])
