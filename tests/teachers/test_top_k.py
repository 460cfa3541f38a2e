"""Experts per token of the pass that makes the KD target, against the same weights configured so and plain loops."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from distill.batch import Tokens
from distill.errors import UserError
from distill.models.blocks import moe_block, moe_layers
from distill.models.layers import decoder_layers
from distill.models.trace import recording
from distill.teachers.find_experts import find_views
from distill.teachers.online import OnlineTeacher
from helpers import tiny

MOE = [
    tiny.tiny_qwen3_moe,
    tiny.tiny_mixtral,
    tiny.tiny_olmoe,
    tiny.tiny_granite_moe,
    tiny.tiny_deepseek_v3,
    tiny.tiny_gpt_oss,
]
IDS = torch.randint(3, tiny.VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
TOKENS = Tokens(IDS, IDS, torch.ones_like(IDS), torch.zeros_like(IDS), IDS[0], packed=False)


def close(actual, expected, tolerance=1e-5):
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("make", MOE)
@pytest.mark.parametrize("top_k", [3, "all"])
def test_the_forward_pass_is_that_of_the_model_configured_so(make, top_k):
    native, wider = OnlineTeacher(make()), make(num_experts_per_tok=4 if top_k == "all" else top_k)
    with torch.no_grad():
        expected = wider.get_decoder()(IDS, use_cache=False).last_hidden_state
    close(OnlineTeacher(make(), top_k).hidden(TOKENS), expected)
    assert (native.hidden(TOKENS) - expected).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize("make", MOE)
def test_routing_keeps_the_native_k_and_the_gates_over_all_experts(make):
    """All experts in the forward pass: the record's mixture at the native k is that of a block which sees its input."""
    model, plain = make(), make()
    views = find_views(model, moe_layers(model), None, None)
    teacher = OnlineTeacher(model, "all")
    with recording(views) as records:
        teacher.hidden(TOKENS)
    rows = torch.tensor([0, 3, 17, 8])
    for view in views:
        assert view.native_k == 2
        block, captured = moe_block(decoder_layers(plain)[view.layer]), records[view.layer]
        assert captured["index_TK"].shape == (18, 4)
        (native_view,) = find_views(plain, [view.layer], None, None)
        states = captured["input_TD"]
        with torch.no_grad(), recording([native_view]) as native:
            block(states.unflatten(0, IDS.shape))
        expected = native[view.layer]
        routed = view.route(captured, rows, 2, mixture=True)
        assert torch.equal(routed.index_NK, expected["index_TK"][rows])
        close(routed.mixture_ND, expected["mixture_TD"][rows])
        close(routed.gates_NE, native_view.gates(expected, rows))
        assert torch.equal(view.route(captured, rows, 4, mixture=True).mixture_ND, captured["mixture_TD"][rows])


def test_what_the_teacher_does_not_have_is_refused():
    with pytest.raises(UserError, match=r"model.teacher_top_k: 5 is not between 1 and the teacher's 4 experts"):
        OnlineTeacher(tiny.tiny_mixtral(), 5)
    for top_k in (2, "all"):
        with pytest.raises(UserError, match=rf"model.teacher_top_k: {top_k}, but LlamaForCausalLM has no experts"):
            OnlineTeacher(tiny.tiny_llama(), top_k)
    with pytest.warns(UserWarning, match=r"model.teacher_top_k: 1 is below the teacher's own 2 experts"):
        OnlineTeacher(tiny.tiny_mixtral(), 1)


def plain_nll(folder, datamodule, **options) -> float:
    """Nats per label of the validation rows, a document at a time, without our code."""
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    nats, count = 0.0, 0
    for row in range(len(datamodule.validation_rows)):
        ids, start = torch.as_tensor(datamodule.validation_rows[row]["input_ids"]), 0
        for length in datamodule.validation_rows[row]["document_lengths"]:
            document = ids[start : start + length]
            start += length
            with torch.no_grad():
                log_q = model(document[None]).logits[0].double().log_softmax(-1)
            nats -= sum(float(log_q[t, document[t + 1]]) for t in range(length - 1))
            count += length - 1
    return nats / count


def test_a_run_shows_the_teachers_nll_at_each_setting(distill, config, assets):
    folder = str(assets / "qwen3_moe")
    config["model"] |= {"teacher": folder, "routing": {"teacher_layers": 2}}
    seen = {}
    for top_k in ("native", 3, "all"):
        config["model"]["teacher_top_k"] = top_k
        cli = distill("validate", config)
        metrics = cli.trainer.callback_metrics
        experts = {"native": 2, "all": 4}.get(top_k, top_k)
        expected = plain_nll(folder, cli.datamodule, num_experts_per_tok=experts)
        seen[top_k] = float(metrics["val/teacher_nll"])
        assert seen[top_k] == pytest.approx(expected, rel=1e-5)
        assert cli.model.student.config.num_experts_per_tok == 2
        assert cli.model.student.model.layers[0].mlp.gate.top_k == 2
    values = list(seen.values())
    assert min(abs(a - b) for i, a in enumerate(values) for b in values[:i]) > 1e-4


@pytest.mark.parametrize(
    ("teacher", "top_k", "message"),
    [
        ("llama", "all", "model.teacher_top_k: all, but LlamaForCausalLM has no experts"),
        ("qwen3_moe", 5, "model.teacher_top_k: 5 is not between 1 and the teacher's 4 experts"),
        ("qwen3_moe", 0, "model.teacher_top_k: 0 must be at least 1, native or all"),
        ("qwen3_moe", "every", "model.teacher_top_k"),
    ],
)
def test_a_run_refuses_it_in_one_line(distill, config, assets, teacher, top_k, message):
    config["model"] |= {"teacher": str(assets / teacher), "routing": None, "teacher_top_k": top_k}
    with pytest.raises(UserError, match=message) as error:
        distill("fit", config)
    assert "\n" not in str(error.value)
