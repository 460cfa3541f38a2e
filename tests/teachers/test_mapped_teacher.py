"""The source of targets across tokenizers: what it opens, refuses and hands over."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from distill.batch import Batch, Tokens
from distill.curriculum import CurriculumState
from distill.errors import UserError
from distill.losses.engine.divergence import KDLoss
from distill.models.head import LMHead
from distill.models.trace import Needs, Trace
from distill.teachers.baselines import RankedTargets
from distill.teachers.cached import CachedTeacher
from distill.teachers.mapped import MappedTargets, MappedTeacher
from distill.teachers.source import Run, Taught
from distill.teachers.targets import DenseTargets
from helpers.toy_world import CROSSING, LONG, SHORT, toy

WIDTH, TEXTS = 4, 30
STATE = CurriculumState(0, 0.0, {}, 1.0, None)


class Model(nn.Module):
    """As much of a model as has a head."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, vocab, bias=False)
        self.config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace(model_type="llama"))

    def get_output_embeddings(self) -> nn.Module:
        return self.head


@dataclass
class Source:
    """A teacher whose states are random but the same each time, with or without a forward pass of its own."""

    model: Model
    live: bool = True
    opened: Run | None = None

    def open(self, run: Run) -> None:
        self.opened = run

    def to(self, device: torch.device) -> None:
        pass

    def __call__(self, batch: Batch, needs: Needs, state: CurriculumState, kd: bool) -> Taught:
        assert not kd  # thinned targets would be made for nothing
        rows, length = batch.teacher.input_ids.shape
        last_BLD = torch.randn(rows, length, WIDTH, generator=torch.Generator().manual_seed(4))
        trace = Trace(last_BLD if self.live else torch.zeros(0), {}, {})
        return Taught(trace, DenseTargets(batch.teacher.valid(last_BLD), LMHead(self.model.head.weight.detach())), None)


def tokens(ids: torch.Tensor, positions: np.ndarray) -> Tokens:
    places = torch.zeros_like(ids)
    return Tokens(ids, ids, torch.ones_like(ids), places, torch.from_numpy(positions), packed=True)


def batch_of(found) -> Batch:
    """Some texts of the toy world as one row a side; only the teacher's side is read."""
    ids = torch.from_numpy(found.pairs.spelling.ids_T)[None]
    follows = np.append(found.pairs.spelling.ids_T[1:] != 0, False)
    ours = tokens(torch.zeros_like(ids), np.arange(len(found.key_N)))
    return Batch(ours, tokens(ids, np.flatnonzero(follows)), {"tokens": 1, "targets": 1}, 1, pairs=found.pairs)


def opened(found, live=True, **options) -> MappedTeacher:
    torch.manual_seed(0)
    teacher = MappedTeacher(Source(Model(found.pair.teacher.size + 3), live), found.pair, **options)
    teacher.open(Run(KDLoss(), Needs(), found.pair.student.size + 2))
    teacher.to(torch.device("cpu"))
    return teacher


@pytest.fixture(scope="module")
def crossing():
    return toy(*CROSSING)


def test_targets_are_those_of_the_places_that_the_pairs_name(crossing):
    batch = batch_of(crossing)
    teacher = opened(crossing)
    taught = teacher(batch, Needs(), STATE, kd=True)
    assert taught.whole is None
    assert isinstance(taught.targets, MappedTargets)
    states_TD = taught.trace.last_BLD.flatten(0, 1)
    assert torch.equal(taught.targets.hidden_ND, states_TD[crossing.pairs.teacher_N])
    assert taught.targets.shared_vocab(99) == crossing.pair.student.size
    assert teacher.source.opened.student_vocab == crossing.pair.student.size + 2


def test_without_kd_there_is_what_metrics_compare_with_alone(crossing):
    taught = opened(crossing, look_ahead=True)(batch_of(crossing), Needs(), STATE, kd=False)
    assert taught.targets is None
    assert isinstance(taught.classes, MappedTargets)
    assert taught.classes.changes is None


def test_a_cache_of_states_serves_as_a_live_teacher_does(crossing):
    batch = batch_of(crossing)
    live, stored = (opened(crossing, live=live)(batch, Needs(), STATE, kd=True) for live in (True, False))
    known = torch.isin(crossing.pairs.teacher_N, batch.teacher.positions)
    assert known.float().mean() > 0.8  # the toy world's texts have no end of their own
    assert torch.equal(live.targets.hidden_ND[known], stored.targets.hidden_ND[known])


def test_looking_ahead_is_for_what_is_learnt_and_not_for_metrics(crossing):
    taught = opened(crossing, look_ahead=True)(batch_of(crossing), Needs(), replace(STATE, temperature=2.0), kd=True)
    assert taught.targets.changes.temperature == 2.0
    assert len(taught.targets.changes.rows_H) > 0
    assert taught.classes.changes is None


@pytest.mark.parametrize("method", ["aligned", "exact_matches", "uld"])
def test_a_baseline_is_averaged_over_its_own_targets(method):
    found = toy(LONG, SHORT)
    taught = opened(found, method=method)(batch_of(found), Needs(), STATE, kd=True)
    group_N = found.pairs.group_N
    weight = len(group_N) / int((group_N == 0).sum())
    if method == "uld":
        assert isinstance(taught.targets, RankedTargets)
        torch.testing.assert_close(taught.targets.weight_N, (group_N == 0) * weight)
    else:
        assert taught.targets.weight == pytest.approx(weight)
        assert (taught.targets.pairs.group_N <= 0).all()
    assert isinstance(taught.classes, MappedTargets)
    assert (taught.classes.pairs.group_N == group_N).all()


@pytest.mark.parametrize("key", ["top_k", "samples"])
def test_some_ids_of_a_row_alone_are_refused(crossing, key):
    teacher = MappedTeacher(Source(Model(9)), crossing.pair)
    with pytest.raises(UserError, match=rf"^model.kd_loss.{key}: 5, but teacher and student have .*; leave it out$"):
        teacher.open(Run(KDLoss(**{key: 5}), Needs(), 12))


def test_looking_ahead_into_a_cache_is_refused(crossing):
    cache = CachedTeacher.__new__(CachedTeacher)
    cache.folder, cache.model = "cache", Model(9)
    with pytest.raises(UserError, match=r"^model.vocabulary.look_ahead: true, but the cache cache .* a live teacher$"):
        MappedTeacher(cache, crossing.pair, look_ahead=True).open(Run(KDLoss(), Needs(), 12))
