"""Attention transfer against plain loops in float64, transformers' own maps, and the rules of the contract."""

import math
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from distill.errors import UserError
from distill.losses import map_kl as map_module
from distill.losses import relation_kl as relation_module
from distill.losses.attention import AttentionTransfer
from distill.models.trace import QKV, Needs, Trace, trace
from helpers import tiny
from helpers.packed import make_batch, separate

FORMS = ["relations", "maps"]
FAMILIES = [getattr(tiny, name) for name in dir(tiny) if name.startswith("tiny_") and name != "tiny_gpt_oss"]
STUDENT = {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 3, "num_hidden_layers": 3}
DOCUMENTS = [[5, 4], [9], [2, 1, 3]]
MASKED = [(0, 2), (1, 5), (1, 6)]


def random_qkv(batch, heads, groups, width, value_width, seed, mask=None):
    generator = torch.Generator().manual_seed(seed)
    rows, length = batch.student.input_ids.shape
    shapes = [(heads, width), (groups, width), (groups, value_width)]
    states = [torch.randn(rows, n, length, d, generator=generator, dtype=torch.float64) for n, d in shapes]
    return QKV(*states, mask, width**-0.5, True)


def leaves(qkv):
    states = [s.requires_grad_() for s in (qkv.query_BHLd, qkv.key_BGLd, qkv.value_BGLd)]
    return qkv, states


def queries_of(batch):
    """Row and position of every query, and its keys: itself and what is earlier in its document."""
    length = batch.student.input_ids.shape[1]
    for flat in batch.student.positions.tolist():
        row, i = divmod(flat, length)
        if (before := int(batch.student.position_ids[row, i])) > 0:
            yield row, i, range(i - before, i + 1)


def softmax(scores):
    exps = [torch.exp(s - max(scores).detach()) for s in scores]
    return [e / sum(exps) for e in exps]


def plain_relations(student, teacher, batch, relation_heads):
    total = 0.0
    for kind in range(3):
        sides = []
        for qkv in (student, teacher):
            states = (qkv.query_BHLd, qkv.key_BGLd, qkv.value_BGLd)[kind]
            sides.append(torch.cat([states[:, head] for head in range(states.shape[1])], dim=-1))
        widths = [side.shape[-1] for side in sides]
        count = relation_heads or max(n for n in range(1, 17) if math.gcd(*widths) % n == 0)
        for row, i, keys in queries_of(batch):
            for head in range(count):
                q, p = (
                    softmax([s[row, i, part] @ s[row, j, part] / math.sqrt(width / count) for j in keys])
                    for s, width in zip(sides, widths, strict=True)
                    for part in [slice(head * width // count, (head + 1) * width // count)]
                )
                total = total + sum(b * torch.log(b / a) for a, b in zip(q, p, strict=True)) / count / 3
    return total


def plain_maps(student, teacher, batch):
    total = 0.0
    for row, i, keys in queries_of(batch):
        keys = [j for j in keys if all(s.mask is None or s.mask[row, 0, i, j] for s in (student, teacher))]
        maps = []
        for qkv in (student, teacher):
            heads, groups = qkv.query_BHLd.shape[1], qkv.key_BGLd.shape[1]
            each = []
            for head in range(heads):
                key = qkv.key_BGLd[row, head // (heads // groups)]
                each.append(softmax([qkv.query_BHLd[row, head, i] @ key[j] * qkv.scale for j in keys]))
            maps.append([sum(column) / heads for column in zip(*each, strict=True)])
        total = total + sum(p * torch.log(p / q) for q, p in zip(*maps, strict=True))
    return total


def loss_of(form, student, teacher, batch, **options):
    empty = torch.zeros(0)
    return AttentionTransfer(form, **options)(Trace(empty, {}, {0: student}), Trace(empty, {}, {0: teacher}), batch)


@pytest.mark.parametrize("block_rows", [2, 64])
@pytest.mark.parametrize("form", ["relations", "two heads", "maps", "windows"])
def test_value_and_gradient_against_loops(form, block_rows, monkeypatch):
    """Different head counts, grouped keys, value heads of another width, packed documents, masked labels, padding."""
    for module in (map_module, relation_module):
        monkeypatch.setattr(module, "CPU_BLOCK_BYTES", 0)
        monkeypatch.setattr(module, "LEAST_ROWS", block_rows)
    batch = make_batch(DOCUMENTS, 10, MASKED)
    window = (torch.arange(10)[:, None] - torch.arange(10) < 3)[None, None].expand(3, 1, 10, 10)
    mask = window if form == "windows" else None
    teacher = random_qkv(batch, 4, 2, 6, 8, seed=0, mask=mask)
    expected_side, expected_leaves = leaves(random_qkv(batch, 6, 3, 4, 4, seed=1))
    side, ours = leaves(random_qkv(batch, 6, 3, 4, 4, seed=1))
    if form in ("maps", "windows"):
        expected, value = plain_maps(expected_side, teacher, batch), loss_of("maps", side, teacher, batch)
    else:
        heads = 2 if form == "two heads" else None
        expected = plain_relations(expected_side, teacher, batch, heads)
        value = loss_of("relations", side, teacher, batch, relation_heads=heads)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert value.item() > 0.1
    (expected * 0.7).backward()
    (value * 0.7).backward()
    for one, other in zip(ours, expected_leaves, strict=True):
        if other.grad is None:
            assert one.grad is None  # the values of maps
        else:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_it_is_zero_for_the_teacher_itself(form):
    batch = make_batch(DOCUMENTS, 10)
    side, ours = leaves(random_qkv(batch, 4, 2, 4, 4, seed=0))
    value = loss_of(form, side, random_qkv(batch, 4, 2, 4, 4, seed=0), batch)
    value.backward()
    assert abs(value.item()) < 1e-12
    assert all(s.grad is None or s.grad.abs().max() < 1e-12 for s in ours)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_scores_of_any_size_stay_finite(scale):
    batch = make_batch([[8]], 8)
    student, teacher = random_qkv(batch, 4, 2, 4, 4, seed=0), random_qkv(batch, 2, 1, 4, 4, seed=1)
    side, ours = leaves(QKV(student.query_BHLd * scale, student.key_BGLd * scale, student.value_BGLd, None, 1.0, True))
    value = loss_of("maps", side, QKV(teacher.query_BHLd * scale, *_rest(teacher)), batch)
    value.backward()
    assert math.isfinite(value.item())
    assert all(s.grad.isfinite().all() for s in ours[:2])


def _rest(qkv):
    return qkv.key_BGLd, qkv.value_BGLd, qkv.mask, qkv.scale, qkv.plain


# With models


def built(form, teacher, student, **options):
    loss = AttentionTransfer(form, **options)
    loss.build(teacher, student)
    return loss


def run(loss, teacher, student, batch):
    with torch.no_grad():
        taught = trace(teacher, batch.student, loss.teacher_needs)
    return loss(trace(student, batch.student, loss.student_needs), taught, batch)


def double(model):
    """In float64, which the fused experts do not know; norms and eager softmaxes remain in fp32 inside."""
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")
    return model.double()


def eager_maps(make, batch, layer, **options):
    """Head-averaged attention [B, L, L] as transformers itself returns it."""
    model = double(make(attn_implementation="eager", **options))
    packed = {"position_ids": batch.student.position_ids} if batch.student.packed else {}
    output = model(batch.student.input_ids, output_attentions=True, use_cache=False, **packed)
    return output.attentions[layer].mean(1)


@pytest.mark.parametrize("make", FAMILIES)
def test_maps_are_those_that_transformers_returns(make):
    batch = make_batch([[7], [4]] if make is tiny.tiny_gpt2 else [[3, 4], [5, 2]], 8)
    teacher, student = double(make()), double(tiny.tiny_llama(**STUDENT))
    value = run(built("maps", teacher, student), teacher, student, batch)
    p, q = eager_maps(make, batch, -1), eager_maps(tiny.tiny_llama, batch, -1, **STUDENT)
    expected = 0.0
    for row, i, keys in queries_of(batch):
        keys = list(keys)
        assert p[row, i, keys].sum().item() == pytest.approx(1, abs=1e-6)  # documents do not see each other
        expected += (p[row, i, keys] * (p[row, i, keys] / q[row, i, keys]).log()).sum().item()
    assert value.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make", [tiny.tiny_llama, tiny.tiny_gemma, tiny.tiny_qwen3_moe, tiny.tiny_deepseek_v3])
def test_any_split_of_the_same_tokens_gives_the_same_sum_and_gradient(make, form):
    """Packed with padding, and each document by itself: no other document, padding or row has a say."""
    batch = make_batch([[5, 4], [8]], 10, [(0, 7), (1, 3)])
    teacher, student = double(make()), double(make())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.2)
    loss = built(form, teacher, student)
    value = run(loss, teacher, student, batch)
    value.backward()
    whole = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    parts = [run(loss, teacher, student, part) for part in separate(batch)]
    sum(parts).backward()
    assert sum(parts).item() == pytest.approx(value.item(), rel=1e-8)
    assert value.item() > 1e-3
    for name, parameter in student.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("form", FORMS)
def test_padding_may_hold_anything(form):
    batch = make_batch([[5], [3]], 8)
    side, ours = leaves(random_qkv(batch, 4, 2, 4, 4, seed=0))
    teacher = random_qkv(batch, 4, 2, 4, 4, seed=1)
    expected = loss_of(form, side, teacher, batch).item()
    spoilt, spoilt_leaves = random_qkv(batch, 4, 2, 4, 4, seed=0), []
    with torch.no_grad():
        for qkv in (spoilt, teacher):
            for states in (qkv.query_BHLd, qkv.key_BGLd, qkv.value_BGLd):
                states[:, :, 5:], states[1, :, 3:] = torch.nan, torch.inf
    spoilt, spoilt_leaves = leaves(spoilt)
    value = loss_of(form, spoilt, teacher, batch)
    value.backward()
    assert value.item() == pytest.approx(expected, rel=1e-12)
    for states in spoilt_leaves:
        if states.grad is not None:
            assert not states.grad[1, :, 3:].any()
            assert states.grad.isfinite().all()
    assert len(ours) == 3


def test_gradient_checkpointing_changes_nothing():
    """The recomputation in the backward pass runs every layer again, and must not be read again."""
    batch, teacher = make_batch([[5, 4], [8]], 10), double(tiny.tiny_qwen3_moe())
    for form in FORMS:
        gradients = []
        for checkpointing in (False, True):
            student = double(tiny.tiny_llama(**STUDENT)).train()
            if checkpointing:
                student.activation_checkpointing_enable()
            value = run(built(form, teacher, student, student_layer=1), teacher, student, batch)
            value.backward()
            gradients.append({n: p.grad for n, p in student.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys()
        assert any("layers.1" in name for name in gradients[0])
        assert not any("layers.2" in name for name in gradients[0])
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-12, atol=1e-14)


def test_nothing_is_installed_but_during_the_forward_pass():
    model, batch = tiny.tiny_llama(), make_batch([[4]], 4)
    original, calls = ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def note(*args, **kwargs):
        calls.append(ALL_ATTENTION_FUNCTIONS["sdpa"])
        return original(*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = note
    try:
        assert not trace(model, batch.student).attention
        assert calls == [note, note]  # no need, no wrapper
        assert list(trace(model, batch.student, Needs(attention=frozenset([1]))).attention) == [1]
        assert all(call is not note for call in calls[2:])
        with pytest.raises(IndexError):
            trace(model, replace(batch.student, input_ids=torch.tensor([[10**6]])), Needs(attention=frozenset([1])))
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is note
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    trace(model, batch.student, Needs(attention=frozenset([1])))
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is original
    assert "sdpa" not in ALL_ATTENTION_FUNCTIONS._local_mapping


@pytest.mark.parametrize("form", FORMS)
def test_reading_leaves_the_forward_pass_as_it_is_and_the_teacher_without_gradient(form):
    batch = make_batch([[5, 4], [8]], 10)
    teacher, student = tiny.tiny_llama(), tiny.tiny_llama(**STUDENT)
    loss = built(form, teacher, student)
    plain, read = trace(student, batch.student), trace(student, batch.student, loss.student_needs)
    assert torch.equal(plain.last_BLD, read.last_BLD)
    taught = trace(teacher, batch.student, loss.teacher_needs)  # even where nobody thought of no_grad
    loss(read, taught, batch).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert any(parameter.grad is not None for parameter in student.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_states_are_compared_in_fp32(form):
    batch = make_batch([[8], [6]], 8)
    teacher, student = tiny.tiny_llama().bfloat16(), tiny.tiny_llama(**STUDENT).bfloat16()
    value = run(built(form, teacher, student), teacher, student, batch)
    assert value.dtype == torch.float32
    value.backward()
    assert any(p.grad is not None and p.grad.any() for p in student.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_without_queries_is_zero(form):
    batch = make_batch([[1], [2]], 4, [(1, 1)])
    assert not batch.student.positions.numel()
    side, ours = leaves(random_qkv(batch, 4, 2, 4, 4, seed=0))
    value = loss_of(form, side, random_qkv(batch, 4, 2, 4, 4, seed=1), batch)
    value.backward()
    assert value.item() == 0
    assert not ours[0].grad.any()


@pytest.mark.parametrize("form", FORMS)
def test_no_value_is_read_back_from_the_device(form):
    batch = make_batch([[6], [4]], 8)
    student, teacher = random_qkv(batch, 4, 2, 4, 4, seed=0), random_qkv(batch, 4, 2, 4, 4, seed=1)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        tokens = replace(batch.student, **{key: mode.from_tensor(v) for key, v in batch.student.tensors().items()})
        fake = replace(batch, student=tokens, teacher=tokens)
        sides = [
            QKV(*(mode.from_tensor(s) for s in (q.query_BHLd, q.key_BGLd, q.value_BGLd)), None, 1.0, True)
            for q in (student, teacher)
        ]
        side, _ = leaves(sides[0])
        loss_of(form, side, sides[1], fake).backward()


def test_coefficient_scales_and_layers_are_chosen():
    batch = make_batch([[8], [6]], 8)
    teacher, student = tiny.tiny_llama(num_hidden_layers=4), tiny.tiny_llama(**STUDENT)
    loss = built("relations", teacher, student)
    assert (loss.teacher_needs.attention, loss.student_needs.attention) == (frozenset([3]), frozenset([2]))
    other = built("relations", teacher, student, teacher_layer=1, student_layer=0, coefficient=3.0)
    assert other.settings() == {
        "form": "relations",
        "teacher_layer": 1,
        "student_layer": 0,
        "relation_heads": None,
        "coefficient": 3.0,
    }
    single = built("relations", teacher, student, teacher_layer=1, student_layer=0)
    value = run(other, teacher, student, batch).item()
    assert value == pytest.approx(3 * run(single, teacher, student, batch).item(), rel=1e-6)
    assert value != pytest.approx(3 * run(loss, teacher, student, batch).item(), rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coefficient": -1.0}, "model.attention.coefficient: -1.0; give a number from 0 up"),
        ({"relation_heads": 0}, "model.attention.relation_heads: 0 is not a count"),
        ({"relation_heads": 2, "form": "maps"}, "model.attention.relation_heads: 2 has no meaning for maps"),
        (
            {"relation_heads": 3},
            "model.attention.relation_heads: 3 does not divide the width 16 of the student's queries",
        ),
        ({"teacher_layer": 2}, "model.attention.teacher_layer: 2 is not a layer; the model has layers 0 to 1"),
        ({"student_layer": -1}, "model.attention.student_layer: -1 is not a layer"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        built(options.pop("form", "relations"), tiny.tiny_llama(), tiny.tiny_llama(), **options)


def test_attention_that_cannot_be_read_is_refused_by_name():
    with pytest.raises(
        UserError, match=r"model.attention.teacher_layer: 1 of GptOssForCausalLM \(eager attention\) hands"
    ):
        built("relations", tiny.tiny_gpt_oss(), tiny.tiny_llama())
