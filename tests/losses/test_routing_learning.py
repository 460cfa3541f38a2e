"""Do the routing losses mean what they say? A MoE teacher trained here, a student under the three-phase curriculum."""

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from distill.batch import Tokens
from distill.curriculum import value_at
from distill.losses.routing import UNIT, Routing
from distill.losses.states import normalise
from distill.models.precision import full_precision
from distill.models.trace import recording
from helpers import tiny

FEATURE, IMPORTANCE, BALANCE, ALIGNMENT = UNIT
ROWS, LENGTH, WORDS = 16, 32, 32
FEATURE_RAMP = [[0.1, 0.0], [0.4, 0.1]]  # the default's height, earlier: the run is short
ATTENTION_RAMP = [[0.1, 0.0], [0.4, 1.0]]  # at 0.1 these few steps do not get the relations below equal attention
SIZES = {"vocab_size": WORDS, "hidden_size": 32, "initializer_range": 0.05}


def text(generator):
    """Rows [B, L] of one of four languages each: four words in five follow the language's own cycle."""
    cycles = torch.stack([torch.randperm(WORDS, generator=torch.Generator().manual_seed(i)) for i in range(4)])
    language = torch.randint(4, (ROWS,), generator=generator)
    rows = [torch.randint(WORDS, (ROWS,), generator=generator)]
    for _ in range(LENGTH - 1):
        stray = torch.rand(ROWS, generator=generator) < 0.2
        rows.append(torch.where(stray, torch.randint(WORDS, (ROWS,), generator=generator), cycles[language, rows[-1]]))
    ids = torch.stack(rows, 1)
    places = torch.arange(LENGTH).expand(ROWS, LENGTH)
    positions = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH)[:, :-1].flatten()
    return Tokens(ids, ids, torch.ones_like(ids), places, positions, packed=False)


def next_word_loss(logits, ids):
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.fixture(scope="module")
def teacher():
    """A 3-layer MoE with 4 experts, top-2, that has learnt to tell the four languages apart."""
    model = tiny.tiny_qwen3_moe(**SIZES, num_hidden_layers=3, head_dim=8, router_aux_loss_coef=0.02).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(500):
        batch = text(generator)
        ids = batch.input_ids
        loss = model(ids, labels=ids, output_router_logits=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().requires_grad_(False)
    with torch.no_grad():
        assert next_word_loss(model(ids).logits, ids) < 2.0  # log 32 is 3.47, the source itself about 1.2
    return model


def measure(routing, student, teacher, batch, shuffle):
    """Both logits, routing output and records; with `shuffle` the teacher's tokens are dealt out anew."""
    with torch.no_grad(), recording(routing.teacher_needs.recorders) as records:
        logits = teacher(batch.input_ids).logits
    if shuffle is not None:
        order = torch.randperm(ROWS * LENGTH, generator=shuffle)
        for capture in records.values():
            capture.update({name: value[order] for name, value in capture.items()})
    output = student(batch.input_ids, output_hidden_states=True)
    states = [output.hidden_states[i + 1] for i in routing.student_layer_indices]
    return output.logits, logits, routing(routing.components, states, records, batch), records


def uniform_relation_kl(mixture_TD, heads=8):
    """Mean KL of the teacher's relations to equal attention over the earlier positions, nats per query."""
    states = normalise(mixture_TD).view(ROWS, LENGTH, heads, -1).transpose(1, 2)
    scores = states @ states.transpose(-1, -2) / states.shape[-1] ** 0.5
    total = 0.0
    for i in range(1, LENGTH):
        p = scores[:, :, i, :i].softmax(-1)
        total += (p * (p * i).log()).sum(-1).mean(1).sum().item()
    return total / (ROWS * (LENGTH - 1))


@pytest.mark.slow
@pytest.mark.parametrize("shuffled", [False, True])
def test_losses_fall_below_their_baselines_only_with_the_real_teacher(teacher, shuffled):
    student = tiny.tiny_llama(**SIZES | {"hidden_size": 40}, num_hidden_layers=2).train()
    routing = Routing(teacher_layers=2)
    torch.manual_seed(0)
    routing.build(teacher, student)
    optimizer = torch.optim.AdamW([*student.parameters(), *routing.parameters()], lr=5e-3)
    words, deal = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    steps = 500
    for step in range(steps):
        batch = text(words)
        logits, teacher_logits, routed, _ = measure(routing, student, teacher, batch, deal if shuffled else None)
        kd = kl_div(logits.log_softmax(-1), teacher_logits.log_softmax(-1), log_target=True, reduction="sum")
        loss = 0.7 * kd / (ROWS * LENGTH) + 0.3 * next_word_loss(logits, batch.input_ids)
        feature, attention = value_at(FEATURE_RAMP, step / steps), value_at(ATTENTION_RAMP, step / steps)
        if feature > 0:
            mean = {name: value / len(batch.positions) for name, value in routed.sums.items()}
            loss = loss + feature * (mean[FEATURE] + mean[IMPORTANCE] + 0.01 * routed.sums[BALANCE])
            loss = loss + attention * mean[ALIGNMENT]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    student.eval()
    value, baseline = dict.fromkeys(UNIT, 0.0), dict.fromkeys(UNIT, 0.0)
    with torch.no_grad():
        for _ in range(4):
            batch = text(words)
            positions = batch.positions
            *_, routed, records = measure(routing, student, teacher, batch, deal if shuffled else None)
            for name, total in routed.sums.items():
                value[name] += total.item() / (4 if name == BALANCE else 4 * len(positions))
            baseline[IMPORTANCE] += routed.stats["constant_gate_kl"].item() / 4
            for capture in records.values():
                target = normalise(capture["mixture_TD"][positions])
                baseline[FEATURE] += (target - target.mean(0)).square().mean().item() / 8
                baseline[ALIGNMENT] += uniform_relation_kl(full_precision(capture["mixture_TD"])) / 8
    assert value[BALANCE] < 0.1  # 3 where it has collapsed
    for name in (FEATURE, IMPORTANCE, ALIGNMENT):
        if shuffled:
            assert value[name] > 0.95 * baseline[name], name
        else:
            assert value[name] < 0.8 * baseline[name], name
