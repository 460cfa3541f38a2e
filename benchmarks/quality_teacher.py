"""The small mixture-of-experts teacher of quality.py and its text, made on the spot from what ships with Python.

The text is the standard library's sources and pydoc's topics, cut by file into three parts that share no file: what
the teacher learns from, what the students may see, and what is held out. A teacher of two million weights that was
trained for minutes says which way a loss pulls, not how far it would pull a real model.

    python benchmarks/quality_teacher.py
"""

import json
import math
import sys
import sysconfig
import tempfile
import time
import zlib
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

VOCABULARY, LENGTH, ROWS, STEPS, PEAK = 1024, 128, 16, 1000, 4e-3
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "router_aux_loss_coef": 0.02,
    "tie_word_embeddings": True,
    "max_position_embeddings": 256,
}
LONGEST = 40_000  # characters of a document: a few long modules would fill the held-out rows otherwise


def documents() -> dict[str, list[str]]:
    """Text of each part, `teacher`, `student` and `held_out`, by the checksum of the file's name."""
    from pydoc_data import topics

    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}
    files = [path for path in sorted(root.rglob("*.py")) if not skipped & set(path.relative_to(root).parts)]
    texts = {str(path.relative_to(root)): path.read_text(errors="ignore")[:LONGEST] for path in files}
    texts |= {f"topic {name}": text for name, text in sorted(topics.topics.items())}
    parts: dict[str, list[str]] = {"teacher": [], "student": [], "held_out": []}
    for name, text in texts.items():
        tenth = zlib.crc32(name.encode()) % 10
        if text.strip():
            parts["held_out" if tenth == 0 else "student" if tenth <= 2 else "teacher"].append(text)
    return parts


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the teacher's part."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def train_teacher(ids_T: torch.Tensor, held_out_T: torch.Tensor) -> tuple[Qwen3MoeForCausalLM, float]:
    """A teacher trained on random windows, and its negative log-likelihood on the held-out text, nats per token."""
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=VOCABULARY, **SIZES)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    generator, started = torch.Generator().manual_seed(0), time.time()
    for step in range(STEPS):
        rate = PEAK * min((step + 1) / 50, 0.02 + 0.49 * (1 + math.cos(math.pi * step / STEPS)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(ids_T) - LENGTH, (ROWS,), generator=generator)
        batch_BL = torch.stack([ids_T[start : start + LENGTH] for start in starts.tolist()])
        loss = model(batch_BL, labels=batch_BL, output_router_logits=True).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 49:
            print(f"teacher: step {step + 1} of {STEPS}, loss {loss.item():.3f}, {time.time() - started:.0f} s")
    model.eval()
    rows_BL = held_out_T[: 256 * LENGTH].view(-1, LENGTH)
    with torch.no_grad():
        losses = [model(rows, labels=rows).loss.item() for rows in rows_BL.split(32)]
    return model, sum(losses) / len(losses)


def prepare(folder: Path | None = None) -> Path:
    """The folder with `teacher`, `student.jsonl`, `held_out.jsonl` and `facts.json`; made once, in about four minutes.

    Args:
        folder: where; in the temporary directory by default, named after what it depends on.
    """
    key = zlib.crc32(repr((VOCABULARY, LENGTH, ROWS, STEPS, PEAK, SIZES, LONGEST, sys.version)).encode())
    folder = folder or Path(tempfile.gettempdir(), f"distill_quality_{key:08x}")
    if (folder / "facts.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    parts = documents()
    tokenizer = train_tokenizer(parts["teacher"])
    ids = {}
    for name, texts in parts.items():
        encoded = tokenizer(texts)["input_ids"]
        ids[name] = torch.tensor([i for document in encoded for i in [*document, tokenizer.eos_token_id]])
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    print({name: f"{len(texts)} files, {len(ids[name])} tokens" for name, texts in parts.items()})
    model, nll = train_teacher(ids["teacher"], ids["held_out"])
    model.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_trained": STEPS * ROWS * LENGTH,
        "held_out_nll": nll,
        "python": sys.version.split()[0],
    }
    (folder / "facts.json").write_text(json.dumps(facts))
    return folder


if __name__ == "__main__":
    print(prepare())
