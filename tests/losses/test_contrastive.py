"""The contrastive loss against plain loops in float64, its hash against contexts themselves, two ranks against one."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import layer_norm, normalize

from distill.errors import UserError
from distill.losses.contrastive import EMPTY, Contrastive, contexts, sample
from distill.models.trace import Trace, trace
from helpers import tiny
from helpers.packed import batch_of, make_batch

STUDENT = {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 3, "num_hidden_layers": 3}


def built(seed=0, rows=None, teacher=None, **options):
    loss = Contrastive(**{"tokens_per_row": 4, "queue_size": 10} | options)
    torch.manual_seed(seed)
    loss.build(teacher or tiny.tiny_llama(), tiny.tiny_llama(**STUDENT), rows)
    return loss.double()


def random_sides(batch, seed):
    """Student and teacher; the teacher's states are the same where the contexts are."""
    generator = torch.Generator().manual_seed(seed)
    shape = batch.student.input_ids.shape
    student = torch.randn(*shape, 24, generator=generator, dtype=torch.float64)
    teacher = torch.randn(*shape, 16, generator=generator, dtype=torch.float64)
    return Trace(student, {2: student}, {}), Trace(teacher, {1: teacher}, {})


def context_of(batch, row, i):
    return tuple(batch.student.input_ids[row, i - int(batch.student.position_ids[row, i]) : i + 1].tolist())


def sampled(batch, per_row):
    """(row, position) of the evenly spaced tokens, None for the places that stay empty."""
    length = batch.student.input_ids.shape[1]
    chosen = []
    for row in range(len(batch.student.input_ids)):
        valid = [p % length for p in batch.student.positions.tolist() if p // length == row]
        if len(valid) > per_row:
            valid = [valid[(2 * j + 1) * len(valid) // (2 * per_row)] for j in range(per_row)]
        chosen += [(row, i) for i in valid] + [None] * (per_row - len(valid))
    return chosen


class Plain:
    """The loss in plain loops, with a queue that is a list."""

    def __init__(self, loss):
        self.loss = loss
        self.queue = []

    def __call__(self, student, teacher, batch):
        chosen = sampled(batch, self.loss.tokens_per_row)
        keys = []
        for token in chosen:
            if token is None:
                keys.append(None)
                continue
            state = teacher.hidden[1][token]
            state = state - state.mean()
            keys.append((state / state.norm(), context_of(batch, *token)))
        losses = []
        for n, token in enumerate(chosen):
            if token is None:
                continue
            x = layer_norm(student.hidden[2][token], (24,), eps=1e-20)
            z = self.loss.projection.weight @ x + self.loss.projection.bias
            z = z / z.norm()
            own, context = keys[n]
            others = [key for key in [*keys, *self.queue] if key is not None and key[1] != context]
            scores = [z @ own, *(z @ key[0] for key in others)]
            losses.append(
                torch.stack([s / self.loss.temperature for s in scores]).logsumexp(0)
                - scores[0] / self.loss.temperature
            )
        self.queue = [*self.queue, *keys][-self.loss.queue_size :] if self.loss.queue_size else []
        return torch.stack(losses).mean() * self.loss.coefficient if losses else torch.zeros(())


def repeated_batch(seed=0):
    """Two rows that begin alike, one short one, and a document that occurs twice."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(3, 9, (n,), generator=generator) for n in (7, 3))
    other = torch.cat([a[:4], torch.randint(9, 20, (3,), generator=generator)])
    return batch_of([[a, b], [other], [b]], 10, [(0, 3)])


@pytest.mark.parametrize("queue_size", [0, 5, 10, 64])
def test_value_and_gradient_against_loops_over_several_steps(queue_size):
    loss = built(queue_size=queue_size, coefficient=0.5, temperature=0.2)
    plain = Plain(loss)
    for step in range(6):
        batch = repeated_batch(step % 3)  # what was in the queue comes again
        sides = random_sides(batch, step)
        expected, value = plain(*sides, batch), loss(*sides, batch)
        assert value.item() == pytest.approx(expected.item(), rel=1e-12)
        gradients = [torch.autograd.grad(x, list(loss.parameters())) for x in (value, expected)]
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_contexts_are_told_apart_exactly():
    generator = torch.Generator().manual_seed(0)
    rows = [[torch.randint(0, 2, (n,), generator=generator) for n in (5, 7, 4)] for _ in range(40)]
    batch = batch_of(rows, 20)
    hashes = contexts(batch.student.input_ids, batch.student.position_ids)
    seen = {}
    for row in range(40):
        for i in range(20):
            context = context_of(batch, row, i)
            assert seen.setdefault(hashes[row, i].item(), context) == context
    assert len(seen) == len(set(seen.values())) > 100
    assert EMPTY not in seen


def test_a_context_has_one_hash_wherever_it_stands():
    document = torch.arange(3, 9)
    alone, behind = batch_of([[document]], 6), batch_of([[torch.tensor([40, 41, 42]), document]], 12)
    hashes = [contexts(batch.student.input_ids, batch.student.position_ids)[0] for batch in (alone, behind)]
    assert torch.equal(hashes[0], hashes[1][3:9])
    assert not set(hashes[1][:3].tolist()) & set(hashes[0].tolist())


def test_the_hash_is_no_function_of_the_last_tokens_alone():
    long = torch.randint(0, 5, (2, 4096), generator=torch.Generator().manual_seed(0))
    long[1] = long[0]
    long[1, 0] += 1
    hashes = contexts(long, torch.arange(4096).expand(2, -1))
    assert (hashes[0] != hashes[1]).all()
    assert len(set(hashes[0].tolist())) == 4096


@pytest.mark.parametrize("per_row", [1, 3, 4, 50])
def test_tokens_are_evenly_spaced_over_the_valid_ones(per_row):
    batch = make_batch([[9, 6], [4], [1], [16]], 16, [(0, 2), (3, 8)])
    position_S, taken_S = sample(batch.student, per_row)
    expected = sampled(batch, per_row)
    assert taken_S.tolist() == [token is not None for token in expected]
    for flat, token in zip(position_S.tolist(), expected, strict=True):
        assert token is None or divmod(flat, 16) == token
    assert position_S.min() >= 0
    assert position_S.max() < 64


def test_duplicates_of_a_context_are_no_negatives():
    """Six times the one token that a document of two gives: now and in the queue nothing to tell it from."""
    loss, batch = built(), batch_of([[torch.arange(3, 5)]] * 6, 5)
    for step in range(3):
        assert loss(*random_sides(batch, step), batch).item() == 0
    other = batch_of([[torch.arange(4, 6)]] * 6, 5)
    assert loss(*random_sides(other, 3), other).item() > 0.1


def test_the_queue_holds_the_last_states_and_only_training_fills_it():
    loss, batch = built(queue_size=6), make_batch([[9], [9]], 10)
    before = {name: buffer.clone() for name, buffer in loss.named_buffers()}
    assert set(before) == {"queue_QD", "queue_contexts_Q", "place"}
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            loss(*random_sides(batch, 0), batch)
        assert all(torch.equal(buffer, before[name]) for name, buffer in loss.named_buffers())
    sides = random_sides(batch, 0)
    loss(*sides, batch)
    position_S, _ = sample(batch.student, 4)
    keys = normalize(layer_norm(sides[1].hidden[1].flatten(0, 1)[position_S], (16,), eps=1e-20), dim=-1)
    assert int(loss.place) == 0  # 8 into 6 places: the last 6, in order
    torch.testing.assert_close(loss.queue_QD, keys[2:])
    assert not loss.queue_QD.requires_grad
    loss(*random_sides(make_batch([[9]], 10), 1), make_batch([[9]], 10))
    assert int(loss.place) == 4
    torch.testing.assert_close(loss.queue_QD[4:], keys[6:])


def test_layers_that_other_losses_look_at_change_nothing():
    batch = make_batch([[9], [9]], 10)
    student, teacher = random_sides(batch, 0)
    alone = built()(student, teacher, batch)
    others = {layer: torch.randn_like(student.hidden[2]) for layer in (0, 1)}
    beside = Trace(student.last_BLD, others | student.hidden, {})
    taught = Trace(teacher.last_BLD, {0: torch.randn_like(teacher.hidden[1])} | teacher.hidden, {})
    assert torch.equal(built()(beside, taught, batch), alone)


def test_a_state_that_is_not_finite_leaves_the_queue_as_a_place_without_token():
    loss, batch = built(queue_size=8), make_batch([[9], [9]], 10)
    student, teacher = random_sides(batch, 0)
    teacher.hidden[1][0] = float("nan")  # one row: the first four places
    assert not loss(student, teacher, batch).isfinite()
    assert (loss.queue_contexts_Q == EMPTY).tolist() == [True] * 4 + [False] * 4
    assert loss(*random_sides(batch, 1), batch).isfinite()


def test_the_queue_goes_on_from_a_state_dict():
    batches = [make_batch([[9], [n]], 10) for n in (5, 6, 7)]
    unbroken, first = built(), built()
    for step in range(2):
        for loss in (unbroken, first):
            loss(*random_sides(batches[step], step), batches[step])
    resumed = built(seed=1)
    resumed.load_state_dict(first.state_dict())
    values = [loss(*random_sides(batches[2], 2), batches[2]) for loss in (unbroken, resumed)]
    assert torch.equal(*values)
    assert all(torch.equal(a, b) for a, b in zip(unbroken.buffers(), resumed.buffers(), strict=True))


def test_a_short_micro_batch_is_filled_up_and_counts_alike():
    """Ranks must agree on shapes where one has fewer rows, or none that count."""
    short, full = built(queue_size=0), built(queue_size=0, rows=3)
    for documents in ([[9]], [[7], [5]]):
        batch = make_batch(documents, 10)
        values = [loss(*random_sides(batch, 0), batch) for loss in (short, full)]
        assert values[1].item() == pytest.approx(values[0].item(), rel=1e-12)
    nothing = make_batch([[1]], 10)
    value = full(*random_sides(nothing, 0), nothing)
    value.backward()
    assert value.item() == 0
    assert all(not p.grad.any() for p in full.parameters())


@pytest.mark.parametrize("queue_size", [0, 256])
def test_the_projection_learns_nothing_from_features_without_information(queue_size):
    """Control: log of the number of keys is what any constant prediction costs at least, by convexity."""
    batch, teacher = make_batch([[16]] * 16, 16), tiny.tiny_qwen3_moe()
    loss = built(teacher=teacher, queue_size=queue_size, tokens_per_row=15).float()
    batches = [make_batch([[15]] * 16, 16), batch]
    with torch.no_grad():
        taught = [trace(teacher, each.student, loss.teacher_needs) for each in batches]
    optimizer, late = torch.optim.Adam(loss.parameters(), lr=1e-2), []
    for step in range(100):
        generator = torch.Generator().manual_seed(step)
        states = torch.randn(16, 16, 24, generator=generator)
        value = loss(Trace(states, {2: states}, {}), taught[step % 2], batches[step % 2])
        if step >= 80:
            late.append(value.item())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    keys = 16 * 14 + (queue_size and 16 * 14)  # at least so many of other contexts
    assert sum(late) / len(late) >= 0.95 * math.log(keys)


def test_a_student_that_knows_is_found_out():
    batch, teacher = make_batch([[16]] * 8, 16), tiny.tiny_llama()
    loss = Contrastive(tokens_per_row=15, queue_size=64)
    torch.manual_seed(0)
    loss.build(teacher, tiny.tiny_llama())
    with torch.no_grad():
        taught = trace(teacher, batch.student, loss.teacher_needs)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
    for _ in range(100):
        value = loss(taught, taught, batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert value.item() < 1 < math.log(120)


def test_only_student_and_projection_get_gradient():
    batch, teacher, student = make_batch([[5, 4], [8]], 10), tiny.tiny_llama(), tiny.tiny_llama(**STUDENT)
    loss = Contrastive()
    loss.build(teacher, student)
    taught = trace(teacher, batch.student, loss.teacher_needs)  # even where nobody thought of no_grad
    loss(trace(student, batch.student, loss.student_needs), Trace(taught.last_BLD, taught.hidden, {}), batch).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None and p.grad.any() for p in loss.parameters())
    assert student.get_decoder().layers[0].mlp.up_proj.weight.grad.any()
    assert list(loss.trained_by("contrastive_loss")) == list(loss.parameters())


def test_half_precision_is_compared_in_fp32():
    batch = make_batch([[8], [6]], 8)
    teacher, student = tiny.tiny_llama().bfloat16(), tiny.tiny_llama(**STUDENT).bfloat16()
    loss = Contrastive()
    loss.build(teacher, student)
    loss.bfloat16()
    with torch.no_grad():
        taught = trace(teacher, batch.student, loss.teacher_needs)
    for _ in range(2):
        value = loss(trace(student, batch.student, loss.student_needs), taught, batch)
        assert value.dtype == torch.float32
        value.backward()
    assert loss.queue_QD.dtype == torch.bfloat16
    assert loss.queue_contexts_Q.dtype == torch.long


def test_no_value_is_read_back_from_the_device():
    batch, loss = make_batch([[6], [4]], 8), built(rows=3)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        tokens = replace(batch.student, **{key: mode.from_tensor(v) for key, v in batch.student.tensors().items()})
        fake = replace(batch, student=tokens, teacher=tokens)
        sides = [
            Trace(side.last_BLD, {i: mode.from_tensor(s) for i, s in side.hidden.items()}, {})
            for side in random_sides(batch, 0)
        ]
        with torch.no_grad():
            loss(*sides, fake)


OTHER_RANK = """
import sys
sys.path.insert(0, sys.argv[2])
sys.path.insert(0, sys.argv[2] + "/losses")
import torch
import test_contrastive
torch.set_num_threads(1)
test_contrastive.two_ranks(sys.argv[1], 1)
"""


def two_ranks(folder, rank):
    """Three steps on this rank's rows of each batch; values, gradients and queue go into a file."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        torch.save([*steps(built(rows=2), slice(2 * rank, 2 * rank + 2))], f"{folder}/result{rank}")
    finally:
        torch.distributed.destroy_process_group()


def steps(loss, rows):
    """Value, gradient and queue after each step on some rows of batches of four; the last batch has but three."""
    for step, lengths in enumerate([[9, 3, 7, 8], [9, 3, 7, 5], [8, 2, 6]]):
        documents = [torch.arange(3, 3 + n) + step * (n % 3) for n in lengths]
        batch = batch_of([[d] for d in documents], 10)
        sides = random_sides(batch, step)
        mine = batch_of([[d] for d in documents[rows]], 10)
        value = loss(*(Trace(s.last_BLD, {i: h[rows] for i, h in s.hidden.items()}, {}) for s in sides), mine)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(value, list(loss.parameters()))])
        yield value.detach(), gradient, {name: b.clone() for name, b in loss.named_buffers()}


def test_two_ranks_are_one_process(tmp_path):
    tests = str(Path(__file__).parents[1])
    other = subprocess.Popen([sys.executable, "-c", OTHER_RANK, str(tmp_path), tests])
    two_ranks(tmp_path, 0)
    assert other.wait(120) == 0
    ranks = [torch.load(tmp_path / f"result{rank}") for rank in range(2)]
    for whole, *parts in zip(steps(built(rows=4), slice(0, 4)), *ranks, strict=True):
        for value, _, buffers in parts:
            assert value.item() == pytest.approx(whole[0].item(), rel=1e-12)
            for name, buffer in buffers.items():
                torch.testing.assert_close(buffer, whole[2][name], rtol=1e-12, atol=1e-14)
        averaged = (parts[0][1] + parts[1][1]) / 2  # as DDP does
        torch.testing.assert_close(averaged, whole[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "model.contrastive.temperature: 0.0; give a number above 0"),
        ({"coefficient": -1.0}, "model.contrastive.coefficient: -1.0; give a number from 0 up"),
        ({"tokens_per_row": 0}, "model.contrastive.tokens_per_row: 0 is not a count; give 1 or more"),
        ({"queue_size": -1}, "model.contrastive.queue_size: -1 is not a count; give 0 or more"),
        ({"teacher_layer": 2}, "model.contrastive.teacher_layer: 2 is not a layer; the model has layers 0 to 1"),
        ({"student_layer": 3}, "model.contrastive.student_layer: 3 is not a layer; the model has layers 0 to 2"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        built(**options)
