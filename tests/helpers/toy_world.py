"""A world of three letters that can be counted out: every text of seven letters, its probability, and both tokenizers.

A teacher that is right about it has rows that are counted too, and so has what a student should learn.
"""

import itertools
import random
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch

from distill.batch import Pairs
from distill.losses.engine.mapped import VocabularyMap, inside_rows, target_rows, vocabulary_map
from distill.losses.engine.rows import Buffers
from distill.models.head import LMHead
from distill.teachers.look_ahead import LookAhead
from distill.vocabularies.pair import VocabularyPair
from distill.vocabularies.places import places
from distill.vocabularies.token_bytes import TokenBytes
from helpers.tokenizers import spelled_bpe

LENGTH = 7
LONG = [("a", "b"), ("ab", "c"), ("b", "c"), ("c", "a"), ("ca", "ca")]
SHORT = [("a", "b"), ("b", "c")]
CROSSING = [("a", "b"), ("c", "a"), ("ab", "ab")], [("b", "c"), ("b", "a"), ("c", "c"), ("bc", "a")]


def world(seed: int = 3) -> list[tuple[bytes, float]]:
    """Texts and their probabilities: each letter depends on the two before it."""
    draw = random.Random(seed)
    odds = {key: [draw.gammavariate(0.6, 1) + 0.02 for _ in "abc"] for key in itertools.product(" abc", repeat=2)}
    texts = []
    for letters in itertools.product("abc", repeat=LENGTH):
        weight, before = 1.0, (" ", " ")
        for letter in letters:
            weight *= odds[before]["abc".index(letter)] / sum(odds[before])
            before = (before[1], letter)
        texts.append(("".join(letters).encode(), weight))
    return texts


def rows_of(texts: list[tuple[list[int], float]], vocab: int) -> dict[tuple[int, ...], np.ndarray]:
    """The probability of each next id behind each beginning; 0 ends a text."""
    found: dict[tuple[int, ...], np.ndarray] = defaultdict(lambda: np.zeros(vocab))
    for ids, weight in texts:
        for end in range(len(ids) + 1):
            found[tuple(ids[:end])][ids[end] if end < len(ids) else 0] += weight
    return {key: row / row.sum() for key, row in found.items()}


@dataclass
class Toy:
    """Every position of every text: the teacher's row, what it is led to, and what is right."""

    pair: VocabularyPair
    pairs: Pairs
    logits_TV: torch.Tensor  # of the teacher, at each of its positions
    weight_N: np.ndarray  # of the text
    key_N: list[tuple[int, ...]]  # what the student has written
    right: dict[tuple[int, ...], np.ndarray]

    @property
    def tables(self) -> VocabularyMap:
        return vocabulary_map(self.pair.firsts, self.pair.classes, self.pair.teacher.size, self.pair.student.size)

    def targets(self, look_ahead: bool = False) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        """The target of each position, (N, S), the mass that leads somewhere, (N), and the class that is refined."""
        rows = slice(0, len(self.key_N))
        hidden = self.logits_TV[self.pairs.teacher_N]
        ahead, class_N = None, np.full(len(self.key_N), -1)
        if look_ahead:
            find = LookAhead(self.pair, smallest=-1.0)
            head = LMHead(torch.eye(self.pair.teacher.size, dtype=torch.float64))
            class_S = self.tables.class_S.numpy()
            changes = find(hidden, lambda at: self.logits_TV[at], head, class_S, self.pairs, 1.0)
            ahead, class_N = changes.of(rows), changes.class_N.numpy()
        widest = max(self.pair.teacher.size, self.pair.student.size)
        buffers = Buffers(3, len(hidden) * widest, hidden, hidden.dtype)
        p_NS, mapped_N = target_rows(hidden.clone(), self.tables, inside_rows(self.pairs, rows), ahead, 1.0, buffers)
        return p_NS, mapped_N, class_N

    def error(self, p_NS: np.ndarray, taught_N: np.ndarray | None = None, classes: np.ndarray | None = None) -> float:
        """Total variation between the mean target behind each beginning and what is right, weighed by its odds."""
        mean: dict[tuple[int, ...], np.ndarray] = defaultdict(lambda: np.zeros(p_NS.shape[1]))
        odds: dict[tuple[int, ...], float] = defaultdict(float)
        for n, key in enumerate(self.key_N):
            if taught_N is None or taught_N[n]:
                mean[key] += self.weight_N[n] * p_NS[n]
                odds[key] += self.weight_N[n]
        of = np.arange(p_NS.shape[1]) if classes is None else classes
        off = 0.0
        for key, row in mean.items():
            difference = np.bincount(of, row / odds[key] - self.right[key])
            off += odds[key] * np.abs(difference).sum() / 2
        return off / sum(odds.values())


def toy(teacher_merges: list[tuple[str, str]], student_merges: list[tuple[str, str]], seed: int = 3) -> Toy:
    """The world with two tokenizers; before each text stands the token that ends one."""
    tokenizers = spelled_bpe(teacher_merges), spelled_bpe(student_merges)
    teacher, student = (TokenBytes(tokenizer, "model.teacher") for tokenizer in tokenizers)
    texts = world(seed)
    spelled = [[(side.encode(text), weight) for text, weight in texts] for side in (teacher, student)]
    rows, right = rows_of(spelled[0], teacher.size), rows_of(spelled[1], student.size)
    ids_T, logits, weights, keys, own, label, place, inside = [], [], [], [], [], [], [], []
    for (text, weight), (teacher_ids, _), (student_ids, _) in zip(texts, *spelled, strict=True):
        both = [[0, *teacher_ids], [0, *student_ids]]
        teacher_ends, student_ends = (side.ends(ids, text) for side, ids in zip((teacher, student), both, strict=True))
        where = places(teacher_ends, student_ends)[:-1]
        place += (where + len(ids_T)).tolist()
        inside += (student_ends[:-1] - teacher_ends[where]).tolist()
        own, label = own + both[1][:-1], label + both[1][1:]
        keys += [tuple(student_ids[:end]) for end in range(len(student_ids))]
        weights += [weight] * len(student_ids)
        logits += [rows[tuple(teacher_ids[:end])] for end in range(len(teacher_ids) + 1)]
        ids_T += both[0]
    pair = VocabularyPair(teacher, student)
    pairs = pair.pairs(*(np.array(x) for x in (ids_T, place, inside, own, label)))
    return Toy(pair, pairs, torch.tensor(np.array(logits)).log().clamp_min(-1e3), np.array(weights), keys, right)
