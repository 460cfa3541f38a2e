"""Layerwise matching against plain loops in float64, and the rules of the contract."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from distill.errors import UserError
from distill.losses.layerwise import Layerwise
from distill.models.cut import cut_layers
from distill.models.trace import Trace, trace
from helpers import tiny
from helpers.packed import make_batch, separate

DISTANCES = ["mse", "cosine"]
STUDENT = {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 3, "num_hidden_layers": 3}


def built(teacher, student, seed=0, **options):
    loss = Layerwise(**options)
    torch.manual_seed(seed)
    loss.build(teacher, student)
    return loss


def double(model):
    if hasattr(model.config, "num_experts_per_tok"):  # the fused experts do not know float64
        model.set_experts_implementation("eager")
    return model.double()


def run(loss, teacher, student, batch):
    with torch.no_grad():
        taught = trace(teacher, batch.student, loss.teacher_needs)
    return loss(trace(student, batch.student, loss.student_needs), taught, batch)


def random_states(batch, layers, width, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (*batch.student.input_ids.shape, width)
    hidden = {layer: torch.randn(shape, generator=generator, dtype=torch.float64) for layer in layers}
    return Trace(torch.zeros(0), hidden, {})


def plain(loss, student, teacher, batch):
    total, length = 0.0, batch.student.input_ids.shape[1]
    for projection, (ours, theirs) in zip(loss.projections, loss.pairs, strict=True):
        for flat in batch.student.positions.tolist():
            row, i = divmod(flat, length)
            if batch.student.position_ids[row, i] == 0:
                continue
            x, target = student.hidden[ours][row, i], teacher.hidden[theirs][row, i]
            x = (x - x.mean()) / math.sqrt(((x - x.mean()) ** 2).mean())
            y = torch.stack([w @ x + b for w, b in zip(projection.weight, projection.bias, strict=True)])
            if loss.distance == "mse":
                normal = (target - target.mean()) / math.sqrt(((target - target.mean()) ** 2).mean())
                total = total + sum((a - b) ** 2 for a, b in zip(y, normal, strict=True)) / len(y)
            else:
                total = total + 1 - (y @ target) / torch.sqrt(y @ y) / math.sqrt(target @ target)
    return total / len(loss.pairs) * loss.coefficient


@pytest.mark.parametrize("distance", DISTANCES)
def test_value_and_gradient_against_loops(distance):
    batch = make_batch([[5, 4], [9], [2, 1, 3]], 10, [(0, 2), (1, 5)])
    teacher, student = tiny.tiny_llama(num_hidden_layers=4), tiny.tiny_llama(**STUDENT)
    loss = built(teacher, student, distance=distance, coefficient=0.5).double()
    ours, theirs = random_states(batch, [0, 1, 2], 24, 0), random_states(batch, [0, 1, 2, 3], 16, 1)
    value, expected = loss(ours, theirs, batch), plain(loss, ours, theirs, batch)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    gradient, other = (torch.autograd.grad(x, list(loss.parameters())) for x in (value, expected))
    for one, two in zip(gradient, other, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


def test_one_is_predicting_nothing_whatever_the_teachers_scale():
    batch = make_batch([[9]], 10)
    loss = built(tiny.tiny_llama(), tiny.tiny_llama(**STUDENT)).double()
    for parameter in loss.parameters():
        torch.nn.init.zeros_(parameter)
    ours, theirs = random_states(batch, [0, 1, 2], 24, 0), random_states(batch, [0, 1], 16, 1)
    for scale in (1e-3, 1.0, 1e3):
        scaled = Trace(theirs.last_BLD, {i: s * scale for i, s in theirs.hidden.items()}, {})
        assert loss(ours, scaled, batch).item() == pytest.approx(batch.units["queries"], rel=1e-9)


@pytest.mark.parametrize("distance", DISTANCES)
def test_embeddings_and_first_positions_have_no_say(distance):
    """The first position of every document may hold a massive activation on either side."""
    batch = make_batch([[5, 4]], 10)
    loss = built(tiny.tiny_llama(), tiny.tiny_llama(**STUDENT), distance=distance).double()
    ours, theirs = random_states(batch, [0, 1, 2], 24, 0), random_states(batch, [0, 1], 16, 1)
    expected = loss(ours, theirs, batch).item()
    for side in (ours, theirs):
        for states in side.hidden.values():
            states[0, [0, 5]] *= 1e4
            states[0, [0, 5]] += 7
            states[0, 9] = torch.nan  # padding
    assert loss(ours, theirs, batch).item() == pytest.approx(expected, rel=1e-12)
    assert all(layer >= 0 for pair in loss.pairs for layer in pair)  # 0 is the first layer's output


@pytest.mark.parametrize("make", [tiny.tiny_gemma, tiny.tiny_qwen3_moe])
@pytest.mark.parametrize("distance", DISTANCES)
def test_any_split_of_the_same_tokens_gives_the_same_sum_and_gradient(make, distance):
    batch = make_batch([[5, 4], [8]], 10, [(0, 7), (1, 3)])
    teacher, student = double(make()), double(tiny.tiny_llama(**STUDENT))
    loss = built(teacher, student, distance=distance).double()
    trained = [*student.parameters(), *loss.parameters()]
    value = run(loss, teacher, student, batch)
    parts = [run(loss, teacher, student, part) for part in separate(batch)]
    assert sum(parts).item() == pytest.approx(value.item(), rel=1e-8)
    assert sum(part.units["queries"] for part in separate(batch)) == batch.units["queries"]
    whole, summed = (torch.autograd.grad(x, trained, allow_unused=True) for x in (value, sum(parts)))
    reached = 0
    for one, two in zip(whole, summed, strict=True):
        if one is not None:
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-8)
            reached += 1
    assert reached > 10


@pytest.mark.parametrize("distance", DISTANCES)
def test_projections_learn_nothing_from_features_without_information(distance):
    """Control: with the student's states redrawn each step no projection beats its best constant prediction."""
    batch = make_batch([[16]] * 16, 16)
    teacher, student = tiny.tiny_qwen3_moe(), tiny.tiny_llama(**STUDENT)
    loss = built(teacher, student, distance=distance, teacher_layers=[1])
    with torch.no_grad():
        taught = trace(teacher, batch.student, loss.teacher_needs)
    optimizer, late = torch.optim.Adam(loss.parameters(), lr=3e-2), []
    for step in range(150):
        states = random_states(batch, loss.student_needs.hidden, 24, step)
        value = loss(states, taught, batch) / batch.units["queries"]
        if step >= 130:
            late.append(value.item())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    positions = batch.student.positions[batch.student.position_ids.flatten()[batch.student.positions] > 0]
    target = taught.hidden[1].flatten(0, 1)[positions]
    if distance == "mse":
        target = torch.nn.functional.layer_norm(target, target.shape[-1:])
        constant = (target - target.mean(0)).square().mean().item()
    else:
        constant = 1 - torch.nn.functional.normalize(target, dim=-1).mean(0).norm().item()
    assert sum(late) / len(late) >= 0.95 * constant
    assert constant > 0.1


def test_a_student_that_knows_is_found_out():
    """The control's counterpart: from states that determine the target the projection learns it."""
    batch = make_batch([[16]] * 16, 16)
    teacher = tiny.tiny_llama()
    loss = built(teacher, tiny.tiny_llama(), teacher_layers=[1], student_layers=[0], projection="linear")
    with torch.no_grad():
        taught = trace(teacher, batch.student, loss.teacher_needs)
    optimizer = torch.optim.Adam(loss.parameters(), lr=3e-2)
    for _ in range(300):
        value = loss(Trace(taught.last_BLD, {0: taught.hidden[1]}, {}), taught, batch) / batch.units["queries"]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert value.item() < 0.05


def test_only_student_and_projections_get_gradient():
    batch = make_batch([[5, 4], [8]], 10)
    teacher, student = tiny.tiny_llama(), tiny.tiny_llama(**STUDENT)
    loss = built(teacher, student)
    run(loss, teacher, student, batch).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None and p.grad.any() for p in loss.parameters())
    assert student.get_decoder().layers[0].mlp.up_proj.weight.grad.any()
    assert list(loss.trained_by("layerwise_loss")) == list(loss.parameters())
    assert not list(loss.trained_by("kd_loss"))


def test_gradient_checkpointing_changes_nothing():
    batch, teacher, gradients = make_batch([[5, 4], [8]], 10), double(tiny.tiny_llama()), []
    for checkpointing in (False, True):
        student = double(tiny.tiny_llama(**STUDENT)).train()
        if checkpointing:
            student.activation_checkpointing_enable()
        run(built(teacher, student).double(), teacher, student, batch).backward()
        gradients.append({name: p.grad for name, p in student.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-12, atol=1e-14)


def test_half_precision_is_compared_in_fp32():
    batch = make_batch([[8], [6]], 8)
    teacher, student = tiny.tiny_llama().bfloat16(), tiny.tiny_llama(**STUDENT).bfloat16()
    loss = built(teacher, student).bfloat16()
    value = run(loss, teacher, student, batch)
    assert value.dtype == torch.float32
    value.backward()
    assert all(p.grad.any() for p in loss.parameters())


@pytest.mark.parametrize("distance", DISTANCES)
def test_a_batch_without_units_is_zero(distance):
    batch = make_batch([[1], [2]], 4, [(1, 1)])
    loss = built(tiny.tiny_llama(), tiny.tiny_llama(**STUDENT), distance=distance).double()
    value = loss(random_states(batch, [0, 1, 2], 24, 0), random_states(batch, [0, 1], 16, 1), batch)
    value.backward()
    assert value.item() == 0
    assert not any(p.grad.any() for p in loss.parameters())


def test_no_value_is_read_back_from_the_device():
    batch = make_batch([[6], [4]], 8)
    loss = built(tiny.tiny_llama(), tiny.tiny_llama(**STUDENT)).double()
    sides = random_states(batch, [0, 1, 2], 24, 0), random_states(batch, [0, 1], 16, 1)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        tokens = replace(batch.student, **{key: mode.from_tensor(v) for key, v in batch.student.tensors().items()})
        fake = replace(batch, student=tokens, teacher=tokens)
        ours, theirs = (
            Trace(side.last_BLD, {i: mode.from_tensor(s) for i, s in side.hidden.items()}, {}) for side in sides
        )
        loss(ours, theirs, fake).backward()


@pytest.mark.parametrize(
    ("depths", "options", "pairs"),
    [
        ((10, 30), {}, [(1, 5), (3, 11), (6, 20), (8, 26)]),  # (3 + 1) / 10 = (11 + 1) / 30
        ((2, 4), {}, [(0, 1), (1, 3)]),
        ((10, 30), {"student_layers": 1}, [(5, 17)]),
        ((10, 30), {"student_layers": [2, 9]}, [(2, 8), (9, 29)]),
        ((10, 30), {"teacher_layers": [14, 29]}, [(4, 14), (9, 29)]),
        ((10, 30), {"student_layers": [0, 4], "teacher_layers": [3, 5]}, [(0, 3), (4, 5)]),
        ((4, 2), {}, [(0, 0), (1, 0), (2, 1), (3, 1)]),
    ],
)
def test_layers_are_paired_at_equal_depth_fractions_or_as_given(depths, options, pairs):
    student, teacher = (tiny.tiny_llama(num_hidden_layers=depth) for depth in depths)
    loss = built(teacher, student, **options)
    assert loss.pairs == pairs
    assert len(loss.projections) == len(pairs)
    assert loss.settings()["pairs"] == [list(pair) for pair in pairs]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coefficient": -1.0}, "model.layerwise.coefficient: -1.0; give a number from 0 up"),
        ({"student_layers": 0}, "model.layerwise.student_layers: 0 names no layer"),
        ({"teacher_layers": []}, r"model.layerwise.teacher_layers: \[\] names no layer"),
        ({"student_layers": 4}, "model.layerwise.student_layers: 4 are more than the student's 3 layers"),
        ({"student_layers": [3]}, "model.layerwise.student_layers: 3 is not a layer; the model has layers 0 to 2"),
        ({"teacher_layers": [2]}, "model.layerwise.teacher_layers: 2 is not a layer; the model has layers 0 to 1"),
        (
            {"student_layers": [0, 1], "teacher_layers": [1]},
            r"model.layerwise.teacher_layers: \[1\] are not one for each of student_layers \[0, 1\]",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        built(tiny.tiny_llama(), tiny.tiny_llama(**STUDENT), **options)


@pytest.mark.parametrize("distance", DISTANCES)
def test_a_cut_student_is_compared_as_it_is(distance):
    batch = make_batch([[5, 4], [9], [2, 1, 3]], 10, [(0, 2), (1, 5)])
    teacher = tiny.tiny_llama(num_hidden_layers=4)
    loss = built(teacher, cut_layers(teacher, 2), distance=distance, coefficient=0.5)
    assert not list(loss.parameters())
    assert loss.settings()["projection"] == "none"
    ours, theirs = random_states(batch, [0, 1], 16, 0), random_states(batch, [1, 3], 16, 1)
    expected = 0.0
    for own, other in loss.pairs:
        for flat in batch.student.positions.tolist():
            row, i = divmod(flat, batch.student.input_ids.shape[1])
            if batch.student.position_ids[row, i]:
                x, t = ours.hidden[own][row, i].tolist(), theirs.hidden[other][row, i].tolist()
                mean = sum(t) / 16
                if distance == "mse":
                    spread = sum((b - mean) ** 2 for b in t)
                    expected += sum((a - b) ** 2 for a, b in zip(x, t, strict=True)) / spread
                else:
                    expected += 1 - sum(a * b for a, b in zip(x, t, strict=True)) / math.hypot(*x) / math.hypot(*t)
    assert loss(ours, theirs, batch).item() == pytest.approx(expected / 2 * 0.5, rel=1e-10)


def test_a_projection_is_kept_where_widths_or_embeddings_differ_and_where_it_is_asked_for():
    teacher = tiny.tiny_llama(num_hidden_layers=4)
    cut, other = cut_layers(teacher, 2), tiny.tiny_llama()
    other.model.embed_tokens.weight.data.mul_(1.1)
    assert len(built(teacher, other).projections) == 2
    assert len(built(teacher, tiny.tiny_llama(**STUDENT)).projections) > 0
    assert len(built(teacher, cut, projection="linear").projections) == 2
    assert len(built(teacher, other, projection="none").projections) == 0
    assert len(built(copy.deepcopy(teacher).bfloat16(), cut).projections) == 0
    with pytest.raises(UserError, match=r"model.layerwise.projection: none between states of 24 and 16"):
        built(teacher, tiny.tiny_llama(**STUDENT), projection="none")
