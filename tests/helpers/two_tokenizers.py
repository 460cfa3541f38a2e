"""A tiny teacher and a tiny student, each with a tokenizer of its own, and a run of a few seconds with them."""

from pathlib import Path
from typing import Any

from conftest import text_of_stdlib
from helpers.tiny import tiny_llama
from helpers.tokenizers import trained

TEACHER, STUDENT = ("byte_bpe", 420), ("byte_bpe", 330)


def write_model(folder: Path, family: str, size: int, **sizes: Any) -> None:
    """A tiny model with a tokenizer of `size` ids, trained on the spot."""
    tokenizer = trained(family, size)
    tokenizer.save_pretrained(folder)
    eos = tokenizer.eos_token_id
    tiny_llama(vocab_size=len(tokenizer), bos_token_id=eos, eos_token_id=eos, **sizes).save_pretrained(folder)


def write_pair(
    folder: Path, teacher: tuple[str, int] = TEACHER, student: tuple[str, int] = STUDENT, **sizes: Any
) -> None:
    """`teacher`, `student` and `text.txt` in a folder."""
    write_model(folder / "teacher", *teacher, num_hidden_layers=3, **sizes)
    write_model(folder / "student", *student, num_hidden_layers=2, **sizes)
    (folder / "text.txt").write_text(text_of_stdlib(12_000))


def pair_config(folder: Path) -> dict[str, Any]:
    """A run of KD and next tokens between them."""
    return {
        "seed_everything": 1,
        "model": {"teacher": str(folder / "teacher"), "student": str(folder / "student"), "learning_rate": 1e-2},
        "data": {
            "dataset": str(folder / "text.txt"),
            "sequence_length": 48,
            "per_device_batch_size": 4,
            "max_validation_sequences": 8,
        },
        "trainer": {"max_steps": 12, "accelerator": "cpu", "log_every_n_steps": 1, "num_sanity_val_steps": -1},
        "progress": None,
        "preflight": None,
    }
