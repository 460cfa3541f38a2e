"""Students made from tiny teachers: exact where they can be, nearer where they cannot, loadable always."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from distill.errors import UserError
from distill.models.layers import decoder_layers
from distill.models.start import make as making
from distill.models.start.fit import batches
from distill.models.start.make import make_student
from distill.models.start.shape import Shape, StudentFit
from distill.models.start.walk import Rows
from helpers import tiny

MOE = {
    tiny.tiny_qwen3_moe: "Qwen3ForCausalLM",
    tiny.tiny_mixtral: "MistralForCausalLM",
    tiny.tiny_olmoe: "OlmoeForCausalLM",  # transformers has no dense one: a single expert
    tiny.tiny_granite_moe: "GraniteForCausalLM",
    tiny.tiny_deepseek_v3: "DeepseekV3ForCausalLM",
    tiny.tiny_gpt_oss: "GptOssForCausalLM",
}
DENSE = [tiny.tiny_llama, tiny.tiny_qwen2, tiny.tiny_gemma, tiny.tiny_gpt2]
IDS = torch.randint(3, tiny.VOCAB, (12, 24), generator=torch.Generator().manual_seed(1))
ROWS = Rows.of(IDS)
CLOSED = StudentFit(steps=0)


@torch.no_grad()
def logits(model, ids=IDS[:2]):
    return model.eval()(ids, use_cache=False).logits


def distance(student, teacher):
    expected = logits(teacher)
    return float((logits(student) - expected).abs().max() / expected.abs().max())


def fixed_gates(make):
    """A MoE teacher that routes every token to all experts alike."""
    teacher = make(num_experts_per_tok=4)
    for layer in decoder_layers(teacher):
        for module in layer.modules():
            if hasattr(module, "top_k") and not hasattr(module, "experts"):
                for parameter in module.parameters():
                    parameter.data.zero_()
    return teacher


@pytest.mark.parametrize("make", MOE)
def test_a_moe_of_fixed_gates_becomes_a_dense_model_that_computes_the_same(make, tmp_path):
    teacher = fixed_gates(make)
    width = 80 if make is tiny.tiny_deepseek_v3 else 64 if make is tiny.tiny_qwen3_moe else 96
    student, fits = make_student(teacher, Shape([0, 1], width), ROWS, CLOSED)
    assert type(student).__name__ == MOE[make]
    assert distance(student, teacher) < 1e-4
    assert [fit.trained for fit in fits] == ["nothing", "nothing"]
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(student))


@pytest.mark.parametrize("make", MOE)
def test_a_narrow_dense_student_of_a_moe_is_nearer_than_chance_and_fitting_helps(make):
    teacher = make()
    before = copy.deepcopy(teacher.state_dict())
    closed, plain = make_student(teacher, Shape([0, 1], 24), ROWS, CLOSED)
    _, fitted = make_student(teacher, Shape([0, 1], 24), ROWS, StudentFit(steps=30, learning_rate=1e-2))
    assert all(fit.before < 0.8 for fit in plain)
    assert fitted[-1].after < plain[-1].after
    assert fitted[-1].trained == "ffn"
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert all(parameter.requires_grad for parameter in closed.parameters())


@pytest.mark.parametrize("make", DENSE)
def test_a_dense_student_of_the_same_width_is_the_teacher(make):
    teacher = make()
    student, fits = make_student(teacher, Shape([0, 1], 24), ROWS, StudentFit())
    assert torch.equal(logits(student), logits(teacher))
    assert [(fit.before, fit.after, fit.trained) for fit in fits] == [(0.0, 0.0, "nothing")] * 2


@pytest.mark.parametrize("make", DENSE)
def test_a_narrower_ffn_of_a_dense_teacher(make, tmp_path):
    teacher = make()
    student, fits = make_student(teacher, Shape([0, 1], 16), ROWS, CLOSED)
    assert all(fit.before < 0.5 for fit in fits)
    student.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(student))


@pytest.mark.parametrize("make", [tiny.tiny_llama, tiny.tiny_qwen2])
def test_principal_axes_of_the_full_width_give_the_teachers_logits(make):
    teacher = make(tie_word_embeddings=True)
    for name, parameter in teacher.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    student, _ = make_student(teacher, Shape([0, 1], None, 16), ROWS, CLOSED)
    assert distance(student, teacher) < 1e-4
    assert student.lm_head.weight is not student.model.embed_tokens.weight
    assert not student.config.tie_word_embeddings


@pytest.mark.parametrize("make", [make for make in MOE if make is not tiny.tiny_olmoe])
def test_experts_and_their_router_are_turned_with_the_stream(make):
    teacher = make()
    for name, parameter in teacher.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    student, _ = make_student(teacher, Shape([0, 1], None, 16), ROWS, CLOSED)
    assert type(student) is type(teacher)
    assert distance(student, teacher) < 1e-4
    _, fits = make_student(teacher, Shape([0, 1], None, 8), ROWS, CLOSED)
    assert all(fit.before < 1.5 for fit in fits)  # half of random weights
    with pytest.raises(UserError, match=r"student_hidden_size: 12, but torch multiplies experts of widths in steps"):
        make_student(teacher, Shape([0, 1], None, 12), ROWS, CLOSED)


@pytest.mark.parametrize("make", [tiny.tiny_qwen3_moe, tiny.tiny_mixtral, tiny.tiny_granite_moe, tiny.tiny_deepseek_v3])
def test_principal_axes_and_a_dense_student_of_fixed_gates_together(make):
    teacher = fixed_gates(make)
    width = 80 if make is tiny.tiny_deepseek_v3 else 64 if make is tiny.tiny_qwen3_moe else 96
    student, _ = make_student(teacher, Shape([0, 1], width, 16), ROWS, CLOSED)
    assert distance(student, teacher) < 1e-4


def test_a_narrower_stream_keeps_heads_and_positions(tmp_path):
    teacher = tiny.tiny_llama()
    student, fits = make_student(teacher, Shape([0, 1], None, 12), ROWS, StudentFit(steps=30, learning_rate=1e-2))
    assert student.config.hidden_size == 12
    assert student.config.head_dim == 4
    assert torch.equal(student.model.rotary_emb.inv_freq, teacher.model.rotary_emb.inv_freq)
    assert fits[-1].trained == "layer"
    assert fits[-1].after < fits[-1].before
    student.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(student))


@pytest.mark.parametrize(
    ("make", "part"), [(tiny.tiny_gpt2, "ln_1"), (tiny.tiny_gemma, "pre_feedforward"), (tiny.tiny_olmoe, "heads")]
)
def test_streams_that_cannot_be_turned_are_refused_in_a_sentence(make, part):
    width = 96 if make is tiny.tiny_olmoe else None
    with pytest.raises(UserError, match=rf"model.student_hidden_size: .*{part}"):
        make_student(make(), Shape([0, 1], width, 12), ROWS, CLOSED)


def test_a_stream_without_a_norm_of_each_kind_is_refused():
    teacher = tiny.build("Cohere2ForCausalLM", "Cohere2Config", tiny.BASE)  # one for attention and FFN
    with pytest.raises(UserError, match="Cohere2ForCausalLM lacks a norm before attention, before an FFN or"):
        make_student(teacher, Shape([0, 1], None, 12), ROWS, CLOSED)


@pytest.mark.parametrize("make", [*DENSE, tiny.tiny_qwen3_moe, tiny.tiny_gpt_oss])
def test_a_depth_cut_comes_nearer_by_its_fit(make):
    teacher = make(**({"n_layer": 4} if make is tiny.tiny_gpt2 else {"num_hidden_layers": 4}))
    student, fits = make_student(teacher, Shape([0, 3]), ROWS, StudentFit(steps=40, learning_rate=1e-2))
    assert type(student) is type(teacher)
    assert len(decoder_layers(student)) == 2
    assert fits[0].teacher_layer == 0
    assert fits[1].teacher_layer == 3
    assert all(fit.after < fit.before for fit in fits)
    assert all(fit.trained == "layer" for fit in fits)


def test_a_moe_block_behind_a_norm_of_its_own():
    experts = {"num_experts": 4, "num_experts_per_tok": 2}
    teacher = tiny.build("FlexOlmoForCausalLM", "FlexOlmoConfig", tiny.BASE | experts)
    _, fits = make_student(teacher, Shape([0, 1], 24), ROWS, CLOSED)
    assert all(fit.before < 0.6 for fit in fits)
    _, fits = make_student(teacher, Shape([1]), ROWS, StudentFit(steps=20, learning_rate=1e-2))
    assert fits[0].after < fits[0].before


GATED_SHARED = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
UNKNOWN = {
    "Qwen2Moe": tiny.BASE | GATED_SHARED,
    "OPT": tiny.BASE | {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "Falcon": tiny.BASE,  # adds to what its FFN wrote in place
}


@pytest.mark.parametrize("family", UNKNOWN)
def test_a_depth_cut_of_any_family_is_fitted_whether_its_ffns_are_known_or_not(family):
    teacher = tiny.build(f"{family}ForCausalLM", f"{family}Config", UNKNOWN[family] | {"num_hidden_layers": 3})
    before = [parameter.clone() for parameter in teacher.parameters()]
    student, fits = make_student(teacher, Shape([0, 2]), ROWS, StudentFit(steps=30, learning_rate=1e-2))
    assert type(student) is type(teacher)
    assert all(fit.after < fit.before and fit.trained == "layer" for fit in fits)
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))


def test_the_same_seed_gives_the_same_bits_and_leaves_the_global_one_alone():
    teacher = tiny.tiny_qwen3_moe()
    torch.manual_seed(3)
    first, _ = make_student(teacher, Shape([0, 1], 80), ROWS, StudentFit(steps=3))
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    second, _ = make_student(teacher, Shape([0, 1], 80), ROWS, StudentFit(steps=3))
    other, _ = make_student(teacher, Shape([0, 1], 80), ROWS, StudentFit(steps=3, seed=1))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_closed_forms_are_in_fp32_and_training_as_asked_for(monkeypatch):
    seen = []

    def noted(called):
        def call(*args, **options):
            seen.append((called.__name__, torch.get_float32_matmul_precision()))
            return called(*args, **options)

        return call

    for called in (making.narrow_ffn, making.principal_axes, making.train_alone):
        monkeypatch.setattr(making, called.__name__, noted(called))
    torch.set_float32_matmul_precision("medium")
    try:
        make_student(tiny.tiny_llama(), Shape([0, 1], 16, 12), ROWS, StudentFit(steps=2))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {("narrow_ffn", "highest"), ("principal_axes", "highest"), ("train_alone", "medium")}


def test_padding_and_first_positions_do_not_count():
    teacher = tiny.tiny_llama(num_hidden_layers=3)
    counted = ROWS.counted_RL.clone()
    counted[:, 18:] = False
    other = IDS.clone()
    other[:, 18:] = 5
    students = [
        make_student(teacher, Shape([0, 2], 16), Rows(ids, counted), StudentFit(steps=3))[0] for ids in (IDS, other)
    ]
    for a, b in zip(students[0].parameters(), students[1].parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_fit_that_does_not_help_is_undone():
    teacher = tiny.tiny_llama(num_hidden_layers=3)
    closed, before = make_student(teacher, Shape([0, 2]), ROWS, CLOSED)
    spoilt, after = make_student(teacher, Shape([0, 2]), ROWS, StudentFit(steps=2, learning_rate=10.0))
    assert [fit.trained for fit in after] == ["nothing", "nothing"]
    assert [fit.after for fit in after] == [fit.before for fit in before]
    assert all(torch.equal(a, b) for a, b in zip(closed.parameters(), spoilt.parameters(), strict=True))


def test_batches_take_every_row_once_before_any_twice():
    drawn = batches(5, 2, seed=0)
    seen = torch.cat([next(drawn) for _ in range(5)]).tolist()
    assert sorted(seen[:5]) == list(range(5))
    assert sorted(seen[5:]) == list(range(5))
