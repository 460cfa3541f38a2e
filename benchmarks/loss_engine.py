"""What the KD loss costs beside its peers and beside its own matrix products: CPU time, peak memory, gradient error.

Every figure comes from a fresh process on one thread; rounds are interleaved over the methods and the median is shown,
because a machine's speed drifts. That makes the benchmark slow: the default block takes ten to thirty minutes, `--all`
hours. On a CPU without bf16 units the peers' bf16 products take minutes, so there bf16 is measured once, with forward
KL and at the default size alone, and the error of "medium" is that of fp32 products of operands rounded to bf16.

    pip install --no-deps trl==1.16.0 liger-kernel==0.8.5   # the `benchmark` extra, without their dependencies
    python benchmarks/loss_engine.py [--all] [--repeats 3]

Differences between the methods that one must know: TRL and Liger have no T^2 (T is 1 here); Liger computes the
cross-entropy too, even with weight 0. Student and teacher logits are close, as they are late in a training.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from resident import forget_peak, peak_mb, resident_mb
from torch import Tensor
from torch.nn.functional import kl_div
from torch.utils._python_dispatch import TorchDispatchMode

from distill.models.precision import has_units

STUDENT_WIDTH, TEACHER_WIDTH = 576, 1024
LIMIT_GB = 16
# Peak in units of one fp32 logit matrix, to leave out what would not fit: measured once, see the printed tables.
LOGIT_COPIES = {"naive": {"forward_kl": 7, "jsd": 9}, "trl": {"forward_kl": 7, "jsd": 15}}
METHODS = ("bound", "distill", "distill low-memory", "naive", "trl", "liger", "liger compiled")
EAGER_PEERS = ("naive", "trl", "liger")


@dataclass(frozen=True)
class Cell:
    """One measurement: `precision` is fp32, medium (fp32 with bf16 products) or bf16 (autocast)."""

    method: str
    divergence: str
    tokens: int
    vocab: int
    precision: str


def make_inputs(tokens: int, vocab: int) -> list[Tensor]:
    """Student hidden and weight, teacher hidden and weight: the teacher's logits are the student's plus some more."""
    torch.manual_seed(0)
    extra = TEACHER_WIDTH - STUDENT_WIDTH
    hidden, weight = torch.randn(tokens, STUDENT_WIDTH), torch.randn(vocab, STUDENT_WIDTH) * 0.1
    teacher_hidden = torch.cat([hidden, torch.randn(tokens, extra)], dim=1)
    teacher_weight = torch.cat([weight, torch.randn(vocab, extra) * 0.02], dim=1)
    return [hidden, weight, teacher_hidden, teacher_weight]


def naive(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """KL(p || q), or JSD(0.5), from whole logit matrices; the sum over tokens."""
    log_q, log_p = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    if student.dtype == torch.float64:
        log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    if beta == 0:
        return kl_div(log_q, log_p, reduction="sum", log_target=True)
    log_m = torch.logaddexp(log_q, log_p) - torch.log(torch.tensor(2.0, dtype=log_q.dtype))
    parts = [kl_div(log_m, x, reduction="sum", log_target=True) for x in (log_p, log_q)]
    return 0.5 * parts[0] + 0.5 * parts[1]


def loss_of(method: str, divergence: str) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The method as a function of student hidden, student weight, teacher hidden, teacher weight: mean over tokens."""
    beta = 0.0 if divergence == "forward_kl" else 0.5
    if method == "naive":
        return lambda h, w, th, tw: naive(h @ w.T, th @ tw.T, beta) / len(h)
    if method == "trl":
        from trl.experimental.gkd import GKDTrainer

        def trl(h: Tensor, w: Tensor, th: Tensor, tw: Tensor) -> Tensor:
            return GKDTrainer.generalized_jsd_loss((h @ w.T)[None], (th @ tw.T)[None], beta=beta) / len(h)

        return trl
    if method.startswith("liger"):
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        liger = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=method.endswith("compiled")
        )
        return lambda h, w, th, tw: liger(h, w, th, tw, torch.zeros(len(h), dtype=torch.long, device=h.device))
    from distill.losses.engine.divergence import KDLoss
    from distill.losses.engine.loss import distillation_loss
    from distill.models.head import LMHead
    from distill.teachers.targets import DenseTargets

    def distill(h: Tensor, w: Tensor, th: Tensor, tw: Tensor) -> Tensor:
        return distillation_loss(
            h,
            LMHead(w),
            torch.zeros(len(h), dtype=torch.long, device=h.device),
            DenseTargets(th, LMHead(tw)),
            kd=KDLoss(divergence),
            temperature=1.0,
            kd_weight=1 / len(h),
            lm_weight=None,
            chunk_size=256 if method.endswith("low-memory") else None,
        ).loss

    return distill


def products(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> None:
    """The lower bound: the four matrix products of value and gradients, at the fastest of the usual chunk sizes."""
    chunk = min(512, len(hidden))
    student = hidden.new_empty(chunk, len(weight))
    teacher, gradient = torch.empty_like(student), torch.zeros_like(weight)
    hidden_gradient = torch.empty_like(hidden)
    for rows in (slice(i, i + chunk) for i in range(0, len(hidden), chunk)):
        torch.mm(hidden[rows], weight.T, out=student)
        torch.mm(teacher_hidden[rows], teacher_weight.T, out=teacher)
        torch.mm(student, weight, out=hidden_gradient[rows])
        gradient.addmm_(student.T, hidden[rows])


class Bf16Products(TorchDispatchMode):
    """Matrix products as units for bf16 do them: operands rounded to bf16, sums in fp32."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            args = (*args[:-2], *(x.bfloat16().to(x.dtype) for x in args[-2:]))
        return func(*args, **(kwargs or {}))


def measure(cell: Cell) -> dict[str, float]:
    """CPU seconds, peak MB beyond inputs and returned gradients, and relative error of the hidden gradient."""
    torch.set_num_threads(1)
    if cell.precision == "medium":
        torch.set_float32_matmul_precision("medium")
    inputs = make_inputs(cell.tokens, cell.vocab)
    if cell.method == "bound":
        if cell.precision == "bf16":
            inputs = [x.bfloat16() for x in inputs]
        products(*(x[:64] for x in inputs))
        start = time.process_time()
        products(*inputs)
        return {"s": time.process_time() - start}
    function = loss_of(cell.method, cell.divergence)

    def run(tokens: int) -> tuple[Tensor, Tensor]:
        student = [inputs[0][:tokens].detach().requires_grad_(), inputs[1].detach().requires_grad_()]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cell.precision == "bf16"):
            loss = function(*student, inputs[2][:tokens], inputs[3])
        loss.backward()
        return student[0].grad, student[1].grad

    sample = min(128, cell.tokens)
    emulated = cell.precision == "medium" and not has_units(torch.bfloat16)
    with Bf16Products() if emulated else nullcontext():
        gradient = run(sample)[0]
    error = relative_error(gradient, [x[:sample] if i % 2 == 0 else x for i, x in enumerate(inputs)], cell)
    if "compiled" in cell.method:
        run(cell.tokens)
    forget_peak()
    before_mb, start = resident_mb(), time.process_time()
    gradients = run(cell.tokens)
    seconds = time.process_time() - start
    returned_mb = sum(x.nbytes for x in gradients) / 1e6
    return {"s": seconds, "mb": max(0, peak_mb() - before_mb - returned_mb), "error": error}


def relative_error(gradient: Tensor, inputs: list[Tensor], cell: Cell) -> float:
    """|gradient - exact| / |exact|, exact by autograd in float64."""
    wide = [x.double() for x in inputs]
    wide[0].requires_grad_()
    loss = naive(wide[0] @ wide[1].T, wide[2] @ wide[3].T, 0.0 if cell.divergence == "forward_kl" else 0.5)
    exact = torch.autograd.grad(loss / len(wide[0]), wide[0])[0]
    return float((gradient.double() - exact).norm() / exact.norm())


def measured(cells: list[Cell], repeats: int) -> dict[Cell, dict[str, float]]:
    """Medians of interleaved rounds, a process each; a method that fails is left out with its last line."""
    rounds: dict[Cell, list[dict[str, float]]] = {cell: [] for cell in cells}
    for _ in range(repeats):
        for cell in list(rounds):
            command = [sys.executable, __file__, "--cell", json.dumps(asdict(cell))]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                rounds[cell].append(json.loads(done.stdout.splitlines()[-1]))
            else:
                print(f"{cell.method}: left out, {(done.stderr.strip() or 'killed').splitlines()[-1]}")
                del rounds[cell]
    return {cell: {key: statistics.median(r[key] for r in found) for key in found[0]} for cell, found in rounds.items()}


def fits(method: str, divergence: str, tokens: int, vocab: int) -> bool:
    copies = LOGIT_COPIES.get(method, {}).get(divergence, 0)
    return copies * tokens * vocab * 4 < LIMIT_GB * 1e9


def block(tokens: int, vocab: int, precision: str, repeats: int) -> dict[tuple[str, str], dict[str, float]]:
    """Measures and prints one table; returns (method, divergence) -> figures."""
    print(f"\n{tokens} tokens, vocabulary {vocab}, hidden {STUDENT_WIDTH}/{TEACHER_WIDTH}, {precision}", flush=True)
    methods, divergences = list(METHODS), ["forward_kl", "jsd"]
    if precision == "medium":
        methods = ["bound", "distill"]
    elif precision == "bf16" and not has_units(torch.bfloat16):
        print("This CPU has no bf16 units: distill's products run in fp32, the others' in bf16.")
        methods, divergences, repeats = methods[:-1], divergences[:1], 1
    wanted = [(m, d) for d in divergences for m in methods if not (m == "bound" and d == "jsd")]
    cells = {key: Cell(key[0], key[1], tokens, vocab, precision) for key in wanted if fits(*key, tokens, vocab)}
    figures = measured(list(cells.values()), repeats)
    found = {key: figures[cell] for key, cell in cells.items() if cell in figures}
    bound_s = found["bound", "forward_kl"]["s"]
    print(f"{'method':<20}{'divergence':<12}{'CPU s':>8}{'x bound':>9}{'peak MB':>9}{'gradient error':>16}")
    for key in wanted:
        figure = found.get(key)
        if figure is None:
            print(f"{key[0]:<20}{key[1]:<12}" + ("left out" if key in cells else "does not fit"))
        else:
            rest = f"{figure['mb']:>9.0f}{figure['error']:>16.1e}" if "mb" in figure else ""
            print(f"{key[0]:<20}{key[1]:<12}{figure['s']:>8.2f}{figure['s'] / bound_s:>9.2f}{rest}", flush=True)
    return found


def judge(found: dict[tuple[str, str], dict[str, float]], low: dict[tuple[str, str], dict[str, float]]) -> bool:
    """Prints a line per target; whether all are met."""
    ours, saving, bound = (found[m, "forward_kl"] for m in ("distill", "distill low-memory", "bound"))
    peers = [found[m, "forward_kl"] for m in EAGER_PEERS if (m, "forward_kl") in found]
    fastest_s, leanest_mb = min(p["s"] for p in peers), min(p["mb"] for p in peers)
    fastest_low_s = min(low[m, "forward_kl"]["s"] for m in EAGER_PEERS if (m, "forward_kl") in low)
    lines = [
        ("time_over_bound", ours["s"] / bound["s"], 1.15),
        ("time_over_fastest_peer", ours["s"] / fastest_s, 0.75),
        ("memory_over_leanest_peer", ours["mb"] / leanest_mb, 0.30),
        ("low_memory_over_leanest_peer", saving["mb"] / leanest_mb, 0.10),
        ("low_memory_time_over_bound", saving["s"] / bound["s"], 1.30),
        ("jsd_over_forward_kl", found["distill", "jsd"]["s"] / ours["s"], 1.25),
    ]
    bf16 = ("bf16_over_fastest_autocast_peer", low["distill", "forward_kl"]["s"] / fastest_low_s, 0.50)
    print()
    if has_units(torch.bfloat16):
        lines.append(bf16)
    else:
        print(f"{bf16[0]} {bf16[1]:.3f} not judged: the target is about bf16 products, and these were fp32")
    for name, figure, target in lines:
        print(f"{name} {figure:.3f} {target:.2f} {'ok' if figure <= target else 'short'}")
    return all(figure <= target for _, figure, target in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every size, not only 2,048 tokens x 49,152 ids")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved rounds, of which the median counts")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(measure(Cell(**json.loads(options.cell)))))
        return 0
    found, low, _ = (block(2048, 49152, precision, options.repeats) for precision in ("fp32", "bf16", "medium"))
    if options.all:
        for vocab in (49152, 151936):
            for tokens in (512, 2048, 8192):
                for precision in ("fp32", "bf16") if has_units(torch.bfloat16) else ("fp32",):
                    if (tokens, vocab) != (2048, 49152):
                        block(tokens, vocab, precision, options.repeats)
    return 0 if judge(found, low) else 1


if __name__ == "__main__":
    sys.exit(main())
