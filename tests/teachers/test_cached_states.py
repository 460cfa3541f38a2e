"""Records of a position: what goes in comes out, in as few bytes as its dtypes say, and for who asks alone."""

from dataclasses import replace

import pytest
import torch

from distill.errors import UserError
from distill.models.trace import Needs, Trace
from distill.teachers.cached_states import States
from distill.teachers.find_experts import find_views
from distill.teachers.online import OnlineTeacher
from helpers import tiny
from helpers.routing import make_batch

NAMES = {"mixture_TD", "logits_TE", "weights_TK", "index_TK"}


@pytest.fixture
def teacher():
    return tiny.tiny_qwen3_moe(num_hidden_layers=3)


@pytest.fixture
def needs(teacher):
    return Needs(hidden=frozenset([0, 2]), recorders=tuple(find_views(teacher, [1], None, None)))


@pytest.fixture
def tokens():
    """A row that is full, and one that ends in two places of padding."""
    return make_batch([[5, 3], [6]], 8)


def read(states: States, rows: list[torch.Tensor], needs: Needs) -> Trace:
    padded_BLW = torch.zeros(2, 8, states.bytes, dtype=torch.uint8)
    for row, record in enumerate(rows):
        padded_BLW[row, : len(record)] = record
    return states.decode(padded_BLW, needs)


def test_what_is_read_is_what_the_teacher_said_at_every_token(teacher, needs, tokens):
    seen = OnlineTeacher(teacher).trace(tokens, needs)
    states = States.like(seen, needs, None)
    assert states.bytes == 2 * 64 + 64 + (4 + 2) * 4 + 2
    rows = states.encode(seen, tokens)
    assert [len(row) for row in rows] == [8, 6]
    found = read(States.described_by(states.described()), rows, needs)
    assert found.hidden.keys() == {0, 2}
    assert found.records.keys() == {1}
    assert found.records[1].keys() == NAMES
    real_BL = tokens.real_BL
    for layer, state in found.hidden.items():
        assert torch.equal(state[real_BL], seen.hidden[layer][real_BL])
        assert not state[~real_BL].any()
    for name, values in found.records[1].items():
        assert values.dtype == seen.records[1][name].dtype
        assert torch.equal(values[real_BL.flatten()], seen.records[1][name][real_BL.flatten()])


def test_only_wide_states_are_rounded_and_only_what_is_needed_is_made(teacher, needs, tokens):
    seen = OnlineTeacher(teacher).trace(tokens, needs)
    states = States.like(seen, needs, torch.bfloat16)
    assert states.bytes == 2 * 32 + 32 + (4 + 2) * 4 + 2
    rows = states.encode(seen, tokens)
    found = read(states, rows, Needs(hidden=frozenset([2])))
    assert list(found.hidden) == [2]
    assert not found.records
    assert torch.equal(found.hidden[2][0], seen.hidden[2][0].bfloat16())
    found = read(states, rows, replace(needs, hidden=frozenset()))
    assert not found.hidden
    assert torch.equal(found.records[1]["logits_TE"][:8], seen.records[1]["logits_TE"][:8])


def test_many_experts_have_wider_indices(needs):
    shapes = {"mixture_TD": 16, "logits_TE": 300, "weights_TK": 2, "index_TK": 2}
    record = {name: torch.full((16, width), 299.0) for name, width in shapes.items()}
    record["index_TK"] = record["index_TK"].long()
    seen = Trace(torch.zeros(0), {}, {}, {1: record})
    routing = replace(needs, hidden=frozenset())
    states = States.like(seen, routing, None)
    tokens = make_batch([[8], [8]], 8)
    assert read(states, states.encode(seen, tokens), routing).records[1]["index_TK"].unique().tolist() == [299]


def test_a_loss_of_ones_own_that_looks_at_attention_is_refused(teacher, needs, tokens):
    states = States.like(OnlineTeacher(teacher).trace(tokens, needs), needs, None)
    states.check("it", {"model.mine": Needs(), "model.layerwise": Needs(hidden=frozenset([0]))}, None)
    with pytest.raises(UserError, match=r"model.mine: looks at the teacher's queries, keys and values, which no cache"):
        states.check("it", {"model.mine": Needs(attention=frozenset([0]))}, None)


@pytest.mark.parametrize("experts", [None, 2, 2.4, [[0.0, 2], [0.5, 2.4], [1.0, 1.6]]])
def test_schedules_that_round_to_the_stored_number_of_experts_are_served(teacher, needs, tokens, experts):
    states = States.like(OnlineTeacher(teacher).trace(tokens, needs), needs, None)
    states.check("it", {"model.routing": needs}, experts)
    with pytest.raises(
        UserError, match=r"curriculum.top_k_experts: \[\[0.0, 2\], \[1.0, 2.5\]\], but the routing in it"
    ):
        states.check("it", {"model.routing": needs}, [[0.0, 2], [1.0, 2.5]])
