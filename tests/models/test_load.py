"""Loading and its failures on tiny folders; cuts against the teacher's own layers."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, T5Config

from distill.errors import UserError
from distill.models.cut import cut_layers
from distill.models.load import (
    check_packing,
    check_vocabularies,
    load_config,
    load_model,
    load_tokenizer,
    max_context,
    student_from_config,
)
from helpers import tiny


@pytest.fixture
def folder(assets, tmp_path):
    """A copy of a tiny model's folder, to be damaged."""
    return shutil.copytree(assets / "llama", tmp_path / "model")


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def test_load_gives_an_eval_model_of_the_dtype_asked_for(assets, capfd):
    model = load_model(str(assets / "llama"), dtype=torch.float64)
    assert (model.dtype, model.training) == (torch.float64, False)
    written = capfd.readouterr()
    assert (written.out, written.err) == ("", "")


def truncate(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def pickle(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")


def drop_head(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def lose_a_shard(folder, *numbers: int):
    load_model(str(folder)).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    shards = sorted(folder.glob("model-*.safetensors"))
    for number in numbers:
        shards[number].unlink()


def lose_the_index(folder):
    lose_a_shard(folder)
    (folder / "model.safetensors.index.json").unlink()


def cut_the_index(folder):
    lose_a_shard(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map"')


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: lose_a_shard(folder, 1), "lacks model-00002-of-00004.safetensors, which the index .*again$"),
        (lambda folder: lose_a_shard(folder, 0, 2), "lacks model-00001-of-00004.safetensors and 1 more, which"),
        (lose_the_index, "has no weights, or parts of them without their index; copy or download it again"),
        (cut_the_index, "cannot be read .*; copy or download it again"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no weights, or parts of them"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read .*config.json' is not a valid JSON"),
        (
            lambda folder: edit_config(folder, quantization_config={"quant_method": "hqq"}),
            r"needs a package that is not installed \(.*\); install it, or give another model",
        ),
        (truncate, "truncated or damaged weights"),
        (pickle, "pickled ones are refused; set allow_pickle: true"),
        (drop_head, r"lacks 1 weights of LlamaForCausalLM \(lm_head.weight"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: edit_config(folder, hidden_size=32), "disagree about shapes"),
        (lambda folder: edit_config(folder, model_type="unheard_of"), "does not know"),
        (lambda folder: T5Config().save_pretrained(folder), "is not a causal language model"),
        (
            lambda folder: edit_config(folder, model_type="own", auto_map={"AutoConfig": "own.C"}),
            "brings its own code, which is refused; read it and set trust_remote_code: true",
        ),
    ],
)
def test_failures_of_loading_are_one_sentence(folder, damage, told):
    damage(folder)
    with pytest.raises(UserError, match=f"^model.student: .*{told}") as caught:
        load_model(str(folder), key="model.student")
    assert "\n" not in str(caught.value)


def test_pickled_weights_when_asked_for(folder, assets):
    pickle(folder)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        mine, original = load_model(str(folder), allow_pickle=True)(ids), load_model(str(assets / "llama"))(ids)
    assert torch.equal(mine.logits, original.logits)


@pytest.mark.parametrize("load", [load_model, load_tokenizer, load_config])
def test_a_hub_id_without_a_hub(load):
    with pytest.raises(UserError, match=r"^model.x: 'nobody/nothing' is not on the hub, or the hub is out of reach"):
        load("nobody/nothing", key="model.x")


def test_a_folder_without_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"^data.tokenizer: .* has no usable tokenizer files"):
        load_tokenizer(str(folder))


def test_student_from_a_dict():
    options = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 2}
    student = student_from_config(options | {"num_hidden_layers": 2}, vocab_size=77)
    assert student.training
    assert student.config.use_cache is False
    assert student.get_input_embeddings().weight.shape == (77, 16)
    assert (
        student_from_config(options | {"num_hidden_layers": 1, "vocab_size": 5}, vocab_size=77).config.vocab_size == 5
    )


def test_student_from_a_folder_has_its_shape_and_other_weights(assets):
    torch.manual_seed(1)
    teacher, student = load_model(str(assets / "llama")), student_from_config(str(assets / "llama"))
    shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in (teacher, student)]
    assert shapes[0] == shapes[1]
    assert not torch.equal(teacher.lm_head.weight, student.lm_head.weight)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, r"model.student_config.model_type: None"),
        ({"model_type": "lama"}, r"model.student_config.model_type: 'lama' is unknown; did you mean 'llama'\?"),
        (
            {"model_type": "llama", "num_layer": 3},
            r"model.student_config.num_layer: .* did you mean 'num_hidden_layers'\?",
        ),
        ({"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}, "not a multiple"),
        ({"model_type": "llama", "hidden_size": "wide"}, "hidden_size"),
        ({"model_type": "t5"}, "is not a causal language model"),
    ],
)
def test_wrong_configurations(options, told):
    with pytest.raises(UserError, match=told) as caught:
        student_from_config(options)
    assert "\n" not in str(caught.value)


FAMILIES = {
    "llama": lambda n: tiny.tiny_llama(num_hidden_layers=n),
    "llama_tied": lambda n: tiny.tiny_llama(num_hidden_layers=n, tie_word_embeddings=True),
    "qwen3_moe": lambda n: tiny.tiny_qwen3_moe(num_hidden_layers=n, mlp_only_layers=[1]),
    "gemma": lambda n: tiny.tiny_gemma(
        num_hidden_layers=n, sliding_window=4, layer_types=(["sliding_attention", "full_attention"] * n)[:n]
    ),
    "gpt2": lambda n: tiny.tiny_gpt2(n_layer=n),
    "deepseek_v3": lambda n: tiny.tiny_deepseek_v3(num_hidden_layers=n),
}
IDS = torch.arange(3, 27).view(2, 12)


def layers_of(model):
    decoder = model.get_decoder()
    return decoder.h if hasattr(decoder, "h") else decoder.layers


@pytest.mark.parametrize("family", FAMILIES)
def test_all_layers_reproduce_the_teacher(family):
    teacher = FAMILIES[family](4)
    student = cut_layers(teacher, 4).eval()
    with torch.no_grad():
        assert torch.equal(student(IDS).logits, teacher(IDS, use_cache=False).logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kept", [[0, 3], [1, 2, 3]])
def test_a_cut_is_the_teacher_without_the_other_layers(family, kept, tmp_path):
    teacher, student = FAMILIES[family](4), cut_layers(FAMILIES[family](4), kept)
    assert student.training
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert student.config.num_hidden_layers == len(kept)
    with torch.no_grad():
        logits = student.eval()(IDS).logits
        for index, layer in enumerate(layers_of(teacher)):  # the others become the identity
            if index not in kept:
                layer.forward = lambda hidden, *_, **__: hidden
        torch.testing.assert_close(logits, teacher(IDS, use_cache=False).logits, rtol=1e-6, atol=1e-6)
        student.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(again(IDS, use_cache=False).logits, logits)
    indices = [module.layer_idx for module in layers_of(student).modules() if hasattr(module, "layer_idx")]
    assert sorted(set(indices)) == list(range(len(kept)))


def test_a_cut_shares_nothing_with_the_teacher():
    teacher = tiny.tiny_llama(num_hidden_layers=4, tie_word_embeddings=True).requires_grad_(False)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = cut_layers(teacher, 2)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert len(layers_of(teacher)) == teacher.config.num_hidden_layers == 4
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert student.lm_head.weight is student.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("layers", "expected"), [(1, [0]), (2, [0, 29]), (4, [0, 10, 19, 29]), (10, [0, 3, 6, 10, 13, 16, 19, 23, 26, 29])]
)
def test_layers_are_spread_evenly(layers, expected):
    teacher = tiny.tiny_llama(num_hidden_layers=30, hidden_size=4, intermediate_size=4)
    for index, layer in enumerate(teacher.model.layers):
        torch.nn.init.constant_(layer.input_layernorm.weight, index)
    student = cut_layers(teacher, layers)
    assert [int(layer.input_layernorm.weight[0]) for layer in student.model.layers] == expected


@pytest.mark.parametrize("layers", [0, 5, [], [0, 4], [-1, 2], [2, 1], [1, 1]])
def test_layers_that_are_not_there(layers):
    with pytest.raises(UserError, match=r"^model.student_layers: "):
        cut_layers(tiny.tiny_llama(num_hidden_layers=4), layers)


def test_a_rhythm_that_the_configuration_cannot_describe():
    teacher = tiny.tiny_qwen3_moe(num_hidden_layers=4, decoder_sparse_step=2)  # layers 1 and 3 are MoE
    with pytest.raises(UserError, match=r"layers \[1, 3\] alternate"):
        cut_layers(teacher, [1, 3])
    assert cut_layers(teacher, [0, 1]).config.num_hidden_layers == 2


def tokenizer_of(*tokens: str, special: str | None = None):
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special)


def test_vocabularies_may_differ_in_padding_and_special_names():
    check_vocabularies(tokenizer_of("a", "b", "c"), tokenizer_of("a", "b"))
    check_vocabularies(tokenizer_of("a", "<x>", "b", special="<x>"), tokenizer_of("a", "<y>", "b", special="<y>"))


def test_vocabularies_whose_ids_mean_other_tokens_are_refused():
    with pytest.raises(
        UserError, match=r"^model.student: .* in 2 ids \(id 1 is 'b' for the teacher, 'c' .*leave model.vocabulary on"
    ):
        check_vocabularies(tokenizer_of("a", "b", "c"), tokenizer_of("a", "c", "b"))


def test_context_of_families():
    assert max_context(tiny.tiny_llama().config) == max_context(tiny.tiny_gpt2().config) == 64
    assert max_context(load_config({"model_type": "bloom"})) is None


def tiny_opt():
    sizes = {"vocab_size": 64, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    extra = {"word_embed_proj_dim": 16, "max_position_embeddings": 64, "init_std": 0.3}
    return tiny.build("OPTForCausalLM", "OPTConfig", sizes | extra)


@pytest.mark.parametrize("family", [*FAMILIES, "mixtral", "olmoe"])
def test_packing_works_where_documents_are_kept_apart(family):
    model = FAMILIES[family](4) if family in FAMILIES else getattr(tiny, f"tiny_{family}")()
    check_packing(model)
    assert not model.training


@pytest.mark.parametrize("build", [tiny.tiny_gpt_oss, tiny_opt])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_is_refused_where_documents_see_each_other(build, dtype):
    with pytest.raises(UserError, match=r"^model.teacher: in packed rows .* set data.packing to false"):
        check_packing(build().to(dtype))
