"""What distillation costs on a CUDA device: the loss engine and a whole step, beside their bare parts and their peers.

One command, under eight minutes, and a Markdown table with card and versions:

    pip install --no-deps trl==1.16.0 liger-kernel==0.8.5   # the `benchmark` extra; what is missing is left out
    python benchmarks/gpu.py [--out docs/gpu.md]

The engine's products are the four matrix products of value and gradients in the same chunks, with logits and sums in
fp32 as the engine has them, on random data. Times are medians of interleaved rounds between events of the device, peaks
are those of torch's allocator beyond inputs and returned gradients, and errors are of the hidden states' gradient
against float64 on 128 tokens. As in loss_engine.py, T is 1, and Liger computes the cross-entropy too. Whole steps are
those of `gpu_step.py`, a process each. Exit code 1 where a target is missed, or could not be judged.

Without a CUDA device the engine goes over fake tensors, and the steps over tiny models on the CPU: that shows that the
benchmark runs, and nothing about time.
"""

import argparse
import gc
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from loss_engine import loss_of, naive
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "tests"))

STUDENT_WIDTH, TEACHER_WIDTH, VOCAB = 2048, 4096, 128_256
METHODS = ("products", "distill", "naive", "trl", "liger", "liger compiled")
EAGER_PEERS = ("naive", "trl", "liger")
DIVERGENCES = ("forward_kl", "jsd")
ROUNDS, WARM = 6, 2
VERSIONS = ("torch", "triton", "transformers", "lightning", "trl", "liger-kernel")
MODELS = ("SmolLM2-135M", "Llama-0.8B")
GIB = 2**30


@dataclass(frozen=True)
class Target:
    """A ratio that must not be larger than `most`; None where a part of it was not measured.

    `least` is what the bare products alone would reach: below it no way of computing the same gets.
    """

    name: str
    ratio: float | None
    most: float
    least: float | None = None

    @property
    def verdict(self) -> str:
        """ok, short or not judged."""
        return "not judged" if self.ratio is None else "ok" if self.ratio <= self.most else "short"


def make_inputs(tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """Student hidden and weight, teacher hidden and weight: the teacher's logits are the student's plus some more."""
    torch.manual_seed(0)
    extra, on = TEACHER_WIDTH - STUDENT_WIDTH, {"device": "cuda"}
    hidden, weight = torch.randn(tokens, STUDENT_WIDTH, **on), torch.randn(VOCAB, STUDENT_WIDTH, **on) * 0.05
    teacher_hidden = torch.cat([hidden, torch.randn(tokens, extra, **on)], dim=1)
    teacher_weight = torch.cat([weight, torch.randn(VOCAB, extra, **on) * 0.01], dim=1)
    return [x.to(dtype) for x in (hidden, weight, teacher_hidden, teacher_weight)]


def products(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> None:
    """What no way of computing value and gradients can leave out, in the engine's own chunks."""
    from distill.losses.engine.walk import sizes
    from distill.models.head import addmm_into, mm_into

    chunk, _ = sizes([VOCAB, VOCAB], hidden, torch.float32, None)
    logits = hidden.new_empty(chunk, VOCAB, dtype=torch.float32)
    gradient = hidden.new_empty(chunk, VOCAB).normal_()  # zeros would be multiplied faster
    hidden_gradient = hidden.new_empty(hidden.shape, dtype=torch.float32)
    weight_gradient = hidden.new_zeros(weight.shape, dtype=torch.float32)
    for start in range(0, len(hidden), chunk):
        rows = slice(start, min(start + chunk, len(hidden)))
        size = rows.stop - rows.start
        mm_into(logits[:size], hidden[rows], weight.T)
        mm_into(logits[:size], teacher_hidden[rows], teacher_weight.T)
        mm_into(hidden_gradient[rows], gradient[:size], weight)
        addmm_into(weight_gradient, gradient[:size].T, hidden[rows], 1.0)


def runner(method: str, divergence: str, inputs: list[Tensor]) -> Callable[[], list[Tensor]]:
    """One call of a method, which returns the gradients of the student's hidden states and weight."""
    if method == "products":
        return lambda: products(*inputs) or []
    function = loss_of(method, divergence)

    def run() -> list[Tensor]:
        student = [x.detach().requires_grad_() for x in inputs[:2]]
        function(*student, *inputs[2:]).backward()
        return [x.grad for x in student if x.grad is not None]

    return run


def timed(run: Callable[[], list[Tensor]]) -> float:
    """Milliseconds of one call on the device."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def peak_gib(run: Callable[[], list[Tensor]]) -> float:
    """The most that a call holds beyond its inputs and what it returns."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    returned = run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in returned)) / GIB


def gradient_error(method: str, divergence: str, inputs: list[Tensor]) -> float:
    """|gradient - exact| / |exact| of the hidden states of 128 tokens, exact by autograd in float64."""
    few = [x[:128] if i % 2 == 0 else x for i, x in enumerate(inputs)]
    ours = runner(method, divergence, few)()[0].double()
    wide = [x.double() for x in few]
    wide[0].requires_grad_()
    loss = naive(wide[0] @ wide[1].T, wide[2] @ wide[3].T, 0.0 if divergence == "forward_kl" else 0.5) / len(wide[0])
    exact = torch.autograd.grad(loss, wide[0])[0]
    return float((ours - exact).norm() / exact.norm())


def waits_of(run: Callable[[], Any]) -> dict[str, int]:
    """How often a call makes the host wait for the device, by the place in the code, as far as torch notices."""
    found: dict[str, int] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "synchronizing CUDA operation" in str(warning.message):
            place = f"{'/'.join(Path(warning.filename).parts[-3:])}:{warning.lineno}"
            found[place] = found.get(place, 0) + 1
    return found


def engine_block(tokens: int, dtype: torch.dtype, methods: tuple[str, ...]) -> dict[tuple[str, str], dict[str, float]]:
    """(method, divergence) -> ms, gib, error; a method that fails is left out with its reason."""
    inputs = make_inputs(tokens, dtype)
    found: dict[tuple[str, str], dict[str, float]] = {}
    runs = {(m, d): runner(m, d, inputs) for d in DIVERGENCES for m in methods if (m, d) != ("products", "jsd")}
    for key, run in list(runs.items()):
        try:
            run()
            found[key] = {"gib": peak_gib(run)}
            if key[0] != "products":
                found[key]["error"] = gradient_error(*key, inputs)
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            print(f"{key[0]} {key[1]}: left out, {type(error).__name__}: {reason[:150]}", flush=True)
            del runs[key]
        torch.cuda.empty_cache()
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for _ in range(ROUNDS):
        for key, run in runs.items():
            times[key].append(timed(run))
    for key, all_ms in times.items():
        found[key]["ms"] = statistics.median(all_ms[WARM:])
    return {key: figures for key, figures in found.items() if "ms" in figures}


def engine_table(title: str, tokens: int, found: dict[tuple[str, str], dict[str, float]]) -> list[str]:
    """A Markdown table of a block."""
    bound = found["products", "forward_kl"]["ms"]
    lines = [f"### {title}", "", "| method | divergence | ms | x products | tokens/s | peak GiB | gradient error |"]
    lines.append("|---|---|---|---|---|---|---|")
    for (method, divergence), one in found.items():
        error = f"{one['error']:.1e}" if "error" in one else ""
        lines.append(
            f"| {method} | {divergence if method != 'products' else ''} | {one['ms']:.2f} | {one['ms'] / bound:.2f} | "
            f"{tokens / one['ms'] * 1000:,.0f} | {one['gib']:.2f} | {error} |"
        )
    return [*lines, ""]


def engine_targets(found: dict[tuple[str, str], dict[str, float]], name: str) -> list[Target]:
    """Of one block. Peers' products are rounded to the dtype of the weights, so they can be faster than the bound."""
    bound = found["products", "forward_kl"]["ms"]
    targets = [
        Target(f"{name}: engine / products, {d}", found["distill", d]["ms"] / bound, most, 1.0)
        for d, most in (("forward_kl", 1.25), ("jsd", 1.35))
    ]
    for d in DIVERGENCES:
        ours, eager = found["distill", d], [found[m, d] for m in EAGER_PEERS if (m, d) in found]
        peer = min(eager, key=lambda one: one["ms"])  # naive is always there
        targets.append(
            Target(f"{name}: time / fastest eager peer, {d}", ours["ms"] / peer["ms"], 0.6, bound / peer["ms"])
        )
        targets.append(Target(f"{name}: memory / that peer, {d}", ours["gib"] / peer["gib"], 0.3))
        if name == "bf16":
            compiled = found.get(("liger compiled", d), {}).get("ms")
            over, least = (ours["ms"] / compiled, bound / compiled) if compiled else (None, None)
            targets.append(Target(f"{name}: time / compiled Liger, {d}", over, 0.9, least))
    return targets


def steps(models: tuple[str, ...]) -> tuple[list[str], list[Target]]:
    """Whole steps of each arm, in processes of their own; lines of Markdown and targets."""
    lines = [
        "| model | arm | ms a step | x bare | tokens/s | peak GiB | waits a step |",
        "|---|---|---|---|---|---|---|",
    ]
    targets, places = [], []
    script = str(Path(__file__).with_name("gpu_step.py"))
    with tempfile.TemporaryDirectory() as folder:
        for model in models:
            made = subprocess.run([sys.executable, script, "make", model, folder], capture_output=True, text=True)
            if made.returncode:
                raise SystemExit(f"{model}: {made.stderr.strip().splitlines()[-1]}")
            found: dict[str, dict[str, Any]] = {}
            for arm in ("bare", "distill", "trl"):
                done = subprocess.run([sys.executable, script, arm, model, folder], capture_output=True, text=True)
                if done.returncode:
                    print(f"{model} {arm}: left out, {(done.stderr.strip() or 'killed').splitlines()[-1]}", flush=True)
                    continue
                one = found[arm] = json.loads(done.stdout.splitlines()[-1])
                waits = sum(one["waits"].values())
                over = one["ms"] / found["bare"]["ms"] if "bare" in found else float("nan")
                lines.append(
                    f"| {model} | {arm} | {one['ms']:.1f} | {over:.2f} | {one['tokens_per_s']:,.0f} | "
                    f"{one['gib']:.2f} | {waits} |"
                )
                print(lines[-1], flush=True)
                if arm == "distill":
                    places += [f"- {model}: {count} x `{place}`" for place, count in one["waits"].items()]
            both = "distill" in found and "trl" in found
            ratio = found["distill"]["ms"] / found["trl"]["ms"] if both else None
            targets.append(Target(f"{model}: whole step / TRL", ratio, 0.8))
    where = ["", "Where a step of distill waits for the device:", "", *places] if places else []
    return [*lines, *where, ""], targets


def versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for name in VERSIONS:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def report(options: argparse.Namespace) -> int:
    """Measures, prints and writes everything."""
    from datetime import UTC, datetime

    card = torch.cuda.get_device_properties(0)
    tokens = 8192 if card.total_memory > 70 * GIB else 2048
    head = f"{datetime.now(UTC):%Y-%m-%d}, {card.name} ({card.total_memory / GIB:.0f} GiB), {versions()}."
    lines, targets = [head, "", f"Hidden {STUDENT_WIDTH} / {TEACHER_WIDTH}, {VOCAB:,} ids.", ""], []
    # fp32 products are ten times slower, so fewer tokens; a compiler has nothing to add there.
    for name, count, dtype, methods in (
        ("bf16", tokens, torch.bfloat16, METHODS),
        ("fp32", tokens // 4, torch.float32, METHODS[:-1]),
    ):
        found = engine_block(count, dtype, methods)
        table = engine_table(f"Engine, {count:,} tokens, {name}", count, found)
        print("\n".join(table), flush=True)
        lines += table
        targets += engine_targets(found, name)
        if name == "bf16":
            waits = waits_of(runner("distill", "forward_kl", make_inputs(count, dtype)))
            lines += [f"Waits for the device in a call of the engine: {sum(waits.values())}.", ""]
        gc.collect()
        torch.cuda.empty_cache()
    if not options.engine_only:
        table, judged = steps(MODELS)
        lines += ["### Whole steps, bf16-mixed", "", *table]
        targets += judged
    lines += ["### Targets", "", "| target | ratio | at most | products alone | |", "|---|---|---|---|---|"]
    for target in targets:
        ratio, least = ("" if x is None else f"{x:.3f}" for x in (target.ratio, target.least))
        lines.append(f"| {target.name} | {ratio} | {target.most:.2f} | {least} | {target.verdict} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        Path(options.out).write_text(text)
    return int(any(target.verdict != "ok" for target in targets))


def rehearse() -> int:
    """The engine on fake tensors, the steps with tiny models on the CPU."""
    from distill.losses.engine import fused
    from distill.models.head import widens
    from helpers.fake_cuda import fake_cuda

    print("No CUDA device: a rehearsal on fake tensors and tiny models. Nothing here was timed on a GPU.", flush=True)
    fused._has_triton = lambda: True  # type: ignore[assignment]
    for dtype in (torch.bfloat16, torch.float32):
        for divergence in DIVERGENCES:
            for method in METHODS[:3]:
                widens.cache_clear()
                with fake_cuda() as (_, launches):
                    inputs = [x.requires_grad_() for x in make_inputs(512, dtype)]
                    launches.kernels.clear()
                    if method == "products":
                        products(*(x.detach() for x in inputs))
                    else:
                        loss_of(method, divergence)(*inputs)  # the backward pass of fakes stops in C++
                    kernels = sum(launches.kernels.values())
                print(f"{method} {divergence} {dtype}: {kernels} kernels, {len(launches.copies)} copies", flush=True)
    widens.cache_clear()
    table, _ = steps(("tiny",))
    print("\n".join(table))
    print("Rehearsed; not run on a GPU.")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="a Markdown file to write")
    parser.add_argument("--engine-only", action="store_true", help="without whole steps")
    options = parser.parse_args()
    return report(options) if torch.cuda.is_available() else rehearse()


if __name__ == "__main__":
    sys.exit(main())
