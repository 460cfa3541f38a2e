"""The arms of cross_tokenizer.py, and the two tokenizers of its students.

All but two are options of the program. ALM needs the student's likelihood of whole stretches of text, so its module
adds that to the loss of next tokens; the control's teacher says of each place what it has to say of another one.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from distill.batch import Batch, Pairs
from distill.losses.likelihood_matching import likelihood_matching
from distill.models.head import LMHead, lm_head_of
from distill.models.trace import Needs, trace
from distill.training.module import DistillationModule
from distill.training.objective import Losses
from distill.vocabularies.options import VocabularyOptions


class AlmModule(DistillationModule):
    """Next tokens, and the likelihoods of stretches between places where both tokenizers have a boundary."""

    def losses(self, batch: Batch, share: float, metrics: bool = False, components: list[str] | None = None) -> Losses:
        if metrics:
            return super().losses(batch, share, metrics, components)
        result = super().losses(batch, share, components=["lm_loss"])
        assert batch.pairs is not None
        of_N, of_M = stretches(batch.student.positions.numpy(), batch.pairs)
        taught = self.teacher(batch, Needs(), self.curriculum, kd=False)  # type: ignore[misc]
        states_ND = batch.student.valid(trace(self.student, batch.student).last_BLD)  # type: ignore[arg-type]
        counted_N, counted_M = torch.from_numpy(of_N >= 0), torch.from_numpy(of_M >= 0)
        student_N = logprobs(lm_head_of(self.student), states_ND, batch.student.labels_N)  # type: ignore[arg-type]
        with torch.no_grad():
            places_M = counted_M.nonzero().flatten()
            labels_M = batch.teacher.input_ids.flatten()[places_M + 1]
            teacher_M = logprobs(
                lm_head_of(self.teacher.model), taught.trace.last_BLD.flatten(0, 1)[places_M], labels_M
            )  # type: ignore[union-attr]
        found_C = likelihood_matching(
            student_N[counted_N], teacher_M, torch.from_numpy(of_N)[counted_N], torch.from_numpy(of_M)[counted_M]
        )
        return replace(result, total=result.total + found_C.mean())


def logprobs(head: LMHead, states_ND: Tensor, labels_N: Tensor) -> Tensor:
    """Log-probability of each label, (N, D) -> (N)."""
    return head.logits(states_ND).log_softmax(-1).gather(1, labels_N[:, None])[:, 0]


def stretches(positions_N: np.ndarray, pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """Number of the stretch that each student's label and each teacher's position belongs to, -1 for none.

    A stretch goes from one place where both have a boundary to the next in the same document.
    """
    group_N, place_N = pairs.spelling.group_N, pairs.spelling.place_N
    of_N, of_M = np.full(len(positions_N), -1), np.full(len(pairs.spelling.ids_T), -1)
    aligned = np.flatnonzero(group_N == 0)
    count = 0
    for first, last in zip(aligned[:-1].tolist(), aligned[1:].tolist(), strict=True):
        whole = positions_N[last] - positions_N[first] == last - first and (group_N[first:last] >= 0).all()
        if whole and place_N[last] > place_N[first]:
            of_N[first:last], of_M[place_N[first] : place_N[last]] = count, count
            count += 1
    return of_N, of_M


class Shuffled:
    """A teacher whose places were mixed up within each batch."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def __call__(self, batch: Batch, needs: Needs, state: Any, kd: bool) -> Any:
        taught = self.source(batch, needs, state, kd)
        if taught.targets is None:
            return taught
        order = torch.randperm(len(taught.targets.hidden_ND), generator=torch.Generator().manual_seed(batch.bytes))
        return replace(taught, targets=replace(taught.targets, hidden_ND=taught.targets.hidden_ND[order]))


class ShuffledModule(DistillationModule):
    """The control."""

    def configure_model(self) -> None:
        built = self.teacher is None
        super().configure_model()
        if built:
            self.teacher = Shuffled(self.teacher)  # type: ignore[assignment]


@dataclass(frozen=True)
class Arm:
    """What a student learns from.

    Args:
        options: of `DistillationModule`.
        module: that trains it.
    """

    options: dict[str, Any]
    module: type[DistillationModule] = DistillationModule


def _beside(method: str = "first_token", look_ahead: bool = False) -> dict[str, Any]:
    return {"vocabulary": VocabularyOptions(method=method, look_ahead=look_ahead)}  # type: ignore[arg-type]


ARMS = {
    "CE": Arm({"kd_loss": None}),
    "CE + first token": Arm(_beside()),
    "CE + look-ahead": Arm(_beside(look_ahead=True)),
    "KD alone, look-ahead": Arm({"lm_loss": False} | _beside(look_ahead=True)),
    "CE + aligned only": Arm(_beside("aligned")),
    "CE + exact matches": Arm(_beside("exact_matches")),
    "CE + ULD": Arm(_beside("uld")),
    "CE + ALM": Arm(_beside(), AlmModule),
    "CE + shuffled teacher": Arm(_beside(), ShuffledModule),
}


def byte_bpe(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """2,048 ids of byte-level BPE: longer tokens than the teacher's 1,024."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2048, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def unigram(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """About 1,022 ids of Unigram with byte fallback, as SentencePiece's: digits stand alone, no dummy prefix."""
    words = pre_tokenizers.Split(Regex("\u2581*[^\u2581\n0-9]+|\u2581+|\n+|[0-9]"), "isolated")
    blanks = normalizers.Replace(" ", "\u2581")
    trained = Tokenizer(models.Unigram())
    trained.normalizer, trained.pre_tokenizer = blanks, words
    special = ["<eos>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=766, special_tokens=special, unk_token="<unk>", show_progress=False)
    trained.train_from_iterator(texts, trainer)
    pieces = [tuple(piece) for piece in json.loads(trained.to_str())["model"]["vocab"][2:]]
    lowest = min(score for _, score in pieces) - 10
    fallback = [(f"<0x{byte:02X}>", lowest) for byte in range(256)]
    vocab = [("<eos>", 0.0), ("<unk>", lowest - 10), *fallback, *pieces]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=1, byte_fallback=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = blanks, words
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>")


STUDENTS = {"BPE-2,048": byte_bpe, "Unigram-1,022": unigram}


def prepare_students(folder: Path) -> None:
    """Trains the students' tokenizers on the students' part of the text, once."""
    for name, train in STUDENTS.items():
        if not (folder / name / "tokenizer.json").exists():
            lines = (folder / "student.jsonl").read_text().splitlines()
            train([json.loads(line)["text"] for line in lines]).save_pretrained(folder / name)
