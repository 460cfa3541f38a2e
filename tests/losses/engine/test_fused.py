"""The Triton kernel against the plain divergences in float64, in Triton's interpreter; and compiled for a GPU.

Triton comes with torch's CUDA builds alone; `make test-all` puts a copy into build/triton for these tests.
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from distill.losses.engine import divergence, fused
from distill.losses.engine.divergence import KDLoss
from distill.losses.engine.loss import distillation_loss
from distill.models.head import LMHead
from distill.teachers.targets import DenseTargets

TRITON = Path(__file__).parents[3] / "build" / "triton"
DIVERGENCES = {
    "forward_kl": divergence.forward_kl,
    "reverse_kl": divergence.reverse_kl,
    "jsd": divergence.generalized_jsd,
    "skew_forward_kl": divergence.skew_forward_kl,
    "skew_reverse_kl": divergence.skew_reverse_kl,
    "total_variation": divergence.total_variation,
}
N, V = 3, 150  # more than one block of ids

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, on branches that the kernel's masks leave out
]


@pytest.fixture(scope="module", autouse=True)
def interpreter():
    """The kernel as Python, on CPU tensors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TRITON))
        patch.setenv("TRITON_INTERPRET", "1")
        pytest.importorskip("triton")
        importlib.import_module("distill.losses.engine.triton_rows")
        patch.setattr(fused, "_BLOCK", 64)
        yield


@pytest.fixture
def through_kernel(monkeypatch):
    """Lets the engine take the kernel on a CPU."""
    monkeypatch.setattr(fused, "serves", lambda logits_CV: logits_CV.dtype != torch.float64)


def make_head(vocab, finish):
    if not finish:
        return LMHead(torch.empty(vocab, 0))
    return LMHead(torch.empty(vocab, 0), torch.randn(vocab), scale=0.7, softcap=9.0)


def finished(linear, head):
    linear = (linear if head.bias is None else linear + head.bias.double()) * head.scale
    return linear if head.softcap is None else head.softcap * torch.tanh(linear / head.softcap)


def reference(student, teacher, labels, heads, kd, shared, temperature, factors):
    """Values per token and the gradient over the linear map, by autograd in float64."""
    linear = student.double().requires_grad_()
    x, y = finished(linear, heads[0]), finished(teacher.double(), heads[1])
    lm = cross_entropy(x, labels, reduction="none")
    total, value = factors[1] * lm.sum(), None
    if kd is not None:
        option = {"jsd": {"beta": kd.beta}}
        option |= {name: {"alpha": kd.alpha} for name in ("skew_forward_kl", "skew_reverse_kl")}
        log_q, log_p = ((z[:, :shared] / temperature).log_softmax(-1) for z in (x, y))
        value = DIVERGENCES[kd.divergence](log_q, log_p, **option.get(kd.divergence, {}))
        total = total + factors[0] * temperature * value.sum()  # the factor is of the gradient over logits / T
        value = value.detach()
    return value, lm.detach(), torch.autograd.grad(total, linear)[0] / heads[0].scale


def relative_error(ours, theirs):
    return float((ours.double() - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("name", [*DIVERGENCES, None])
@pytest.mark.parametrize(("vocab", "teacher_vocab"), [(V, V), (V, V - 40), (V - 40, V)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("finish", [False, True], ids=["plain head", "bias, scale and soft-cap"])
@pytest.mark.parametrize("lm", [True, False])
def test_kernel_equals_autograd_in_float64(name, vocab, teacher_vocab, temperature, finish, lm):
    if name is None and not lm:
        return  # nothing to compute
    student, teacher = 1.5 * torch.randn(N, vocab), 1.5 * torch.randn(N, teacher_vocab)
    heads, kd = (make_head(vocab, finish), make_head(teacher_vocab, finish)), KDLoss(name) if name else None
    shared = min(vocab, teacher_vocab) if kd else vocab
    labels, factors = torch.randint(min(vocab, teacher_vocab), (N,)), (0.7, 0.3 if lm else 0.0)
    expected = reference(student, teacher, labels, heads, kd, shared, temperature, factors)
    kd_N, lm_N = torch.empty(N) if kd else None, torch.empty(N) if lm else None
    low = torch.empty(N, vocab, dtype=torch.bfloat16)
    for gradient, tolerance in ((low, 2**-7), (student, 1e-6)):
        fused.fused_rows_(
            student, teacher if kd else None, labels, gradient, kd_N, lm_N, heads, kd, shared, temperature, factors
        )
        for ours, theirs in ((kd_N, expected[0]), (lm_N, expected[1])):
            assert ours is None or relative_error(ours, theirs) < 1e-6
        assert relative_error(gradient, expected[2]) < tolerance


@pytest.mark.usefixtures("through_kernel")
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("lm_weight", [None, 0.3])
def test_the_engine_says_the_same_through_the_kernel_as_without(name, lm_weight, monkeypatch):
    hidden, weight = (torch.randn(n, 6, requires_grad=True) for n in (7, V))
    bias = torch.randn(V, requires_grad=True)
    targets = DenseTargets(torch.randn(7, 4), LMHead(torch.randn(V - 20, 4), softcap=5.0))
    arguments = (hidden, LMHead(weight, bias, scale=0.5, softcap=6.0), torch.randint(V - 20, (7,)), targets)
    options = {"kd": KDLoss(name), "temperature": 2.0, "kd_weight": 0.7, "lm_weight": lm_weight, "chunk_size": 3}
    found = []
    for served in (True, False):
        if not served:
            monkeypatch.setattr(fused, "serves", lambda logits_CV: False)
        got = distillation_loss(*arguments, **options)
        gradients = torch.autograd.grad(got.loss, [hidden, weight, bias])
        found.append([got.loss.detach(), got.kd_sum, *([] if lm_weight is None else [got.lm_sum]), *gradients])
    for ours, theirs in zip(*found, strict=True):
        assert relative_error(ours, theirs.double()) < 3e-6


@pytest.mark.usefixtures("through_kernel")
@pytest.mark.parametrize("name", DIVERGENCES)
def test_excluded_ids_count_for_nothing_and_a_nan_is_passed_on(name):
    hidden, weight = torch.randn(4, 6, requires_grad=True), torch.randn(V, 6, requires_grad=True)
    banned = torch.zeros(V)
    banned[:70] = -torch.inf  # a whole block of ids and more
    labels, teacher = torch.randint(70, V, (4,)), torch.randn(V, 3)
    targets = DenseTargets(torch.randn(4, 3), LMHead(teacher, banned))
    options = {"kd": KDLoss(name), "temperature": 2.0, "kd_weight": 0.7, "lm_weight": 0.3}
    got = distillation_loss(hidden, LMHead(weight, banned), labels, targets, **options)
    cut = DenseTargets(targets.hidden_ND, LMHead(teacher[70:]))
    expected = distillation_loss(hidden, LMHead(weight[70:]), labels - 70, cut, **options)
    for ours, theirs in zip(
        (got.loss, *torch.autograd.grad(got.loss, [hidden, weight])),
        (expected.loss, *torch.autograd.grad(expected.loss, [hidden, weight])),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        hidden[2, 1] = torch.nan
    broken = distillation_loss(hidden, LMHead(weight), labels, cut, **options | {"lm_weight": None})
    assert broken.loss.isnan()


@pytest.mark.usefixtures("through_kernel")
@pytest.mark.parametrize("name", DIVERGENCES)
def test_values_without_gradients_are_the_same(name):
    hidden, head = torch.randn(4, 6, requires_grad=True), LMHead(torch.randn(V, 6))
    targets = DenseTargets(torch.randn(4, 3), LMHead(torch.randn(V, 3)))
    options = {"kd": KDLoss(name), "temperature": 2.0, "kd_weight": 0.7, "lm_weight": 0.3}
    labels = torch.randint(V, (4,))
    with_graph = distillation_loss(hidden, head, labels, targets, **options).loss
    with torch.no_grad():
        without = distillation_loss(hidden, head, labels, targets, **options).loss
    torch.testing.assert_close(without, with_graph.detach(), rtol=1e-6, atol=0)


COMPILE = """
import glob, os, re, subprocess, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from distill.losses.engine.fused import _BLOCK, _WARPS
from distill.losses.engine.triton_rows import fused_rows
pointers = dict.fromkeys(("student", "teacher", "kd_values", "lm_values", "student_bias", "teacher_bias"), "*fp32")
pointers |= {"gradient": "*bf16", "labels": "*i64"}
whole = ("vocab", "shared", "student_stride", "teacher_stride", "gradient_stride")
for kind in ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation", "none"):
    constants = dict(KIND=kind, LM=True, SAME=False, GRADIENT=True, FINISH=0, BLOCK=_BLOCK)
    names = fused_rows.arg_names
    signature = {n: pointers.get(n, "i32" if n in whole else "constexpr" if n in constants else "fp32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in pointers or n in whole}
    source = ASTSource(fused_rows, signature, constants, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": _WARPS})
    assert made.asm["cubin"]
    assembler = glob.glob(os.path.dirname(triton.__file__) + "/backends/nvidia/bin/ptxas*")[0]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(made.asm["ptx"])
        file.flush()
        command = [assembler, "-v", "-arch=sm_90a", file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    print(kind, *re.findall(r"(\\d+) registers", said), *re.findall(r"(\\d+) bytes spill stores", said))
"""


def test_kernel_compiles_for_a_hopper_gpu_without_spills(tmp_path):
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(TRITON), *sys.path]),
    }
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == 7
    for kind, registers, spilled in rows:
        assert int(registers) <= 128, kind  # two programs of eight warps fit a multiprocessor
        assert int(spilled) == 0, kind
