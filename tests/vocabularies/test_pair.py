"""Where the teacher's tokens lead to in the student's vocabulary, against searches by hand."""

import functools
import pickle

import numpy as np
import pytest
from tokenizers import AddedToken

from distill.vocabularies.pair import VocabularyPair
from distill.vocabularies.token_bytes import TokenBytes
from helpers.tokenizers import REAL, byte_bpe, real, spelled_bpe, trained

FAMILIES = [("byte_bpe", 700), ("byte_bpe", 420), ("unigram", 600), ("sentencepiece_bpe", 620)]


@functools.cache
def side(family: str, size: int) -> TokenBytes:
    return TokenBytes(trained(family, size), "model.teacher")


def pairs_of_families():
    return [(teacher, student) for teacher in FAMILIES for student in FAMILIES]


@pytest.mark.parametrize(("teacher", "student"), pairs_of_families())
def test_what_extends_a_text_is_found_and_led_to_the_students_first_id(teacher, student):
    pair = VocabularyPair(side(*teacher), side(*student))
    tokens = pair.teacher.tokens
    for seen in (b"t", b" ", b"th", b" th", b"stat", "é".encode()[:1], b"\x00", b"zzz"):
        ids, firsts = pair.extending(seen)
        expected = {number for number, token in enumerate(tokens) if token and token != seen and token.startswith(seen)}
        assert set(ids.tolist()) == expected
        assert len(ids) == len(expected)
        for number, first in zip(ids.tolist(), firsts.tolist(), strict=True):
            rest = tokens[number][len(seen) :]
            encoded = pair.student.encode(rest)
            assert first == (encoded[0] if encoded else pair.student.longest_start(rest))


@pytest.mark.parametrize("family", FAMILIES)
def test_each_token_of_the_same_tokenizer_leads_to_itself(family):
    pair = VocabularyPair(side(*family), side(*family))
    same = np.arange(pair.teacher.size)
    kept = [number for number, token in enumerate(pair.teacher.tokens) if token and pair.teacher.ids[token] == number]
    assert (pair.firsts[kept] == same[kept]).all()  # the others are twins of byte fallback
    assert pair.firsts[pair.teacher.eos] == pair.teacher.eos
    assert (pair.classes == same).all()


@pytest.mark.parametrize("name", REAL)
def test_each_token_of_the_same_real_tokenizer_leads_to_itself(name):
    both = TokenBytes(real(name), "model.teacher")
    pair = VocabularyPair(both, both)
    kept = [number for number, token in enumerate(both.tokens) if token is None or both.ids[token] == number]
    kept = [number for number in kept if both.tokens[number] or number in both.specials.values()]
    assert (pair.firsts[kept] == kept).all()
    assert (pair.classes == np.arange(both.size)).all()


def test_special_tokens_go_by_their_role_and_by_their_text():
    teacher, student = byte_bpe(300), byte_bpe(310)
    teacher.add_tokens([AddedToken("<turn>", special=True), AddedToken("<image>", special=True)])
    student.add_tokens([AddedToken("<stop>", special=True), AddedToken("<turn>", special=True)])
    student.eos_token = "<stop>"
    pair = VocabularyPair(TokenBytes(teacher, "t"), TokenBytes(student, "s"))
    led = {name: pair.firsts[teacher.convert_tokens_to_ids(name)] for name in ("<eos>", "<bos>", "<turn>", "<image>")}
    names = {name: student.convert_tokens_to_ids(name) for name in ("<stop>", "<bos>", "<turn>")}
    assert led == {
        "<eos>": names["<stop>"], "<bos>": names["<bos>"], "<turn>": names["<turn>"], "<image>": pair.student.size
    }  # fmt: skip
    ids, _ = pair.extending(b"t")
    assert not {pair.teacher.eos, pair.teacher.specials["<turn>"]} & set(ids.tolist())


def test_renumbering_the_teacher_changes_nothing():
    merges = [("a", "b"), ("ab", "c"), ("b", "c"), ("c", "a"), ("ca", "ca")]
    student = TokenBytes(spelled_bpe([("b", "c"), ("b", "a"), ("c", "c"), ("bc", "a")]), "s")
    one = VocabularyPair(TokenBytes(spelled_bpe(merges), "t"), student)
    other = VocabularyPair(TokenBytes(spelled_bpe(merges, letters="cab"), "t"), student)
    there = np.array([other.teacher.ids[token] if token else 0 for token in one.teacher.tokens])
    assert not (there == np.arange(len(there))).all()
    assert (other.firsts[there] == one.firsts).all()
    assert (other.classes == one.classes).all()
    for seen in (b"a", b"c", b"ca", b"b"):
        (ids, firsts), (other_ids, other_firsts) = one.extending(seen), other.extending(seen)
        assert dict(zip(there[ids].tolist(), firsts.tolist(), strict=True)) == dict(
            zip(other_ids.tolist(), other_firsts.tolist(), strict=True)
        )


def test_a_longer_token_of_the_student_is_one_class_with_what_the_teacher_begins_it_with():
    teacher = TokenBytes(spelled_bpe([("a", "b")]), "t")
    student = TokenBytes(spelled_bpe([("a", "b"), ("ab", "c"), ("b", "c")]), "s")
    pair = VocabularyPair(teacher, student)
    classes = {}
    for token, number in student.ids.items():
        classes.setdefault(pair.classes[number], set()).add(token)
    assert sorted(map(sorted, classes.values())) == [[b"a"], [b"ab", b"abc"], [b"b", b"bc"], [b"c"]]
    assert pair.classes[student.eos] == student.eos


def test_a_batchs_pairs_name_what_lies_behind_and_what_may_follow():
    teacher = TokenBytes(spelled_bpe([("a", "b"), ("ab", "c"), ("c", "a")]), "t")
    student = TokenBytes(spelled_bpe([("b", "c")]), "s")
    pair = VocabularyPair(teacher, student)
    t, s = teacher.ids, student.ids
    ids = np.array([t[b"b"], t[b"abc"], t[b"ca"], t[b"abc"]])
    # the student writes b a bc c a a ...: behind b; behind a; behind bc; behind c; no target
    found = pair.pairs(
        ids, np.array([0, 0, 1, 1, -1, 2]), np.array([0, 1, 0, 1, 0, 1]),
        np.array([s[token] for token in (b"b", b"a", b"bc", b"c", b"a", b"a")]),
        np.array([s[token] for token in (b"a", b"bc", b"c", b"a", b"a", b"bc")]),
    )  # fmt: skip
    assert found.teacher_N.tolist() == [0, 0, 1, 1, 0, 2]
    assert found.group_N.tolist() == [0, 1, 0, 2, -1, 1]
    assert found.starts_G.tolist() == [0, 2, 3]
    assert found.teacher_ids_E.tolist() == [t[b"ab"], t[b"abc"], t[b"ca"]]
    assert found.student_ids_E.tolist() == [s[b"b"], s[b"bc"], s[b"a"]]


def test_a_pickled_pair_is_the_same():
    pair = VocabularyPair(side("unigram", 600), side("byte_bpe", 420))
    again = pickle.loads(pickle.dumps(pair))
    assert (again.firsts == pair.firsts).all()
    assert [part.tolist() for part in again.extending(b"th")] == [part.tolist() for part in pair.extending(b"th")]
