"""Losses of a micro-batch rehearsed on a fake CUDA device: nothing copied, nothing waited for, few kernels."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException

from distill.curriculum import WEIGHT_KEYS, CurriculumState
from distill.losses.attention import AttentionTransfer
from distill.losses.contrastive import Contrastive
from distill.losses.engine import fused
from distill.losses.engine.divergence import KDLoss
from distill.losses.layerwise import Layerwise
from distill.losses.routing import Routing
from distill.models.attention import settle_attention
from distill.models.experts import cast_experts
from distill.models.head import lm_head_of, widens
from distill.teachers.online import OnlineTeacher
from distill.teachers.source import Run
from distill.training.build import teacher_needs
from distill.training.objective import objective
from distill.training.options import ModelOptions
from helpers.fake_cuda import fake, fake_cuda, onto
from helpers.packed import make_batch
from helpers.tiny import tiny_deepseek_v3, tiny_gemma, tiny_gpt_oss, tiny_llama, tiny_qwen3_moe

MIXED = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
EVERYTHING = {"routing": Routing(teacher_layers=2, tau=1.0, num_experts=4), "attention": AttentionTransfer(),
              "layerwise": Layerwise(), "contrastive": Contrastive(queue_size=8)}  # fmt: skip
# Kernels of a forward pass of both models with two layers each, and of the engine with its gradients.
KERNELS = {"vocabulary": 230, "routing": 590, "attention": 395, "layerwise": 270, "contrastive": 340}


wide_llama = partial(tiny_llama, hidden_size=32)  # heads of eight, the least that flash kernels take


def batch_of(packed=True):
    """As the loader makes it, which knows where documents begin."""
    batch = make_batch([[5, 9, 3], [12, 4]] if packed else [[20], [20]], 20)
    documents = batch.student.documents
    tokens = replace(batch.student, starts=documents.starts, longest=documents.longest)
    return replace(batch, student=tokens, teacher=tokens)


def rehearse(
    options=None, precision="bf16-mixed", teacher=wide_llama, student=wide_llama, packed=True, allowed=None,
    attention="auto", **call,
):  # fmt: skip
    """What one micro-batch launches: the models built on the host, moved, and sent through the objective."""
    chosen = ModelOptions("teacher", student_layers=1, **(options or {}))
    theirs, ours = teacher(), student().train()
    for model in (theirs, ours):
        settle_attention(model, attention, "cuda", "model.teacher")
    cast_experts(ours)
    components = list(chosen.components.values())
    for component in components:
        component.build(theirs, ours, 2)
    source = OnlineTeacher(theirs)
    source.open(Run(chosen.kd_loss, teacher_needs(chosen.components), lm_head_of(ours).vocab_size))
    state = CurriculumState(3, 0.5, dict.fromkeys(WEIGHT_KEYS, 1.0), 2.0, None)
    batch = batch_of(packed)
    widens.cache_clear()
    try:
        with fake_cuda(allowed or {}) as (mode, launches):
            widens("cuda")
            onto(theirs, mode, None if precision == "32-true" else torch.bfloat16)
            for module in (ours, *(c for c in components if isinstance(c, nn.Module))):
                onto(module, mode)
            tokens = batch.student._each(lambda tensor: fake(tensor, mode))
            batch = replace(batch, student=tokens, teacher=tokens)
            launches.kernels.clear(), launches.copies.clear()
            dtype = MIXED[precision]
            with torch.autocast("cuda", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                names = chosen.losses
                found = objective(
                    batch, ours, source, names, state, 1.0, kd=chosen.kd_loss, components=components, **call
                )
            assert found.total.is_cuda
            assert list(found.breakdown.raw) == names
    finally:
        widens.cache_clear()
    return launches


@pytest.fixture(autouse=True)
def _with_triton(monkeypatch):
    monkeypatch.setattr(fused, "_has_triton", lambda: True)


@pytest.mark.parametrize("precision", MIXED)
def test_all_nine_losses_touch_the_host_nowhere(precision):
    launches = rehearse(EVERYTHING, precision)
    assert not launches.copies
    assert launches.kernels.total() <= 890


@pytest.mark.parametrize("loss", KERNELS)
def test_each_loss_keeps_to_its_kernels(loss):
    launches = rehearse({loss: EVERYTHING[loss]} if loss in EVERYTHING else {})
    assert not launches.copies
    assert launches.kernels.total() <= KERNELS[loss]


def test_validation_with_its_metrics_touches_the_host_nowhere():
    with torch.no_grad():
        assert not rehearse(EVERYTHING, metrics=True).copies


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "unpacked"])
@pytest.mark.parametrize(
    "make",
    [wide_llama, tiny_gemma, tiny_qwen3_moe, tiny_deepseek_v3],
    ids=["llama", "gemma", "qwen3_moe", "deepseek_v3"],
)
def test_no_family_waits_to_find_documents(make, packed):
    assert not rehearse(teacher=make, student=make, packed=packed).copies


def test_packed_rows_have_no_dense_mask_in_16_bits():
    launches = rehearse()
    assert launches.kernels["torch_attn::_varlen_attn"] == 4  # two layers of each model
    assert launches.kernels["bucketize"] == 0
    masked = rehearse(precision="32-true")
    assert masked.kernels["torch_attn::_varlen_attn"] == 0
    assert masked.kernels["bucketize"] == 1  # for both models and all layers


@pytest.mark.parametrize(("make", "waits"), [(tiny_llama, 2), (tiny_gemma, 4), (tiny_gpt_oss, 0)])
def test_what_transformers_waits_for_is_named_and_counted(make, waits):
    """Families that keep its attention are searched for documents, once a forward pass and kind of layer, if at all."""
    own = {"attention": "eager" if make is tiny_gpt_oss else "sdpa"}
    launches = rehearse(teacher=make, student=make, allowed={"find_packed_sequence_indices": False}, **own)
    assert launches.waits["find_packed_sequence_indices"] == launches.waits.total() == waits
    assert not launches.copies


def test_a_single_sample_is_drawn_without_a_wait(monkeypatch):
    """Of one draw CUDA checks the probabilities on the host, in C++, where no fake sees it."""
    drawn = []

    def multinomial(probs, draws, draw=torch.multinomial, **options):
        drawn.append(draws)
        return draw(probs, draws, **options)

    monkeypatch.setattr(torch, "multinomial", multinomial)
    assert not rehearse({"kd_loss": KDLoss(samples=1)}).copies
    assert drawn
    assert min(drawn) > 1


def test_a_planted_wait_is_caught(monkeypatch):
    def waiting(self, student, teacher, batch, measure=AttentionTransfer.__call__):
        total = measure(self, student, teacher, batch)
        return total if total > 0 else total * 0

    monkeypatch.setattr(AttentionTransfer, "__call__", waiting)
    with pytest.raises(DataDependentOutputException):
        rehearse({"attention": AttentionTransfer()})
