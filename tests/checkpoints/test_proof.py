"""A student that is loaded from a checkpoint is the one that was trained, or is refused: nothing else is written."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from distill.checkpoints.contents import plain
from distill.checkpoints.proof import LENGTH, proof, prove
from distill.checkpoints.students import load_student, restore
from distill.commands.evaluate import evaluate
from distill.commands.export import export
from distill.errors import UserError
from distill.models.load import load_model
from distill.models.lora import LoRA
from helpers.finished_run import finished_run
from helpers.tiny import tiny_deepseek_v3, tiny_gemma, tiny_gpt2, tiny_llama, tiny_qwen3_moe


def described(model: PreTrainedModel, lora: LoRA | None) -> dict:
    return {
        "config": plain(model.config.to_dict()),
        "generation_config": plain(model.generation_config.to_dict()),
        "lora": asdict(lora) if lora is not None else None,
    }


def state_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {f"student.{name}": value for name, value in model.state_dict().items()}


def untied_against_its_configuration(tmp_path: Path) -> PreTrainedModel:
    """Whose config.json says tied and whose file has two different tensors, as some on the hub are."""
    model = tiny_llama(tie_word_embeddings=False)
    model.config.tie_word_embeddings = True
    model.save_pretrained(tmp_path / "untied")
    return load_model(str(tmp_path / "untied"))


@pytest.mark.parametrize(
    ("build", "targets"),
    [
        (lambda _: tiny_gpt2(), "all-linear"),
        (lambda _: tiny_gemma(), ["embed_tokens", "o_proj"]),
        (lambda _: tiny_gemma(tie_word_embeddings=True), "all-linear"),
        (lambda _: tiny_qwen3_moe(), "all-linear"),
        (lambda _: tiny_deepseek_v3(), ["kv_a_proj_with_mqa", "down_proj"]),
        (untied_against_its_configuration, "all-linear"),
    ],
    ids=["transposed weights", "scaled embeddings", "tied", "experts", "latent attention", "untied all the same"],
)
def test_merged_adapters_say_what_the_trained_ones_said(build, targets, tmp_path):
    student, lora = build(tmp_path), LoRA(r=2, target_modules=targets)
    lora.add_to(student)
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
            assert "lora_" in name
    expected = proof(student, list(range(3, 3 + LENGTH)))
    merged = restore(described(student, lora), state_of(student))
    prove(merged, expected)
    merged.save_pretrained(tmp_path / "out")
    prove(load_model(str(tmp_path / "out")), expected)
    untrained = {name: value * ("lora_" not in name) for name, value in state_of(student).items()}
    with pytest.raises(UserError, match="another model than the one that was trained"):
        prove(restore(described(student, lora), untrained), expected)


def test_a_proof_leaves_modes_random_numbers_and_precision_alone():
    student = tiny_llama(attention_dropout=0.5).train()
    student.model.layers[0].eval()
    modes = [module.training for module in student.modules()]
    torch.set_float32_matmul_precision("medium")
    before = torch.get_rng_state()
    first = proof(student, [])
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in student.modules()] == modes
    assert torch.get_float32_matmul_precision() == "medium"
    assert torch.equal(first["logits"], proof(student.eval(), [])["logits"])
    assert first["logits"].shape == (LENGTH, len(first["vocabulary"]) + 1)


def test_the_log_sum_exp_sees_ids_that_were_not_chosen():
    """A head that differs in one row of a vocabulary of which the proof looks at a few."""
    student = tiny_llama(vocab_size=500)
    expected = proof(student, [])
    other = next(index for index in range(500) if index not in expected["vocabulary"])
    student.lm_head.weight.data[other] += 3.0
    with pytest.raises(UserError, match="another model"):
        prove(student, expected)


def test_rounding_to_16_bits_is_allowed_and_overflow_is_named():
    student = tiny_llama()
    expected = proof(student, [])
    prove(load_cast(student, torch.bfloat16), expected)
    student.model.norm.weight.data *= 1e6
    with pytest.raises(UserError, match=r"not finite in float16; give --dtype bfloat16 or float32"):
        prove(load_cast(student, torch.float16), proof(student, []))


def load_cast(student: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    return restore(described(student, None), state_of(student), dtype)


@pytest.fixture(scope="module")
def run(assets, tmp_path_factory):
    return finished_run(assets, tmp_path_factory.mktemp("run"))


def test_a_checkpoint_keeps_a_row_of_the_run(run):
    path, cli = run
    expected = torch.load(path, weights_only=True)["distill"]["student"]["proof"]
    row = cli.datamodule.validation_rows[0]["input_ids"][:LENGTH].tolist()
    assert expected["input_ids"] == row
    assert {*row} <= {*expected["vocabulary"]}
    with torch.no_grad():
        logits = cli.model.student.eval()(torch.tensor([row])).logits[0]
    torch.testing.assert_close(expected["logits"][:, :-1], logits[:, expected["vocabulary"]])
    torch.testing.assert_close(expected["logits"][:, -1], logits.logsumexp(-1))


@pytest.mark.parametrize("what", ["a weight", "the configuration"])
def test_another_model_is_neither_exported_nor_evaluated(run, tmp_path, what):
    checkpoint = torch.load(run[0], weights_only=True)
    if what == "a weight":
        checkpoint["state_dict"]["student.model.layers.1.mlp.up_proj.weight"] *= 1.3
    else:
        checkpoint["distill"]["student"]["config"]["rms_norm_eps"] = 0.5
    torch.save(checkpoint, tmp_path / "other.ckpt")
    source, out = str(tmp_path / "other.ckpt"), tmp_path / "here" / "out"
    with pytest.raises(UserError, match=r"^checkpoint: loaded again, it is another model than the one that was train"):
        export(source, str(out))
    with pytest.raises(UserError, match=r"^student: loaded again, it is another model"):
        evaluate(source, teacher=run[1].model.teacher_source, text="none.txt")
    assert [item.name for item in tmp_path.iterdir()] == ["other.ckpt"]
    del checkpoint["distill"]["student"]["proof"]  # as earlier versions wrote them
    torch.save(checkpoint, source)
    assert load_student(source).model.config.model_type == "llama"


def test_a_folder_that_reads_back_as_another_model_is_not_left(run, tmp_path, monkeypatch):
    true = PreTrainedModel.save_pretrained

    def save_half(self, folder, **options):
        self.model.layers[0].self_attn.o_proj.weight.data.zero_()
        true(self, folder, **options)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_half)
    with pytest.raises(UserError, match=r"^folder: loaded again, it is another model"):
        export(run[0], str(tmp_path / "deep" / "out"))
    assert list(tmp_path.iterdir()) == []


def test_a_run_with_coarse_products_is_compared_in_whole_ones():
    """On units for bf16 `matmul_precision: medium` rounds each product by more than a proof allows."""
    model, seen = tiny_llama(), []
    model.register_forward_hook(lambda *_: seen.append(torch.get_float32_matmul_precision()))
    model.get_decoder().register_forward_hook(lambda *_: seen.append(torch.get_float32_matmul_precision()))
    torch.set_float32_matmul_precision("medium")
    prove(model, proof(model, [3, 4, 5]))
    assert set(seen) == {"highest"}
    assert torch.get_float32_matmul_precision() == "medium"
