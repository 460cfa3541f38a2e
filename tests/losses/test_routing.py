"""Routing losses against hand-computed cases, plain float64 loops and the invariants of the contract."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from scipy.special import rel_entr
from torch._subclasses.fake_tensor import FakeTensorMode

from distill.errors import UserError
from distill.losses import routing_terms
from distill.losses.layers import spread
from distill.losses.relation_kl import relation_heads
from distill.losses.routing import UNIT
from distill.losses.states import normalise
from distill.models.blocks import moe_block
from distill.models.layers import decoder_layers
from distill.models.trace import recording
from helpers import tiny
from helpers.routing import (
    built,
    dense,
    make_batch,
    number,
    plain_relation_kl,
    recorded,
    student_states,
    with_positions,
)

FEATURE, IMPORTANCE, BALANCE, ALIGNMENT = UNIT
FAMILIES = [getattr(tiny, name) for name in dir(tiny) if name.startswith("tiny_")]


# The terms


# Relations


# The module


@pytest.mark.parametrize("make", FAMILIES)
def test_the_targets_are_what_the_teacher_computed(make):
    """Native k and tau inf: feature matching and alignment of the routed output itself, bit for bit for a MoE."""
    teacher, batch = make(), make_batch([[5, 4], [6]], 9)
    routing = built(teacher, **dense(make))
    records, states = recorded(routing, teacher, batch), student_states(routing, batch)
    (view,) = routing._views
    result = routing(routing.components, states, records, batch, None)
    if dense(make):
        mixture = view.route(records[view.layer], torch.arange(18), 2, mixture=True).mixture_ND
    else:
        mixture = records[view.layer]["mixture_TD"]
    projected = routing.projections[0](normalise(states[0]).flatten(0, 1)[batch.positions])
    target = normalise(mixture)[batch.positions]
    expected = sum(number((a.double() - z.double()).square().mean()) for a, z in zip(projected, target, strict=True))
    assert number(result.sums[FEATURE]) == pytest.approx(expected, rel=1e-5)
    plain = plain_relation_kl(
        normalise(states[0].double()), normalise(mixture.double()).view(2, 9, -1), batch, relation_heads(24, 16)
    )
    assert number(result.sums[ALIGNMENT]) == pytest.approx(number(plain), rel=1e-4)
    assert list(result.sums) == [FEATURE, IMPORTANCE, BALANCE, ALIGNMENT] == routing.components


@pytest.mark.parametrize("make", FAMILIES)
def test_a_very_large_tau_is_the_teachers_gate(make):
    if make is tiny.tiny_deepseek_v3:
        pytest.skip("a finite tau leaves its selection bias out")
    teacher, batch = make(), make_batch([[5, 4], [6]], 9)
    plain, aware = built(teacher, **dense(make)), built(teacher, tau=1e7, **dense(make))
    records, states = recorded(plain, teacher, batch), student_states(plain, batch)
    expected, actual = (r(r.components, states, records, batch, 3).sums for r in (plain, aware))
    for name, value in expected.items():
        assert number(actual[name]) == pytest.approx(number(value), rel=1e-4)


@pytest.mark.parametrize("make", [tiny.tiny_qwen3_moe, tiny.tiny_deepseek_v3, tiny.tiny_llama])
def test_student_aware_selection_takes_up_what_the_student_lacks(make):
    teacher, batch = make(), make_batch([[9], [9]], 9)
    routings = {tau: built(teacher, tau=tau, **dense(make)) for tau in (100.0, 1.0, 0.01)}
    gaps = []
    for routing in routings.values():
        records, states = recorded(routing, teacher, batch), student_states(routing, batch)
        gaps.append(number(routing(routing.components, states, records, batch).stats["mean_gap"]))
    assert gaps[0] < gaps[1] < gaps[2]
    # At tau near zero the choice is the two largest gaps.
    (view,), capture = routing._views, next(iter(records.values()))
    projected = routing.projections[0](normalise(states[0]).flatten(0, 1)[batch.positions])
    outputs = view.outputs(capture, batch.positions)
    gap = torch.stack([(projected - normalise(y)).square().mean(-1) for y in outputs], -1)
    assert gaps[2] == pytest.approx(number(gap.topk(2).values.mean()), rel=1e-2)


@pytest.mark.parametrize("make", [tiny.tiny_qwen3_moe, tiny.tiny_llama])
def test_a_token_subset_is_looked_at_and_the_rest_keeps_the_teachers_gate(make):
    teacher, batch = make(), make_batch([[9], [9]], 9)
    options = dense(make)
    all_of_them, subset, own = (
        built(teacher, tau=0.1, **options),
        built(teacher, tau=0.1, token_subset=4, **options),
        built(teacher, **options),
    )
    records, states = recorded(own, teacher, batch), student_states(own, batch)
    positions = batch.positions
    some = positions[:: math.ceil(len(positions) / 4)]
    rest = torch.tensor([p for p in positions.tolist() if p not in some.tolist()])
    value = subset([FEATURE], states, records, batch).sums[FEATURE]
    aware = all_of_them([FEATURE], states, records, replace(batch, positions=some)).sums[FEATURE]
    native = own([FEATURE], states, records, replace(batch, positions=rest)).sums[FEATURE]
    assert number(value) == pytest.approx(number(aware + native), rel=1e-5)
    # With alignment the mixtures are of all positions, and the valid ones are the same.
    both = subset([FEATURE, ALIGNMENT], states, records, batch).sums[FEATURE]
    assert number(both) == pytest.approx(number(value), rel=1e-5)


def test_all_experts_are_all_experts():
    teacher, batch = tiny.tiny_olmoe(), make_batch([[9]], 9)
    routing = built(teacher)
    records, states = recorded(routing, teacher, batch), student_states(routing, batch)
    capture = records[routing._views[0].layer]
    block = moe_block(decoder_layers(teacher)[routing._views[0].layer])
    with torch.no_grad():
        probs = (capture["input_TD"] @ block.gate.weight.T).softmax(-1)
        gate_up = torch.einsum("td,eid->tei", capture["input_TD"], block.experts.gate_up_proj)
        gate, up = gate_up.chunk(2, -1)
        z = torch.einsum("te,tei,edi->td", probs, torch.nn.functional.silu(gate) * up, block.experts.down_proj)
    projected = routing.projections[0](normalise(states[0]).flatten(0, 1)[batch.positions])
    expected = routing_terms.feature_matching(projected, z[batch.positions])
    value = routing([FEATURE], states, records, batch, 4).sums[FEATURE]
    assert number(value) == pytest.approx(number(expected), rel=1e-5)


def test_experts_per_token_outside_the_teachers_range():
    teacher, batch = tiny.tiny_qwen3_moe(), make_batch([[9]], 9)
    routing = built(teacher)
    records, states = recorded(routing, teacher, batch), student_states(routing, batch)
    with pytest.warns(UserWarning, match="top_k_experts: 1 is below the teacher's own 2 experts"):
        routing([FEATURE], states, records, batch, 1)
    routing([FEATURE], states, records, batch, 1)  # once is enough: a second warning would be an error here
    for k in (0, 5):
        with pytest.raises(UserError, match=f"top_k_experts: {k} is not within 1 to 4 experts"):
            routing([FEATURE], states, records, batch, k)


def in_float64(teacher):
    if hasattr(teacher.config, "num_experts_per_tok"):
        teacher.set_experts_implementation("eager")  # the grouped product has no float64
    return teacher.double()


def split_recording(records, rows, length):
    """The recording of some rows of the batch."""
    index = torch.cat([torch.arange(row * length, (row + 1) * length) for row in rows])
    return {i: {k: v[index] for k, v in capture.items()} for i, capture in records.items()}


@pytest.mark.parametrize("make", [tiny.tiny_qwen3_moe, tiny.tiny_deepseek_v3, tiny.tiny_gemma])
@pytest.mark.parametrize("tau", [math.inf, 0.5])
def test_any_split_of_the_same_tokens_gives_the_same_sums_and_gradients(make, tau):
    teacher = in_float64(make())
    batch = make_batch([[5, 3], [8], [2, 2, 2], [7]], 8)
    routing = built(teacher, tau=tau, **dense(make)).double()
    records, states = recorded(routing, teacher, batch), student_states(routing, batch, dtype=torch.float64)
    names = [FEATURE, IMPORTANCE, ALIGNMENT]

    def sums_and_grads(splits):
        totals = dict.fromkeys(names, 0.0)
        for rows in splits:
            part = with_positions(
                batch.input_ids[rows], batch.labels[rows], batch.attention_mask[rows], batch.position_ids[rows]
            )
            result = routing(names, [s[rows] for s in states], split_recording(records, rows, 8), part)
            totals = {name: totals[name] + result.sums[name] for name in names}
        heads = list(routing.projections.parameters()) + list(routing.probes.parameters())
        return totals, torch.autograd.grad(sum(totals.values()), [*states, *heads])

    whole, whole_grads = sums_and_grads([[0, 1, 2, 3]])
    parts, parts_grads = sums_and_grads([[2], [0, 3], [1]])
    # DeepSeek's router multiplies in fp32 whatever the model is, and a CPU may round a row otherwise beside others.
    tolerance = 1e-5 if make is tiny.tiny_deepseek_v3 else 1e-10
    for name in names:
        assert number(parts[name]) == pytest.approx(number(whole[name]), rel=tolerance)
    for a, b in zip(parts_grads, whole_grads, strict=True):
        assert torch.allclose(a, b, rtol=tolerance, atol=tolerance * 1e-3)


@pytest.mark.parametrize("make", [tiny.tiny_qwen3_moe, tiny.tiny_llama])
def test_packing_changes_nothing(make):
    """Two documents in one row or in two, with the teacher's states moved along."""
    teacher = in_float64(make())
    apart, packed = make_batch([[5], [3]], 5), make_batch([[5, 3]], 8)
    routing = built(teacher, tau=0.5, **dense(make)).double()
    records, states = recorded(routing, teacher, apart), student_states(routing, apart, dtype=torch.float64)
    index = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7])
    joined = {i: {k: v[index] for k, v in capture.items()} for i, capture in records.items()}
    names = [FEATURE, IMPORTANCE, ALIGNMENT]
    one = routing(names, states, records, apart).sums
    other = routing(names, [s.flatten(0, 1)[index][None] for s in states], joined, packed).sums
    for name in names:
        assert number(other[name]) == pytest.approx(number(one[name]), rel=1e-10)


@pytest.mark.parametrize("make", FAMILIES)
@pytest.mark.parametrize("tau", [math.inf, 0.5])
def test_padding_content_does_not_matter(make, tau):
    teacher, batch = make(), make_batch([[6], [4]], 8)
    routing = built(teacher, tau=tau, **dense(make))
    states = student_states(routing, batch)
    real = routing(routing.components, states, recorded(routing, teacher, batch), batch)
    padded = batch.attention_mask == 0
    other = replace(batch, input_ids=batch.input_ids.masked_fill(padded, 7))
    other_states = [s.detach().masked_fill(padded[:, :, None], 9.0) for s in states]
    changed = routing(routing.components, other_states, recorded(routing, teacher, other), other)
    for name in routing.components:
        assert number(changed.sums[name]) == pytest.approx(number(real.sums[name]), rel=1e-6)
    for name, value in real.stats.items():
        assert number(changed.stats[name]) == pytest.approx(number(value), rel=1e-6)


@pytest.mark.parametrize("tau", [math.inf, 0.5])
@pytest.mark.parametrize("make", [tiny.tiny_deepseek_v3, tiny.tiny_gpt2])
def test_the_students_autocast_leaves_the_teachers_experts_alone(make, tau):
    teacher, batch = make(), make_batch([[6, 4]], 10)
    routing = built(teacher, tau=tau, **dense(make))
    records, view = recorded(routing, teacher, batch), routing._views[0]
    projected = torch.randn(len(batch.positions), view.width, generator=torch.Generator().manual_seed(0))
    valid = torch.arange(len(projected))
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            results.append(routing._route(view, records[view.layer], batch.positions, valid, projected, 3, True))
    assert torch.equal(results[0].index_NK, results[1].index_NK)
    assert torch.equal(results[0].mixture_ND, results[1].mixture_ND)


@pytest.mark.parametrize("options", [{}, {"tau": 0.5}, {"tau": 0.5, "token_subset": 2}])
@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("make", [tiny.tiny_mixtral, tiny.tiny_gpt2])
def test_a_batch_without_valid_tokens_is_zero(make, options, k):
    teacher, batch = make(), make_batch([[4]], 4)
    batch = with_positions(
        batch.input_ids, torch.full_like(batch.labels, -100), batch.attention_mask, batch.position_ids
    )
    routing = built(teacher, **options, **dense(make))
    states = student_states(routing, batch)
    for names in ([FEATURE], [IMPORTANCE, BALANCE], routing.components):
        result = routing(names, states, recorded(routing, teacher, batch), batch, k)
        sum(result.sums.values()).backward()
        assert [number(value) for value in result.sums.values()] == [0.0] * len(result.sums)
        assert all(value.isfinite() for value in result.stats.values())
    assert all(p.grad.isfinite().all() for p in [*states, *routing.parameters()])


@pytest.mark.parametrize("make", FAMILIES)
def test_only_student_projections_and_probes_get_gradient(make):
    teacher, batch = make(), make_batch([[9]], 9)
    teacher.requires_grad_(True)
    routing = built(teacher, tau=0.5, **dense(make))
    with recording(routing.teacher_needs.recorders) as records:  # a caller who forgot no_grad
        teacher(batch.input_ids)
    states = student_states(routing, batch)
    result = routing(routing.components, states, records, batch, 3)
    sum(result.sums.values()).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in routing.parameters())
    assert not any(value.requires_grad for value in result.stats.values())
    for name in routing.components:
        grads = torch.autograd.grad(
            routing([name], states, records, batch, 3).sums[name], list(routing.parameters()), allow_unused=True
        )
        reached = {id(p) for p, grad in zip(routing.parameters(), grads, strict=True) if grad is not None}
        assert reached == {id(p) for p in routing.trained_by(name)}


def test_the_teacher_is_no_part_of_the_module():
    teacher = tiny.tiny_qwen3_moe()
    routing = built(teacher, teacher_layers=2)
    assert sorted(routing.state_dict()) == [
        f"{head}.{i}.{name}" for head in ("probes", "projections") for i in (0, 1) for name in ("bias", "weight")
    ]
    assert not any(module is teacher or "Moe" in type(module).__name__ for module in routing.modules())
    again = built(teacher, teacher_layers=2)
    assert all(torch.equal(a, b) for a, b in zip(routing.parameters(), again.parameters(), strict=True))
    assert copy.deepcopy(routing).state_dict().keys() == routing.state_dict().keys()


def test_heads_exist_only_for_configured_losses():
    teacher = tiny.tiny_qwen3_moe()
    for losses, heads in (
        ({"attention_alignment_loss": 1.0}, set()),
        ({"load_balancing_loss": 0.01}, {"probes"}),
        ({"feature_matching_loss": 1.0}, {"projections"}),
    ):
        routing = built(teacher, losses=losses)
        assert {name.split(".")[0] for name in routing.state_dict()} == heads
        assert routing.components == [f"routing_{name}" for name in losses]


def test_coefficients_and_layers_average():
    teacher, batch = tiny.tiny_qwen3_moe(), make_batch([[9]], 9)
    two = built(teacher, teacher_layers=[0, 1], student_layers=[0, 2])
    records, states = recorded(two, teacher, batch), student_states(two, batch)
    result = two(two.components, states, records, batch)
    for i, layer in enumerate((0, 1)):
        one = built(teacher, teacher_layers=[layer], losses={name.removeprefix("routing_"): 0.5 for name in UNIT})
        one.projections[0], one.probes[0] = two.projections[i], two.probes[i]
        part = one(one.components, states[i : i + 1], records, batch)
        result.sums.update({name: value - part.sums[name] for name, value in result.sums.items()})
        result.stats.update({name: value - part.stats[name] / 2 for name, value in result.stats.items()})
    assert all(abs(number(value)) < 1e-4 for value in [*result.sums.values(), *result.stats.values()])


def test_statistics_by_hand():
    teacher, batch = tiny.tiny_qwen3_moe(), make_batch([[6], [4]], 8)
    routing = built(teacher)
    records = recorded(routing, teacher, batch)
    result = routing(routing.components, student_states(routing, batch), records, batch)
    capture, positions = records[routing._views[0].layer], batch.positions
    gates = capture["logits_TE"][positions].double().softmax(-1)
    used = capture["index_TK"][positions].flatten().tolist()
    assert number(result.stats["gate_entropy"]) == pytest.approx(
        number(-(gates * gates.log()).sum(-1).mean()), rel=1e-5
    )
    assert number(result.stats["expert_usage_max"]) == pytest.approx(max(map(used.count, range(4))) / len(used))
    line = rel_entr(gates.numpy(), gates.mean(0).numpy()).sum(-1).mean()
    assert number(result.stats["constant_gate_kl"]) == pytest.approx(line, rel=1e-5)
    importance = number(result.sums[IMPORTANCE]) / len(positions)
    assert number(result.stats["probe_gain"]) == pytest.approx(line - importance, rel=1e-4)


def test_layers_at_even_depth_fractions():
    assert [spread(n, list(range(30))) for n in (1, 2, 3)] == [[15], [7, 22], [5, 15, 25]]
    assert spread(7, list(range(7))) == list(range(7))
    two = built(tiny.tiny_llama(num_hidden_layers=4), num_experts=4, teacher_layers=2)
    assert [view.layer for view in two.teacher_needs.recorders] == [1, 3]
    assert two.student_layer_indices == [1, 2]  # after 2 / 4 and 4 / 4 of 3 layers
    assert [view.layer for view in built(tiny.tiny_deepseek_v3()).teacher_needs.recorders] == [1]  # layer 0 is dense


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"losses": {"feature_match_loss": 1.0}}, "'feature_match_loss' is no routing loss; did you mean 'feature_m"),
        ({"losses": {"feature_matching_loss": -1.0}}, "feature_matching_loss has coefficient -1.0"),
        ({"losses": {}}, "names no routing loss"),
        ({"tau": 0.0}, "tau: 0.0 is not a temperature"),
        ({"tau": math.nan}, "tau: nan is not a temperature"),
        ({"tau": 1.0, "losses": {"attention_alignment_loss": 1.0}}, "tau: 1.0 needs the projection"),
        ({"token_subset": 8}, "token_subset: 8 bounds a finite tau only"),
        ({"num_experts": 0}, "num_experts: 0 is not a count"),
        ({"teacher_layers": []}, "teacher_layers: 0 is not a count"),
        ({"teacher_layers": 3}, "teacher_layers: 3 are more than the teacher's 2 layers"),
        ({"teacher_layers": [2]}, "teacher_layers: 2 is not a layer; the model has layers 0 to 1"),
        ({"teacher_layers": [1, 1]}, r"teacher_layers: \[1, 1\] names a layer twice"),
        ({"student_layers": [3]}, "student_layers: 3 is not a layer; the model has layers 0 to 2"),
        ({"student_layers": [0, 1]}, r"student_layers: \[0, 1\] are not one for each of teacher_layers \[1\]"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        built(tiny.tiny_qwen3_moe(), **options)


@pytest.mark.parametrize("options", [{}, {"tau": 0.5}])
def test_no_value_is_read_back_from_the_device(options):
    """Under fake tensors whatever would wait for the device (item, nonzero, a boolean index) raises."""
    teacher, batch = tiny.tiny_llama(), make_batch([[6], [4]], 8)
    routing = built(teacher, num_experts=4, **options)
    records, states = recorded(routing, teacher, batch), student_states(routing, batch)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = replace(batch, **{key: mode.from_tensor(value) for key, value in batch.tensors().items()})
        for capture in records.values():
            capture.update({key: mode.from_tensor(value) for key, value in capture.items()})
        result = routing(routing.components, [mode.from_tensor(s) for s in states], records, fake, 3)
        sum(result.sums.values()).backward()
    assert len(result.sums) == 4


@pytest.mark.parametrize("make", FAMILIES)
@pytest.mark.parametrize("tau", [math.inf, pytest.param(0.5, marks=pytest.mark.slow)])
def test_learned_heads_learn_nothing_from_features_without_information(make, tau):
    """Control: with the student's states redrawn each step no head beats its best constant prediction."""
    teacher, batch = make(), make_batch([[16]] * 16, 16)
    routing = built(teacher, tau=tau, **dense(make))
    (view,) = routing._views
    records, positions = recorded(routing, teacher, batch), batch.positions
    optimizer = torch.optim.Adam(routing.parameters(), lr=3e-2)
    names, late = [FEATURE, IMPORTANCE], []
    for step in range(100):
        states = [s.detach() for s in student_states(routing, batch, seed=step)]
        result = routing(names, states, records, batch)
        if step >= 80:
            late.append([number(result.sums[name]) / len(positions) for name in names])
        optimizer.zero_grad()
        sum(result.sums.values()).backward()
        optimizer.step()
    feature, importance = torch.tensor(late).mean(0).tolist()
    assert importance >= 0.95 * number(result.stats["constant_gate_kl"])
    # Targets of the last step, as chosen then; a constant can at best be their mean.
    capture = records[view.layer]
    if tau == math.inf:
        mixture = view.route(capture, positions, view.native_k, mixture=True).mixture_ND
    else:
        projected = routing.projections[0](normalise(states[0]).flatten(0, 1)[positions])
        mixture = routing_terms.student_aware_route(view, capture, positions, projected, 2, tau).mixture_ND
    target = normalise(mixture)
    assert feature >= 0.95 * number((target - target.mean(0)).square().mean())
