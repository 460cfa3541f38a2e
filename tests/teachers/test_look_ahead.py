"""What looking ahead moves, against the sums of a few rows by hand."""

import math

import numpy as np
import pytest
import torch

from distill.losses.engine.divergence import KDLoss, reverse_kl
from distill.losses.engine.mapped import LEAST, mapped_rows, vocabulary_map
from distill.losses.engine.rows import Buffers
from distill.models.head import LMHead
from distill.teachers.look_ahead import LookAhead
from distill.vocabularies.pair import VocabularyPair
from distill.vocabularies.token_bytes import TokenBytes
from helpers.tokenizers import spelled_bpe


def pair_of(teacher_merges, student_merges, letters="abc"):
    sides = (TokenBytes(spelled_bpe(merges, letters), "t") for merges in (teacher_merges, student_merges))
    return VocabularyPair(*sides)


def changes_of(pair, ids, place, inside, own, label, probs_TV, temperature=1.0, **options):
    """Changes by token and id of the student."""
    pairs = pair.pairs(*(np.array(x) for x in (ids, place, inside, own, label)))
    logits = torch.tensor(probs_TV, dtype=torch.float64).clamp_min(1e-300).log() * temperature
    head = LMHead(torch.eye(pair.teacher.size, dtype=torch.float64))
    _, of_S, counts = np.unique(pair.classes, return_inverse=True, return_counts=True)
    class_S = np.where(counts[of_S] > 1, of_S, -1)
    find = LookAhead(pair, **({"smallest": -1.0} | options))
    found = find(logits[pairs.teacher_N], lambda at: logits[at], head, class_S, pairs, temperature)
    moved = {}
    come = zip(found.rows_H.tolist(), found.student_H.tolist(), found.mass_H.tolist(), strict=True)
    gone = []
    for row, number in zip(found.rows_A.tolist(), found.teacher_A.tolist(), strict=True):
        p, first = (logits[pairs.teacher_N[row]] / temperature).softmax(-1), pair.firsts[number]
        if seen := inside[row]:
            whole = pair.teacher.tokens[ids[place[row] + 1]][:seen]
            left = [i for i, token in enumerate(pair.teacher.tokens) if token and token.startswith(whole)]
            p, first = p / p[left].sum(), pair.student.first_all([pair.teacher.tokens[number][seen:]])[0]
        gone.append((row, int(first), -float(p[number])))
    for row, number, mass in [*come, *gone]:
        key = row, pair.student.tokens[number] or b"<eos>"
        moved[key] = moved.get(key, 0.0) + mass
    return {key: mass for key, mass in moved.items() if abs(mass) > 1e-12}, found, class_S


def rows(pair, *given):
    """Probabilities by the bytes of tokens; None is the end of a text."""
    table = np.zeros((len(given), pair.teacher.size))
    for row, masses in zip(table, given, strict=True):
        for token, mass in masses.items():
            row[pair.teacher.eos if token is None else pair.teacher.ids[token]] = mass
    return table


def test_a_tokens_mass_is_parted_by_what_follows_it():
    pair = pair_of([], [("a", "b")])  # the student writes ab as one
    t, s = pair.teacher.ids, pair.student.ids
    ids = [0, t[b"a"], t[b"b"], t[b"c"]]
    probs = rows(pair, {b"a": 0.6, b"c": 0.4}, {b"b": 0.7, b"a": 0.1, b"c": 0.1, None: 0.1}, {b"c": 1.0}, {None: 1.0})
    moved, found, class_S = changes_of(pair, ids, [0], [0], [0], [s[b"ab"]], probs)
    # a, b stays within the path: position 2 says what comes behind ab, all of it leads to ab
    assert moved == {(0, b"a"): pytest.approx(-0.6 * 0.7), (0, b"ab"): pytest.approx(0.6 * 0.7)}
    assert found.class_N.tolist() == [class_S[s[b"a"]]]
    assert class_S[s[b"a"]] == class_S[s[b"ab"]] >= 0


def test_what_the_student_would_have_written_otherwise_is_dropped():
    pair = pair_of([], [("a", "b")])
    t, s = pair.teacher.ids, pair.student.ids
    probs = rows(pair, {b"a": 1.0}, {b"b": 0.25, b"c": 0.75}, {None: 1.0})
    # the student stands behind its token a: with b it would have written ab
    moved, _, _ = changes_of(pair, [0, t[b"a"], t[b"c"]], [1], [0], [s[b"a"]], [s[b"c"]], probs)
    assert moved == {(0, b"b"): pytest.approx(-0.25)}


def test_a_row_of_which_nothing_would_be_left_stays():
    pair = pair_of([], [("a", "b")])
    t, s = pair.teacher.ids, pair.student.ids
    probs = rows(pair, {b"a": 1.0}, {b"b": 1.0}, {None: 1.0}, {None: 1.0})
    moved, found, _ = changes_of(pair, [0, t[b"a"], t[b"b"]], [1], [0], [s[b"a"]], [s[b"b"]], probs)
    assert moved == {}
    assert found.class_N.tolist() == [-1]


def test_behind_the_last_token_of_a_document_nothing_is_looked_at():
    pair = pair_of([("a", "b")], [])
    t, s = pair.teacher.ids, pair.student.ids
    probs = rows(pair, {b"ab": 1.0}, {None: 1.0}, {b"c": 1.0}, {None: 1.0})
    ids = [0, t[b"ab"], 0, t[b"c"]]  # the end of a document, and another one
    moved, found, _ = changes_of(pair, ids, [1], [0], [s[b"b"]], [0], probs)
    assert moved == {}
    assert found.class_N.tolist() == [-1]
    moved, _, _ = changes_of(pair, ids, [0, -1], [1, 0], [s[b"a"], 0], [s[b"b"], s[b"a"]], probs)
    assert moved == {}  # b is all that can follow a; and a place without a target has none to change


def test_improbable_texts_stay_where_the_tables_lead():
    pair = pair_of([], [("a", "b"), ("a", "c")])
    t, s = pair.teacher.ids, pair.student.ids
    ids = [0, t[b"a"], t[b"b"]]
    probs = rows(pair, {b"a": 0.5, b"b": 0.5}, {b"b": 0.9, b"c": 0.1}, {None: 1.0})
    every, _, _ = changes_of(pair, ids, [0], [0], [0], [s[b"ab"]], probs)
    assert every == {(0, b"a"): pytest.approx(-0.5), (0, b"ab"): pytest.approx(0.45), (0, b"ac"): pytest.approx(0.05)}
    likely, _, _ = changes_of(pair, ids, [0], [0], [0], [s[b"ab"]], probs, smallest=0.2)
    assert likely == {(0, b"a"): pytest.approx(-0.45), (0, b"ab"): pytest.approx(0.45)}


def test_rows_hand_out_their_own_changes():
    pair = pair_of([], [("a", "b")])
    t, s = pair.teacher.ids, pair.student.ids
    probs = rows(pair, {b"a": 1.0}, {b"b": 0.5, b"c": 0.5}, {b"a": 1.0}, {b"b": 0.5, None: 0.5}, {None: 1.0})
    ids = [0, t[b"a"], t[b"b"], t[b"a"], t[b"b"]]
    _, found, _ = changes_of(pair, ids, [0, 2], [0, 0], [0, s[b"ab"]], [s[b"ab"], s[b"ab"]], probs)
    second = found.of(slice(1, 2))
    assert second.rows_H.unique().tolist() == [0]
    assert len(found.of(slice(0, 2)).rows_H) == len(found.of(slice(0, 1)).rows_H) + len(second.rows_H)
    assert second.mass_H.sum() == pytest.approx(1.0)
    assert (second.rows_A.tolist(), second.teacher_A.tolist()) == ([0], [t[b"a"]])


@pytest.mark.parametrize("gap", [12, 19, 30])
def test_what_a_sure_token_leaves_is_right_in_fp32(gap):
    pair = pair_of([("a", "a")], [("a", "b"), ("a", "c")])  # the teacher's aa leads to a, too
    t, s = pair.teacher.ids, pair.student.ids
    pairs = pair.pairs(*(np.array(x) for x in ([0, t[b"a"], t[b"b"]], [0], [0], [0], [s[b"ab"]])))
    logits, student = torch.randn(3, pair.teacher.size), torch.randn(1, pair.student.size)
    logits[0, t[b"a"]] = logits[1, t[b"b"]] = gap
    tables = vocabulary_map(pair.firsts, pair.classes, pair.teacher.size, pair.student.size)
    find, head = LookAhead(pair), LMHead(torch.eye(pair.teacher.size))
    changes = find(logits[:1], lambda at: logits[at], head, tables.class_S.numpy(), pairs, 1.0)
    value, gradient = mapped_rows(
        KDLoss("reverse_kl"), student.clone(), logits[:1].clone(), tables, torch.tensor([True]), None,
        changes.of(slice(0, 1)), 1.0, Buffers(3, 16, logits, logits.dtype), True,
    )  # fmt: skip
    first, second = logits[:2].double().log_softmax(-1)
    stays = torch.tensor([number for number in range(pair.teacher.size) if number != t[b"b"]])
    log_p = torch.full((pair.student.size,), math.log(LEAST), dtype=torch.float64)
    for letter in (b"b", b"c"):
        log_p[s[letter]] = first[t[letter]]
    log_p[pair.student.eos] = first[pair.teacher.eos]
    log_p[s[b"ab"]] = first[t[b"a"]] + second[t[b"b"]]
    log_p[s[b"a"]] = torch.logaddexp(first[t[b"a"]] + second[stays].logsumexp(0), first[t[b"aa"]])
    wide = student.double().requires_grad_()
    expected = reverse_kl(wide.log_softmax(-1), log_p[None])
    torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-6, atol=0)
    theirs = torch.autograd.grad(expected.sum(), wide)[0]
    assert float((gradient - theirs).norm()) <= 1e-6 * float(theirs.norm())
