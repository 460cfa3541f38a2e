"""The estimate against real tensors: the same counter over real passes, the real loss engine, and hand arithmetic."""

import resource

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distill.losses.engine.divergence import KDLoss
from distill.losses.engine.loss import distillation_loss
from distill.models.head import lm_head_of
from distill.models.lora import LoRA
from distill.models.skeleton import skeleton
from distill.preflight.live_bytes import LiveBytes, Shape, trace_student, trace_teacher
from distill.preflight.memory import (
    PROCESS_BYTES,
    Parts,
    active_parameters,
    engine_bytes,
    estimate_memory,
    forward_flops,
    size_of,
    trace,
)
from distill.teachers.targets import DenseTargets
from helpers.thirty_billion import THIRTY_B

CONFIG = LlamaConfig(
    vocab_size=1000,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
SHAPE = Shape(rows=2, length=64)


def decode(model, shape):
    ids_BL = torch.zeros(shape.rows, shape.length, dtype=torch.long)
    return model.get_decoder()(input_ids=ids_BL, use_cache=False).last_hidden_state


def linears(model) -> list[tuple[str, torch.nn.Linear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


def test_live_bytes_follow_births_and_ends():
    with LiveBytes() as live:
        a = torch.zeros(1000)
        b = a + 1
        assert live.now == 8000
        view = b[:10]
        assert live.now == 8000, "a view has no storage of its own"
        del a
        assert (live.now, live.peak) == (4000, 8000)
        del b
        assert live.now == 4000, "the view keeps it"
        del view
        assert live.now == 0


def assert_trace_equals_real_passes(model, without_memory, shape, learns_head: bool) -> None:
    with LiveBytes() as live:
        for parameter in model.parameters():
            live.count(parameter)
        start = live.now
        hidden_BLD = decode(model, shape)
        kept = live.now - start
        learning = [hidden_BLD, *([model.get_output_embeddings().weight] if learns_head else [])]
        torch.autograd.backward(learning, [torch.zeros_like(tensor) for tensor in learning])
        peak = live.peak - start
    estimated_kept, estimated_peak = trace_student(without_memory, shape)
    assert estimated_kept == pytest.approx(kept, rel=0.02)
    assert estimated_peak == pytest.approx(peak, rel=0.02)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_student_trace_equals_real_passes(checkpointing):
    model = LlamaForCausalLM(CONFIG).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    shape = Shape(2, 64, checkpointing=checkpointing)
    assert_trace_equals_real_passes(model, skeleton(CONFIG, torch.float32), shape, learns_head=True)


def test_adapters_learn_alone():
    plain, adapted, real = skeleton(CONFIG, torch.float32), skeleton(CONFIG, torch.float32), LlamaForCausalLM(CONFIG)
    for model in (adapted, real.train()):
        LoRA(r=4).add_to(model)
    assert_trace_equals_real_passes(real, adapted, SHAPE, learns_head=False)
    sides = [(size.in_features, size.out_features) for name, size in linears(plain) if "lm_head" not in name]
    learning = sum(4 * 4 * (into + out) for into, out in sides)
    estimate = estimate_memory(adapted, plain, trace(adapted, plain, SHAPE))
    assert (estimate.gradients, estimate.optimizer) == (learning, 2 * learning)
    assert estimate.weights == size_of(plain.parameters()) + learning


def test_checkpointing_keeps_less_and_mixed_precision_traces():
    model = skeleton(CONFIG, torch.float32)
    plain, _ = trace_student(model, SHAPE)
    checkpointed, _ = trace_student(model, Shape(2, 64, checkpointing=True))
    mixed, _ = trace_student(model, Shape(2, 64, autocast=torch.bfloat16))
    assert checkpointed < plain / 4
    assert 0 < mixed < 1.5 * plain


def test_teacher_trace_equals_a_real_pass_of_any_depth():
    model = LlamaForCausalLM(CONFIG).eval()
    with torch.no_grad(), LiveBytes() as live:
        for parameter in model.parameters():
            live.count(parameter)
        start = live.now
        decode(model, SHAPE)
    deep = LlamaConfig(**{**CONFIG.to_dict(), "num_hidden_layers": 12})
    assert trace_teacher(skeleton(CONFIG, torch.float32), SHAPE) == pytest.approx(live.peak - start, rel=0.02)
    assert trace_teacher(skeleton(deep, torch.float32), SHAPE) == pytest.approx(live.peak - start, rel=0.02)


def test_engine_bytes_are_what_the_engine_takes():
    student, teacher = LlamaForCausalLM(CONFIG), LlamaForCausalLM(CONFIG).requires_grad_(False)
    hidden_BLD = torch.randn(2, 64, 64, requires_grad=True)
    rows = torch.arange(126)
    with LiveBytes() as live:
        for tensor in (*student.parameters(), *teacher.parameters(), hidden_BLD):
            live.count(tensor)
        start = live.now
        output = distillation_loss(
            hidden_BLD.flatten(0, 1).index_select(0, rows),
            lm_head_of(student),
            rows,
            DenseTargets(hidden_BLD.detach().flatten(0, 1).index_select(0, rows), lm_head_of(teacher)),
            kd=KDLoss(),
            temperature=2.0,
            kd_weight=1.0,
            lm_weight=1.0,
        )
        peak = live.peak - start
    assert output.loss.requires_grad
    assert engine_bytes(student, teacher, SHAPE) == pytest.approx(peak, rel=0.15)


def test_strategies_are_arithmetic():
    student, teacher = skeleton(CONFIG, torch.float32), skeleton(CONFIG, torch.bfloat16)
    parameters = sum(p.numel() for p in LlamaForCausalLM(CONFIG).parameters())
    parts = Parts(activations=1000, backward=500, teacher_pass=10, engine=200)
    alone = estimate_memory(student, teacher, parts, extra_parameters=7)
    assert alone.weights == alone.gradients == 4 * (parameters + 7)
    assert alone.optimizer == 2 * alone.weights
    assert alone.teacher == 2 * parameters
    assert alone.step == 3 * alone.weights + alone.teacher + PROCESS_BYTES + 1200
    kept = estimate_memory(student, teacher, parts, extra_parameters=7, accumulates=True)
    assert kept.step - alone.step == alone.weights, "gradients of the micro-batches before"
    ddp = estimate_memory(student, teacher, parts, extra_parameters=7, devices=4)
    assert ddp.step - alone.step == alone.weights, "the gradients' buckets"
    sharded = estimate_memory(student, teacher, parts, extra_parameters=7, devices=4, sharded=True)
    for part in ("weights", "gradients", "optimizer", "teacher"):
        assert getattr(sharded, part) == getattr(alone, part) // 4
    assert sharded.buckets == 0
    assert sharded.gathered > 0


def test_thirty_billion_parameters_cost_no_memory():
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    teacher, student = skeleton(THIRTY_B, torch.bfloat16), skeleton(CONFIG, torch.float32)
    assert size_of(teacher.parameters()) == pytest.approx(61.06e9, rel=0.002)
    assert active_parameters(teacher) == pytest.approx(3.04e9, rel=0.01)  # 3.35e9 with the input embeddings
    assert forward_flops(teacher, 10, 64) == pytest.approx(20 * active_parameters(teacher), rel=0.01)
    parts = trace(student, teacher, SHAPE)
    eight = estimate_memory(student, teacher, parts, devices=8, sharded=True)
    assert eight.teacher == pytest.approx(61.06e9 / 8, rel=0.002)
    assert eight.step > eight.teacher
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 1_000_000
