"""Losses on layers where the student has its own tokenizer, against loops over tokens and the teacher's beside them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset

from conftest import text_of_stdlib
from distill.curriculum import CurriculumState
from distill.data.documents.chat import Chat
from distill.data.order.sampler import EveryRowOnce
from distill.data.rows.packing import pack_with
from distill.data.rows.table import PackedRows
from distill.data.tokenizers import tokenizers_of
from distill.errors import UserError
from distill.losses.attention import AttentionTransfer
from distill.losses.contrastive import Contrastive
from distill.losses.layerwise import Layerwise
from distill.losses.routing import Routing
from distill.models.trace import merged, trace
from helpers.tiny import tiny_llama, tiny_qwen3_moe
from helpers.tokenizers import byte_bpe, trained

STATE = CurriculumState(0, 0.0, {}, 1.0, None)


@pytest.fixture(scope="module")
def rows():
    """Rows of two documents and more, one of which the teacher says nothing of."""
    found = tokenizers_of(trained("byte_bpe", 420), byte_bpe(330))
    text = text_of_stdlib(2400)
    documents = [text[at : at + 150] for at in range(0, 2400, 150)] + ["<eos> in a text is no text"]
    table = pack_with(found.packer(Chat(), 64, True), Dataset.from_dict({"text": documents})).with_format("numpy")
    return PackedRows(table, np.arange(len(table)), 64, found.pad_id, pairing=found.pairing)


@pytest.fixture(scope="module")
def batch(rows):
    return rows.__getitems__(next(iter(EveryRowOnce(rows.units_R, 3))))


def models():
    teacher = tiny_qwen3_moe(vocab_size=420, num_hidden_layers=3, hidden_size=24, num_attention_heads=4, head_dim=6)
    return teacher, tiny_llama(vocab_size=330, num_hidden_layers=2)


def traced(component, teacher, student, batch):
    with torch.no_grad():
        theirs = trace(teacher, batch.teacher, merged([component.teacher_needs]))
        ours = trace(student, batch.student, merged([component.student_needs]))
    return ours, theirs


def places(batch) -> list[tuple[int, int]]:
    """The student's position and the teacher's beside it, of each token that has one."""
    found = zip(
        batch.student.positions.tolist(), batch.pairs.teacher_N.tolist(), batch.pairs.group_N.tolist(), strict=True
    )
    return [(ours, theirs) for ours, theirs, group in found if group >= 0]


def test_the_counts_are_of_what_is_compared(rows):
    left_out = 0
    for request in EveryRowOnce(rows.units_R, 3):
        batch = rows.__getitems__(request)
        assert batch.count("targets") == len(batch.compared.positions) == int(batch.compared.attention_mask.sum())
        assert batch.count("queries") == int(batch.compared.query_N.sum())
        left_out += batch.count("tokens") - batch.count("targets")
    assert left_out > 5


def test_layerwise_compares_each_token_with_the_state_beside_it(batch):
    teacher, student = models()
    layerwise = Layerwise(student_layers=[1], teacher_layers=[1])
    torch.manual_seed(0)
    layerwise.build(teacher, student)
    ours, theirs = traced(layerwise, teacher, student, batch)
    expected, count = 0.0, 0
    for position, place in places(batch):
        if batch.student.position_ids.flatten()[position] == 0:
            continue
        state, target = ours.hidden[1].flatten(0, 1)[position], theirs.hidden[1].flatten(0, 1)[place]
        norm = lambda x: torch.nn.functional.layer_norm(x.double(), x.shape, eps=0)  # noqa: E731
        projected = torch.nn.functional.linear(
            norm(state), *(p.double() for p in layerwise.projections[0].parameters())
        )
        expected += float((projected - norm(target)).square().mean().detach())
        count += 1
    assert count == batch.count("queries")
    with torch.no_grad():
        assert float(layerwise(ours, theirs, batch)) == pytest.approx(expected, rel=1e-4)


def test_relations_are_among_the_tokens_that_have_a_state_beside_them(batch):
    teacher, student = models()
    attention = AttentionTransfer(relation_heads=1)
    attention.build(teacher, student)
    ours, theirs = traced(attention, teacher, student, batch)
    found = places(batch)
    documents = batch.student.document_BL + 1000 * torch.arange(len(batch.student.document_BL))[:, None]
    total = 0.0
    for name in ("query_BHLd", "key_BGLd", "value_BGLd"):
        one, other = (
            getattr(next(iter(side.attention.values())), name).transpose(1, 2).flatten(2).flatten(0, 1).double()
            for side in (ours, theirs)
        )
        for position, place in found:
            if batch.student.position_ids.flatten()[position] == 0:
                continue
            keys = [
                (p, k) for p, k in found if p <= position and documents.flatten()[p] == documents.flatten()[position]
            ]
            at, there = (torch.tensor(side) for side in zip(*keys, strict=True))
            q = (one[at] @ one[position] / one.shape[-1] ** 0.5).log_softmax(-1)
            p = (other[there] @ other[place] / other.shape[-1] ** 0.5).log_softmax(-1)
            total += float((p.exp() * (p - q)).sum()) / 3
    assert float(attention(ours, theirs, batch)) == pytest.approx(total, rel=1e-4)


def test_attention_maps_are_refused_by_name(batch):
    teacher, student = tiny_llama(vocab_size=420), tiny_llama(vocab_size=330)
    attention = AttentionTransfer(form="maps")
    attention.build(teacher, student)
    with pytest.raises(UserError, match=r"^model.attention.form: maps are of the same tokens on both sides"):
        attention(*traced(attention, teacher, student, batch), batch)


def test_contrastive_keys_are_the_states_beside(batch):
    teacher, student = models()
    contrastive = Contrastive(tokens_per_row=200, queue_size=0)
    torch.manual_seed(0)
    contrastive.build(teacher, student, rows=len(batch.student.input_ids))
    ours, theirs = traced(contrastive, teacher, student, batch)
    (layer,), (their_layer,) = contrastive.student_needs.hidden, contrastive.teacher_needs.hidden
    at, there = (torch.tensor(side) for side in zip(*places(batch), strict=True))
    norm = torch.nn.functional.normalize
    ln = lambda x: torch.nn.functional.layer_norm(x, x.shape[-1:], eps=0)  # noqa: E731
    anchors = norm(contrastive.projection(ln(ours.hidden[layer].flatten(0, 1)[at])), dim=-1)
    keys = norm(ln(theirs.hidden[their_layer].flatten(0, 1)[there]), dim=-1)
    expected = -(anchors @ keys.T / contrastive.temperature).log_softmax(-1).diagonal().mean()
    with torch.no_grad():
        assert float(contrastive(ours, theirs, batch)) == pytest.approx(float(expected), rel=2e-3)


def test_routing_losses_are_those_of_the_teachers_tokens_beside(batch):
    teacher, student = models()
    routing = Routing(teacher_layers=[1], student_layers=[0])
    torch.manual_seed(0)
    routing.build(teacher, SimpleNamespace(config=student.config))
    ours, theirs = traced(routing, teacher, student, batch)
    found = routing.measure(routing.components, ours, theirs, batch, STATE).sums
    # The same tokens in one row without padding, the teacher's states in the same order.
    at, there = (torch.tensor(side) for side in zip(*places(batch), strict=True))
    alone = routing.measure(
        ["routing_feature_matching_loss", "routing_expert_importance_loss"], ours, theirs, batch, STATE
    ).sums
    for name, value in alone.items():
        torch.testing.assert_close(value, found[name])
    capture = theirs.records[1]
    gates = routing._views[0].gates(capture, there)
    states = torch.nn.functional.layer_norm(ours.hidden[0].flatten(0, 1)[at], ours.hidden[0].shape[-1:], eps=0)
    logits = routing.probes[0](states).log_softmax(-1)
    expected = (gates * (gates.clamp_min(1e-30).log() - logits)).sum()
    torch.testing.assert_close(found["routing_expert_importance_loss"], expected, rtol=1e-3, atol=1e-3)
