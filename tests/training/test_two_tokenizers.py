"""Runs of a student whose tokenizer is not the teacher's, from the command line to checkpoint and resume."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from transformers import PreTrainedTokenizerFast

from distill.checkpoints.students import load_student
from distill.errors import UserError
from helpers.chat_templates import PLAIN
from helpers.two_ranks import assert_same, fit
from helpers.two_tokenizers import pair_config, write_pair


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    write_pair(folder)
    return folder


@pytest.fixture
def config(models, tmp_path, monkeypatch) -> dict:
    monkeypatch.chdir(tmp_path)
    return pair_config(models)


def validations(cli) -> list[dict[str, str]]:
    with Path(cli.trainer.log_dir, "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row.get("val/loss")]


def weights(cli) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in cli.model.student.parameters()])


def test_a_student_learns_from_a_teacher_with_another_tokenizer(distill, config, capsys, caplog):
    caplog.set_level("INFO")
    cli = distill("fit", config)
    first, *_, last = validations(cli)
    assert float(last["val/kl_div_T1"]) < 0.9 * float(first["val/kl_div_T1"])
    assert float(last["val/bits_per_byte"]) < float(first["val/bits_per_byte"])
    absent = ("val/top1_agreement", "val/top5_agreement", "val/acceptance", "val/teacher_perplexity")
    assert not [name for name in absent if last.get(name)]
    assert re.search(r"reads them as [\d,]+ tokens and says something of 9\d\.\d% of the targets; 0 docu", caplog.text)
    shown = capsys.readouterr().out
    assert "val/bits_per_byte" in shown
    assert "top1_agreement" not in shown
    assert "by the lowest val/bits_per_byte" in shown
    student = load_student(Path(cli.trainer.log_dir, "checkpoints", "last.ckpt"))
    assert len(student.tokenizer) == 330
    assert student.model.config.vocab_size == 330


def test_an_option_refuses_other_tokenizers(distill, config):
    config["model"]["vocabulary"] = None
    with pytest.raises(UserError, match=r"^model.vocabulary: null, .* another than the teacher's \(330 and 420 ids\)"):
        distill("fit", config)


@pytest.mark.parametrize("name", ["top1_agreement", "acceptance", "teacher_perplexity"])
def test_a_metric_that_compares_ids_is_no_monitor(distill, config, name):
    monitored = {"monitor": f"val/{name}", "mode": "min" if name.startswith("teacher") else "max"}
    config["early_stopping"] = monitored
    with pytest.raises(UserError, match=rf"^early_stopping.monitor: val/{name} compares the same ids on both sides"):
        distill("fit", config)


def test_targets_of_some_ids_are_refused(distill, config):
    config["model"]["kd_loss"] = {"top_k": 8}
    with pytest.raises(UserError, match=r"^model.kd_loss.top_k: 8, but teacher and student have different tokenizers"):
        distill("fit", config)


def test_a_split_over_micro_batches_has_the_same_gradients(distill, config):
    config["trainer"] |= {"max_steps": 3, "num_sanity_val_steps": 0}
    config["data"]["max_sequences"] = 40
    whole = weights(distill("fit", config))
    config["data"]["per_device_batch_size"] = 1
    split = weights(distill("fit", config, "--trainer.accumulate_grad_batches=4"))
    chunked = weights(distill("fit", config, "--trainer.accumulate_grad_batches=4", "--model.chunk_size=7"))
    torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-5)


def test_every_loss_on_layers_runs_and_splits(distill, config):
    config["model"] |= {
        "routing": {"teacher_layers": 1, "num_experts": 4},
        "attention": {},
        "layerwise": {},
        "contrastive": {"queue_size": 0},
    }
    config["curriculum"] = {"feature": 0.1, "attention": 0.1, "layerwise": 0.1, "contrastive": 0.0}
    config["trainer"] |= {"max_steps": 3, "num_sanity_val_steps": 0}
    config["model"]["routing"]["losses"] = {  # load balancing is a statistic of a micro-batch
        "feature_matching_loss": 1.0,
        "expert_importance_loss": 1.0,
        "attention_alignment_loss": 1.0,
    }
    whole = distill("fit", config)
    config["data"]["per_device_batch_size"] = 2
    split = distill("fit", config, "--trainer.accumulate_grad_batches=2")
    torch.testing.assert_close(weights(split), weights(whole), rtol=1e-3, atol=1e-5)
    (row,) = validations(whole)
    assert 0.2 < float(row["val/layerwise_loss"]) < 3
    assert float(row["val/attention_loss"]) > 0


def test_a_resumed_run_equals_the_unbroken_one(distill, config):
    config["trainer"] |= {"num_sanity_val_steps": 0, "max_steps": 8}
    every = {"monitor": None, "every_n_train_steps": 3, "save_top_k": -1, "filename": "at-{step}"}
    config["checkpoint"] = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": every}
    whole = weights(distill("fit", config))
    saved = Path("lightning_logs/version_0/checkpoints/at-3.ckpt")
    assert torch.equal(weights(distill("fit", config, f"--ckpt_path={saved}")), whole)


def test_streams_of_both_sides(distill, config):
    lines = Path(config["data"]["dataset"]).read_text().split("\n\n")
    Path("text.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    config["data"] |= {"dataset": "text.jsonl", "streaming": True, "max_validation_sequences": 4}
    config["trainer"] |= {"max_steps": 4}
    cli = distill("fit", config)
    first, *_, last = validations(cli)
    assert float(last["val/kl_div_T1"]) < float(first["val/kl_div_T1"])


def test_a_cache_of_hidden_states_teaches_the_same(distill, config):
    config["trainer"] |= {"max_steps": 4, "num_sanity_val_steps": 0}
    live = distill("fit", config)
    distill("cache", config, "--output", "kept")
    config["model"]["teacher"] = "kept"
    cached = distill("fit", config)
    torch.testing.assert_close(weights(cached), weights(live), rtol=1e-6, atol=1e-7)
    kl = [float(validations(cli)[-1]["val/kl_div_T1"]) for cli in (cached, live)]
    assert kl[0] == pytest.approx(kl[1], rel=1e-5)


def test_mixtures_and_several_validation_sets(distill, config):
    text = Path(config["data"]["dataset"]).read_text()
    for name, part in (("one", text[:6000]), ("two", text[6000:])):
        Path(f"{name}.txt").write_text(part)
    parts = [{"dataset": "one.txt", "weight": 3}, {"dataset": "two.txt", "weight": 1}]
    config["data"] |= {"dataset": parts, "validation": {"all": 0.1, "two": {"dataset": "two.txt"}}}
    config["trainer"] |= {"max_steps": 3, "num_sanity_val_steps": 0}
    (row,) = validations(distill("fit", config))
    assert row["val/kl_div_T1"] == row["val/all/kl_div_T1"] != row["val/two/kl_div_T1"] != ""


def test_unpacked_rows_of_about_one_length(distill, config):
    config["data"] |= {"packing": False, "group_by_length": True, "sequence_length": 40}
    config["trainer"] |= {"max_steps": 3, "num_sanity_val_steps": 0}
    (row,) = validations(distill("fit", config))
    assert float(row["val/kl_div_T1"]) > 0


def test_random_weights_with_a_tokenizer_of_their_own(distill, config, models):
    del config["model"]["student"]
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config["model"] |= {
        "student_tokenizer": str(models / "student"),
        "student_config": {"model_type": "llama", **sizes, "num_key_value_heads": 2},
    }
    config["trainer"] |= {"max_steps": 3}
    cli = distill("fit", config, "--data.num_workers=2")
    student = load_student(Path(cli.trainer.log_dir, "checkpoints", "last.ckpt"))
    assert student.model.config.vocab_size == len(student.tokenizer) == 330
    assert student.model.generation_config.eos_token_id == student.tokenizer.eos_token_id


def test_conversations_by_two_templates(distill, config, models, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(models / "teacher", teacher)
    (teacher / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}"
    )
    turns = [{"role": "user", "content": "%d?"}, {"role": "assistant", "content": "the answer is %d, said the book"}]
    lines = [json.dumps({"messages": turns}).replace("%d", str(number)) for number in range(300)]
    Path("chats.jsonl").write_text("\n".join(lines))
    Path("student.jinja").write_text(PLAIN)
    config["model"]["teacher"] = str(teacher)
    config["data"] |= {
        "dataset": "chats.jsonl",
        "chat_template": "student.jinja",
        "sequence_length": 64,
        "packing": False,
    }
    first, *_, last = validations(cli := distill("fit", config))
    assert float(last["val/kl_div_T1"]) < 0.9 * float(first["val/kl_div_T1"])
    rows = cli.datamodule.train_rows
    learnt, taught = (int(rows.units_R[kind].sum()) for kind in ("tokens", "targets"))
    assert learnt == taught > 1000  # rows end within the answers, so all that is learnt is shared
    student = load_student(Path(cli.trainer.log_dir, "checkpoints", "last.ckpt"))
    assert student.tokenizer.chat_template == PLAIN


def test_a_tokenizer_for_a_student_that_is_cut_is_refused(distill, config, models):
    config["model"] |= {"student": None, "student_layers": 2, "student_tokenizer": str(models / "student")}
    with pytest.raises(UserError, match=r"^model.student_tokenizer: .* that is cut reads its teacher's tokens"):
        distill("fit", config)


def test_a_tokenizer_whose_tokens_have_no_bytes_is_one_line(distill, config, models, tmp_path):
    shutil.copytree(models / "student", tmp_path / "pieces")
    pieces = Tokenizer(WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="[UNK]").save_pretrained(tmp_path / "pieces")
    config["model"]["student"] = str(tmp_path / "pieces")
    with pytest.raises(
        UserError, match=r"^model.student: .* has no byte form; give a tokenizer of byte-level BPE"
    ) as told:
        distill("fit", config)
    assert "\n" not in str(told.value)


def test_two_ranks_equal_one_process(config, tmp_path):
    config["model"] |= {"layerwise": {}, "attention": {}, "lm_loss": False}  # so that targets look ahead
    config["model"]["learning_rate"] = 1e-3  # at which AdamW does not make much of the order of a sum
    config["curriculum"] = {"layerwise": 0.1, "attention": 0.1}
    config["trainer"] |= {"max_steps": 20, "val_check_interval": 10, "num_sanity_val_steps": 0}
    one = fit(config, tmp_path / "one")
    config["data"]["per_device_batch_size"] = 2
    for strategy in ("ddp", "fsdp2"):
        flags = ("--trainer.strategy", strategy, "--trainer.devices", "2")
        assert_same(one, fit(config, tmp_path / strategy, *flags))
