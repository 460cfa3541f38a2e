"""Other students and teachers: low-rank adapters, layers cut by importance, an int8 teacher, compiled models."""

from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import log_of
from distill.commands.export import export
from distill.errors import UserError
from distill.models.cut import most_important_layers
from distill.models.lora import LoRA
from distill.teachers.online import quantize
from helpers.tiny import tiny_llama
from helpers.training_log import parse


def test_lora_trains_adapters_only_and_exports_a_plain_model(config, distill, assets, tmp_path):
    config["model"] |= {"lora": {"r": 4, "target_modules": ["q_proj", "down_proj"]}, "learning_rate": 1e-2}
    cli = distill("fit", config, "--trainer.max_steps", "6")
    student = cli.model.student
    trained = [name for name, p in student.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 2  # two layers x two matrices x A and B
    assert all("lora_" in name for name in trained)
    start = AutoModelForCausalLM.from_pretrained(assets / "llama")
    torch.testing.assert_close(student.model.embed_tokens.weight, start.model.embed_tokens.weight, rtol=0, atol=0)
    assert max(float(p.detach().abs().max()) for name, p in student.named_parameters() if "lora_B" in name) > 0
    raw = [block.values["raw"] for block in parse(log_of(cli)) if block.kind == "KD LOSS"]
    assert raw[-1] < raw[0]

    folder = tmp_path / "exported"
    export(str(cli.trainer.log_dir) + "/checkpoints/last.ckpt", str(folder))
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert not any("lora" in name for name, _ in plain.named_parameters())
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, student.eval()(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_lora_run_resumes(config, distill):
    config["model"]["lora"] = {"r": 2}
    config["trainer"] |= {"val_check_interval": 3, "max_steps": 6}
    whole = distill("fit", config, "--checkpoint.init_args.save_top_k", "-1")
    at_three = f"{whole.trainer.log_dir}/checkpoints/step=3.ckpt"
    resumed = distill("fit", config, "--ckpt_path", at_three)
    for name, value in whole.model.student.state_dict().items():
        assert torch.equal(resumed.model.student.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "model.lora.r: 0"),
        ({"lora_alpha": -1.0}, "model.lora.lora_alpha: -1.0"),
        ({"lora_dropout": 1.0}, "model.lora.lora_dropout: 1.0"),
    ],
)
def test_lora_options_that_cannot_be_meant(options, message):
    with pytest.raises(UserError, match=message):
        LoRA(**options)


def test_lora_without_a_matching_layer():
    with pytest.raises(UserError, match=r"model\.lora\.target_modules: nothing"):
        LoRA(target_modules="nothing").add_to(tiny_llama())


def test_lora_of_the_head_is_refused():
    with pytest.raises(UserError, match=r"model\.lora\.target_modules: .*lm_head.* names the head"):
        LoRA(target_modules=["q_proj", "lm_head"]).add_to(tiny_llama())


def test_importance_is_one_minus_the_cosine_across_a_layer():
    model, ids = tiny_llama(num_hidden_layers=5).requires_grad_(False), torch.arange(24).view(2, 12)
    states = model(ids, output_hidden_states=True).hidden_states
    # The last entry of hidden_states is behind the final norm: the last layer's own output is taken from a hook.
    kept = []
    handle = model.model.layers[-1].register_forward_hook(lambda module, args, output: kept.append(output))
    model(ids)
    handle.remove()
    last = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
    pairs = [*pairwise(states[:-1]), (states[-2], last)]
    influence = []
    for before, after in pairs:
        cosines = [
            float(b @ a / (b.norm() * a.norm())) for b, a in zip(before.view(-1, 16), after.view(-1, 16), strict=True)
        ]
        influence.append(1 - sum(cosines) / len(cosines))
    expected = sorted(sorted(range(5), key=lambda i: -influence[i])[:3])
    assert most_important_layers(model, 3, ids) == expected
    with pytest.raises(UserError, match=r"model\.student_layers: 6"):
        most_important_layers(model, 6, ids)


def test_a_student_of_the_most_important_layers_trains(config, distill):
    config["model"]["student_layers_by"] = "importance"
    cli = distill("fit", config, "--trainer.max_steps", "2")
    rows = cli.datamodule.train_rows
    ids = torch.stack([torch.as_tensor(rows[i]["input_ids"]) for i in range(8)])
    assert len(cli.model.student.model.layers) == 2
    kept = most_important_layers(cli.model.teacher.model, 2, ids)
    assert kept == sorted(kept)


def test_an_int8_teacher_is_close_to_itself(config, distill):
    pytest.importorskip("torchao")
    teacher, ids = tiny_llama(hidden_size=64, intermediate_size=128), torch.arange(24).view(2, 12)
    with torch.no_grad():
        exact = teacher(ids).logits
        quantize(teacher)
        rounded = teacher(ids).logits
    error = float((rounded - exact).norm() / exact.norm())
    assert 1e-5 < error < 0.05
    cli = distill("fit", config | {"model": config["model"] | {"teacher_quantization": "int8", "routing": None}})
    assert "Int8" in type(cli.model.teacher.model.model.layers[0].mlp.up_proj.weight).__name__
    assert type(cli.model.teacher.model.lm_head.weight) is torch.nn.Parameter


def test_compiled_models_and_losses_on_layers_exclude_each_other(config, distill):
    config["model"]["torch_compile"] = True
    with pytest.raises(UserError, match=r"model.torch_compile: true"):
        distill("fit", config)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_compiled_models_give_the_same_losses(config, distill):
    config["model"]["routing"] = None
    config["trainer"]["max_steps"] = 2
    eager = distill("fit", config)
    config["model"]["torch_compile"] = True
    compiled = distill("fit", config)
    ours, theirs = (
        [block.values["raw"] for block in parse(log_of(cli)) if block.kind == "KD LOSS"] for cli in (compiled, eager)
    )
    assert len(ours) == 2
    assert ours == pytest.approx(theirs, rel=1e-4)
