"""The tokenizers of a run: one, or one for each side where their ids mean different tokens."""

from dataclasses import dataclass
from typing import Any

import lightning as L

from distill.data.documents.chat import Chat
from distill.data.documents.encode import Encoder
from distill.data.documents.paired import PairedEncoder
from distill.data.rows.packing import Packer, encoder_of
from distill.data.rows.paired import PairedPacker, Pairing
from distill.errors import UserError
from distill.models.load import check_vocabularies, load_tokenizer
from distill.vocabularies.pair import VocabularyPair
from distill.vocabularies.relation import relation
from distill.vocabularies.token_bytes import TokenBytes


@dataclass(frozen=True)
class Tokenizers:
    """What text is read with.

    Args:
        student: fast tokenizer of the student's side.
        teacher: of the teacher's; the same object where one serves both.
        vocabularies: both as bytes; None where one serves both.
    """

    student: Any
    teacher: Any
    vocabularies: VocabularyPair | None = None

    @property
    def pad_id(self) -> int:
        """Token that pads the student's rows."""
        return _pad_id(self.student)

    @property
    def pairing(self) -> Pairing | None:
        """What makes pairs of batches; None where one tokenizer serves both."""
        return None if self.vocabularies is None else Pairing(self.vocabularies, _pad_id(self.teacher))

    def packer(self, chat: Chat, sequence_length: int, packing: bool) -> Packer:
        """What makes rows of documents; see `Packer`.

        Raises:
            UserError: a slow tokenizer.
        """
        encoder: Encoder = encoder_of(self.student, chat)
        if self.vocabularies is None:
            return Packer(encoder, sequence_length, packing)
        return PairedPacker(PairedEncoder(encoder, self.teacher, self.vocabularies), sequence_length, packing)


def load_tokenizers(
    module: L.LightningModule | None, source: str | None, trust_remote_code: bool, student: Any | None
) -> Tokenizers:
    """The tokenizers of a run.

    Args:
        module: that is trained, which names the teacher and what the student reads with; None = there is none.
        source: of the teacher's tokenizer; None = the teacher.
        trust_remote_code: run code that comes with `source`.
        student: the student's tokenizer, loaded; None = what the module names, or the teacher's.

    Raises:
        UserError: no source, one that cannot be had, or two that cannot be compared.
    """
    remote = getattr(module, "load_options", {}).get("trust_remote_code", False)
    trusted = trust_remote_code or (remote and source is None)
    source = source or getattr(module, "teacher_source", None)
    if source is None:
        raise UserError("data.tokenizer: null, and there is no teacher to take it from; name a model source")
    teacher = load_tokenizer(source, trust_remote_code=trusted)
    options = getattr(module, "options", None)
    if student is None and (own := getattr(options, "tokenizer_source", None)) is not None:
        student = load_tokenizer(own, trust_remote_code=remote, key="model.student")
    found = tokenizers_of(teacher, student)
    if found.vocabularies is not None and options is not None and options.vocabulary is None:
        check_vocabularies(teacher, found.student, "model.student")
        raise UserError(
            f"model.vocabulary: null, and the student's tokenizer is another than the teacher's ({len(found.student)} "
            f"and {len(teacher)} ids); leave it out, or choose a student with the teacher's tokenizer"
        )
    return found


def tokenizers_of(teacher: Any, student: Any | None) -> Tokenizers:
    """One tokenizer where the ids of both mean the same tokens, else both.

    Args:
        teacher: that the teacher reads with.
        student: that the student reads with; None = the teacher's.

    Raises:
        UserError: they differ, and one of them has no byte form.
    """
    if student is None or relation(teacher, student) == "same":
        return Tokenizers(teacher, teacher)
    sides = TokenBytes(teacher, "model.teacher"), TokenBytes(student, "model.student")
    return Tokenizers(student, teacher, VocabularyPair(*sides))


def _pad_id(tokenizer: Any) -> int:
    return next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
