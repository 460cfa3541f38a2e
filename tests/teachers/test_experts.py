"""Expert views against the family's own blocks and against plain loops over the weights."""

import pytest
import torch
from torch import nn

from distill.errors import UserError
from distill.losses.routing_terms import student_aware_route
from distill.models.blocks import moe_block, moe_layers
from distill.models.layers import decoder_layers
from distill.models.skeleton import skeleton
from distill.models.trace import recording
from distill.teachers import experts
from distill.teachers.experts import mix
from distill.teachers.find_experts import find_views
from helpers import tiny

MOE = [
    tiny.tiny_qwen3_moe,
    tiny.tiny_mixtral,
    tiny.tiny_olmoe,
    tiny.tiny_granite_moe,
    tiny.tiny_deepseek_v3,
    tiny.tiny_gpt_oss,
]
DENSE = [tiny.tiny_llama, tiny.tiny_qwen2, tiny.tiny_gemma, tiny.tiny_gpt2]
IDS = torch.randint(3, tiny.VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
ALL = torch.arange(IDS.numel())


def run(model, views, **options):
    """The recording of one forward pass and the block or FFN output [T, D] of each view's layer."""
    outputs, handles = {}, []
    for view in views:
        layer = decoder_layers(model)[view.layer]
        block = moe_block(layer) or layer.mlp

        def keep(module, args, output, index=view.layer):
            outputs[index] = (output[0] if isinstance(output, tuple) else output).flatten(0, 1)

        handles.append(block.register_forward_hook(keep))
    with torch.no_grad(), recording(views) as records:
        model(IDS, **options)
    for handle in handles:
        handle.remove()
    return records, outputs


def plain_expert(experts, e, x):
    """Expert e on states [T, D], from the weights, one family's formula at a time."""
    if hasattr(experts, "gate_up_proj_bias"):  # gpt-oss: transposed, interleaved, clamped
        both = x @ experts.gate_up_proj[e] + experts.gate_up_proj_bias[e]
        gate, up = both[:, 0::2].clamp(max=7.0), both[:, 1::2].clamp(-7.0, 7.0)
        return ((up + 1) * gate * torch.sigmoid(1.702 * gate)) @ experts.down_proj[e] + experts.down_proj_bias[e]
    gate, up = (x @ experts.gate_up_proj[e].T).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up) @ experts.down_proj[e].T


def close(actual, expected, tolerance=1e-5):
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("make", MOE)
def test_routed_outputs_plus_shared_experts_are_the_blocks_output(make):
    model = make()
    views = find_views(model, moe_layers(model), None, None)
    records, blocks = run(model, views)
    for view in views:
        capture, block = records[view.layer], moe_block(decoder_layers(model)[view.layer])
        x = capture["input_TD"]
        with torch.no_grad():
            shared = block.shared_experts(x) if hasattr(block, "shared_experts") else 0.0
            plain = torch.stack([plain_expert(block.experts, e, x) for e in range(4)])
            close(view.outputs(capture, ALL), plain)
            routed = view.route(capture, ALL, view.native_k, mixture=True)
            close(routed.mixture_ND + shared, blocks[view.layer])
            summed = sum(capture["weights_TK"][:, j, None] * plain[routed.index_NK[:, j], ALL] for j in range(2))
            close(summed + shared, blocks[view.layer])
            close(mix(plain, routed.index_NK, capture["weights_TK"]), summed)


@pytest.mark.parametrize("make", MOE)
def test_more_experts_are_the_familys_own_selection(make):
    model = make()
    wider = make(num_experts_per_tok=3)
    views, wide_views = (find_views(m, moe_layers(m)[:1], None, None) for m in (model, wider))
    # Up to the first MoE block both models agree.
    (records, _), (wide, _) = run(model, views), run(wider, wide_views)
    capture, expected = records[views[0].layer], wide[views[0].layer]
    routed = views[0].route(capture, ALL, 3, mixture=True)
    assert torch.equal(routed.index_NK, expected["index_TK"])
    close(routed.mixture_ND, expected["mixture_TD"])
    assert views[0].router.top_k == 2
    some = torch.tensor([4, 1, 7])
    close(views[0].route(capture, some, 3, mixture=True).mixture_ND, expected["mixture_TD"][some])


@pytest.mark.parametrize("make", MOE)
def test_gates_are_the_routers_own_function_of_all_logits(make):
    model = make()
    (view,) = find_views(model, moe_layers(model)[:1], None, None)
    records, _ = run(model, [view])
    capture = records[view.layer]
    logits = view.router.weight.detach() @ capture["input_TD"].T
    logits = logits.T + getattr(view.router, "bias", torch.zeros(4)).detach()
    if make is tiny.tiny_deepseek_v3:  # scores over their sum, without the selection bias
        scores = 1 / (1 + (-logits).exp())
        expected = scores / scores.sum(-1, keepdim=True)
    else:
        expected = logits.exp() / logits.exp().sum(-1, keepdim=True)
    gates = view.gates(capture, ALL)
    close(gates, expected)
    chosen = gates.gather(-1, capture["index_TK"])
    weights = capture["weights_TK"]
    close(chosen / chosen.sum(-1, keepdim=True), weights / weights.sum(-1, keepdim=True))


@pytest.mark.parametrize("make", DENSE)
@pytest.mark.parametrize("num_experts", [1, 3, 8])
def test_slices_add_up_to_the_ffn(make, num_experts):
    model = make()
    views = find_views(model, [0, 1], num_experts, 1)
    records, blocks = run(model, views)
    for view in views:
        capture = records[view.layer]
        outputs = view.outputs(capture, ALL)
        assert outputs.shape == (num_experts, len(ALL), 16)
        close(outputs.sum(0), blocks[view.layer])
        routed = view.route(capture, ALL, num_experts, mixture=True)
        close(routed.mixture_ND, blocks[view.layer])


@pytest.mark.parametrize("make", DENSE)
def test_a_slice_is_the_ffn_with_the_other_neurons_silenced(make):
    model = make()
    (view,) = find_views(model, [1], 4, 2)
    records, _ = run(model, [view])
    capture = records[1]
    outputs = view.outputs(capture, ALL)
    for e in range(4):
        silenced = torch.zeros_like(capture["neurons_TI"])
        silenced[:, e * 6 : e * 6 + 6] = capture["neurons_TI"][:, e * 6 : e * 6 + 6]
        bias = 0.0 if view.down.bias is None else view.down.bias
        with torch.no_grad():
            close(outputs[e], view.down(silenced) - bias + bias / 4)
    routed = view.route(capture, ALL, 2, mixture=True)
    for t in range(len(ALL)):
        squares = [float(outputs[e, t].double().square().sum()) for e in range(4)]
        assert routed.gates_NE[t].tolist() == pytest.approx([s / sum(squares) for s in squares], rel=1e-5)
        best = sorted(range(4), key=lambda e: -squares[e])[:2]
        assert routed.index_NK[t].tolist() == best
        close(routed.mixture_ND[t], outputs[best[0], t] + outputs[best[1], t])


@pytest.mark.parametrize("make", [tiny.tiny_qwen3_moe, tiny.tiny_gpt_oss, tiny.tiny_llama])
def test_bf16_stays_within_its_own_error(make):
    model = make().bfloat16()
    (view,) = find_views(model, [1], 4 if make is tiny.tiny_llama else None, None)
    records, blocks = run(model, [view])
    capture = records[1]
    outputs = view.outputs(capture, ALL)
    assert outputs.dtype == torch.bfloat16
    if make is tiny.tiny_llama:
        close(outputs.float().sum(0), blocks[1].float(), 2e-2)
    else:
        summed = mix(outputs.float(), capture["index_TK"], capture["weights_TK"].float())
        close(summed, blocks[1].float(), 2e-2)
    assert view.gates(capture, ALL).dtype == torch.float32


@pytest.mark.parametrize("make", [tiny.tiny_qwen3_moe, tiny.tiny_llama])
def test_chunks_change_nothing(make, monkeypatch):
    model = make()
    (view,) = find_views(model, [1], None, None)
    records, _ = run(model, [view])
    whole = view.route(records[1], ALL, 3, mixture=True)
    monkeypatch.setattr("distill.teachers.experts.CHUNK_BYTES", 1000)
    parts = view.route(records[1], ALL, 3, mixture=True)
    assert torch.equal(whole.index_NK, parts.index_NK)
    close(parts.gates_NE, whole.gates_NE)
    close(parts.mixture_ND, whole.mixture_ND)


@pytest.mark.parametrize("make", [tiny.tiny_qwen3_moe, tiny.tiny_llama])
@pytest.mark.parametrize("tau", [None, 0.5])
def test_shards_are_gathered_as_often_whatever_the_number_of_rows(make, tau, monkeypatch):
    """Gathering communicates: a rank with fewer rows must not gather less often than the others, who would wait."""
    model = make()
    (view,) = find_views(model, [1], None, None)
    records, _ = run(model, [view])
    gathered = []
    monkeypatch.setattr(experts, "unsharded", lambda module: gathered.append(module) or module)
    monkeypatch.setattr(experts, "CHUNK_BYTES", 1000)
    counts = []
    for rows in (0, 1, 5, len(ALL)):
        if tau is None:
            view.route(records[1], ALL[:rows], 3, mixture=True)
        else:
            student_aware_route(view, records[1], ALL[:rows], torch.zeros(rows, view.width), 3, tau)
        counts.append(len(gathered))
        gathered.clear()
    assert counts[0] > 0
    assert len(set(counts)) == 1


@pytest.mark.parametrize("make", [tiny.tiny_deepseek_v3, tiny.tiny_gpt2])
def test_hooks_live_only_inside_a_recording(make):
    model = make()
    views = find_views(model, [1], None, None)
    hooked = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())  # noqa: E731
    assert hooked() == 0
    with recording(views):
        assert hooked() > 0
    assert hooked() == 0
    with pytest.raises(ValueError, match="input_ids"), recording(views):
        model()
    assert hooked() == 0


def test_unknown_routers_and_ffns_are_refused_by_name():
    odd = tiny.tiny_mixtral()

    class SquareRouter(type(moe_block(decoder_layers(odd)[0]).gate)):
        def forward(self, states):
            logits, weights, index = super().forward(states)
            return logits, weights**2, index

    moe_block(decoder_layers(odd)[0]).gate.__class__ = SquareRouter
    with pytest.raises(UserError, match="SquareRouter of layer 0: its weights are neither a softmax nor a sigmoid"):
        find_views(odd, [0], None, None)

    normed = tiny.tiny_llama()

    class NormedMLP(type(normed.model.layers[0].mlp)):
        def forward(self, x):
            return torch.nn.functional.layer_norm(super().forward(x), (16,))

    normed.model.layers[0].mlp.__class__ = NormedMLP
    with pytest.raises(UserError, match="the FFN NormedMLP of layer 0 is more than a sum over its neurons"):
        find_views(normed, [0], 4, 1)

    bare = tiny.tiny_llama()
    bare.model.layers[0].mlp = nn.Identity()
    with pytest.raises(UserError, match=r"layer 0 .* has no experts and no FFN that can be sliced"):
        find_views(bare, [0], 4, 1)


def test_counts_that_the_teacher_does_not_have_are_refused():
    with pytest.raises(UserError, match="num_experts: 8, but the teacher's MoE blocks have 4"):
        find_views(tiny.tiny_mixtral(), [0], 8, None)
    with pytest.raises(UserError, match="native_top_k: 1, but the teacher's MoE blocks have 2"):
        find_views(tiny.tiny_mixtral(), [0], 4, 1)
    with pytest.raises(UserError, match="num_experts: 5 does not divide the 24 FFN neurons"):
        find_views(tiny.tiny_llama(), [0], 5, None)
    with pytest.raises(UserError, match="native_top_k: 3 is more than the 2 experts"):
        find_views(tiny.tiny_llama(), [0], 2, 3)
    with pytest.raises(UserError, match=r"teacher_layers: 0 is a dense layer of a MoE teacher; choose among \[1\]"):
        find_views(tiny.tiny_deepseek_v3(), [0], None, None)


def test_sharded_weights_are_gathered(tmp_path):
    """Under FSDP2 the experts are called outside the forward pass, when their weights are sharded again."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (1,))
        for make in (tiny.tiny_qwen3_moe, tiny.tiny_gpt2):
            plain, sharded = make(), make()
            (view,), (sharded_view,) = (find_views(m, [1], None, None) for m in (plain, sharded))
            for layer in decoder_layers(sharded):
                fully_shard(layer, mesh=mesh)
            fully_shard(sharded, mesh=mesh)
            (records, _), (sharded_records, _) = run(plain, [view]), run(sharded, [sharded_view])
            with torch.no_grad():
                expected = view.route(records[1], ALL, 3, mixture=True)
                actual = sharded_view.route(sharded_records[1], ALL, 3, mixture=True)
                close(actual.mixture_ND, expected.mixture_ND)
                close(
                    sharded_view.whole().outputs(sharded_records[1], ALL),
                    view.outputs(records[1], ALL),
                )
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("make", MOE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_without_memory_has_the_same_experts(make, dtype):
    """What its gate is is seen from its code; a teacher whose targets come from disk has no weights."""
    real = make()
    layers = moe_layers(real)
    absent = find_views(skeleton(real.config, dtype), layers, None, None)
    for ours, theirs in zip(absent, find_views(real, layers, None, None), strict=True):
        assert (ours.layer, ours.num_experts, ours.native_k) == (theirs.layer, theirs.num_experts, theirs.native_k)
        assert (ours.width, ours.sigmoid) == (theirs.width, theirs.sigmoid)
        assert next(ours.router.parameters()).is_meta
