"""Memory and time of making one very wide layer dense: by default 98,304 neurons, as a layer of Qwen3-30B-A3B has.

A mixture of experts of one layer with random bf16 weights in the shapes of Qwen3-30B-A3B becomes a dense student with
FFNs of 6,144 neurons, through the same function as a run's student, on one thread of a CPU. The peak is what is
resident of the process, the teacher included. What grows with the calibration tokens can be told from what grows with
the neurons by a second call: `--tokens 184320 --width 768`.

    python benchmarks/start_memory.py
"""

import argparse
import os
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from resident import forget_peak, peak_mb, resident_mb
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from distill.commands.quiet import quieten
from distill.models.start.make import make_student
from distill.models.start.shape import Shape, StudentFit
from distill.models.start.walk import Rows

LENGTH = 1024
GIB = 2**30 / 1e6  # in MB


def teacher_of(experts: int, neurons: int, hidden: int) -> Qwen3MoeForCausalLM:
    """A teacher of one layer, in bf16 and eval mode."""
    config = Qwen3MoeConfig(
        vocab_size=1024, hidden_size=hidden, intermediate_size=6144, moe_intermediate_size=neurons,
        num_experts=experts, num_experts_per_tok=8, norm_topk_prob=True, num_hidden_layers=1,
        num_attention_heads=hidden // 64, num_key_value_heads=4, head_dim=128, max_position_embeddings=LENGTH,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        return Qwen3MoeForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--neurons", type=int, default=768, help="of an expert")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--width", type=int, default=6144, help="neurons of the student's FFN")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--most-gib", type=float, default=8.0)
    arguments = parser.parse_args()
    quieten()
    torch.set_num_threads(1)
    forget_peak()
    bare_mb = resident_mb()
    teacher = teacher_of(arguments.experts, arguments.neurons, arguments.hidden)
    ids = torch.randint(1024, (arguments.tokens // LENGTH, LENGTH), generator=torch.Generator().manual_seed(1))
    forget_peak()
    teacher_mb, started = resident_mb() - bare_mb, time.process_time()
    _, fits = make_student(
        teacher, Shape([0], arguments.width), Rows.of(ids), StudentFit(steps=arguments.steps, learning_rate=1e-4)
    )
    seconds, peak_gib = time.process_time() - started, peak_mb() / GIB
    neurons, state_gib = arguments.experts * arguments.neurons, 4 * ids.numel() * arguments.hidden / 2**30
    print(f"{neurons:,} neurons in {arguments.experts} experts, hidden {arguments.hidden:,}, to {arguments.width:,}")
    print(f"{ids.numel():,} tokens, a state of which has {state_gib:.2f} GiB in fp32; {seconds:,.0f} CPU seconds")
    print(f"unexplained {fits[0].before:.3f} in closed form, {fits[0].after:.3f} after {arguments.steps} steps")
    print(f"resident {bare_mb / GIB:.2f} GiB before, {teacher_mb / GIB:.2f} GiB more with the teacher")
    met = peak_gib <= arguments.most_gib
    print(f"peak: {peak_gib:.2f} GiB, at most {arguments.most_gib} {'ok' if met else 'short'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
