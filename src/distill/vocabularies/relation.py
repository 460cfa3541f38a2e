"""Whether two tokenizers are one as far as ids go, so that teacher and student read the same tokens."""

from typing import Any, Literal

Relation = Literal["same", "different"]


def relation(teacher: Any, student: Any) -> Relation:
    """`same` where no id stands for two texts and both write text with the same ids.

    What only one of them has may be added tokens alone, such as those of a chat template; special tokens may have other
    names. A vocabulary that was cut down to its first merges is a different one: its ids mean the same, but the teacher
    has never read text in such short tokens.

    Args:
        teacher: tokenizer of transformers.
        student: likewise.
    """
    if teacher is student:
        return "same"
    sides = []
    for tokenizer in (teacher, student):
        added = tokenizer.added_tokens_decoder
        special = {number for number, token in added.items() if token.special}
        texts = {number: text for text, number in tokenizer.get_vocab().items() if number not in special}
        sides.append((texts, set(added)))
    (teacher_texts, teacher_added), (student_texts, student_added) = sides
    alone = teacher_texts.keys() ^ student_texts.keys()
    one_each = alone <= teacher_added | student_added
    same = all(teacher_texts[number] == student_texts[number] for number in teacher_texts.keys() & student_texts.keys())
    return "same" if one_each and same else "different"
