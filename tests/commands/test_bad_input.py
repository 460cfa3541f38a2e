"""What a user can get wrong: one line that names key, value and remedy, exit code 2, and nothing left on the disk."""

import json
import logging
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml

from distill.models.load import load_tokenizer
from helpers.chat_templates import PLAIN, UNSTABLE


def edit(config: dict, path: str, value) -> None:
    *parents, last = path.split(".")
    for key in parents:
        config = config.setdefault(key, {})
    config[last] = value


@pytest.fixture
def refused(config, tmp_path, monkeypatch, capfd):
    """Runs the console script's function and returns the one line that it printed on stderr."""
    from distill.cli import main

    def call(*args: str, subcommand: str = "fit") -> str:
        monkeypatch.setattr(logging, "raiseExceptions", False)  # Lightning's handlers hold another test's stderr
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        monkeypatch.setattr("sys.argv", ["distill", subcommand, "--config", str(path), *args])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            main()
        assert exit_info.value.code == 2
        captured = capfd.readouterr()
        assert "Traceback" not in captured.err + captured.out
        errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, captured.err
        assert captured.err.rstrip().endswith(errors[0]), "the error is one line, and the last"
        assert not list(tmp_path.glob("lightning_logs/version_*")), "a refused run leaves no directory"
        return errors[0]

    return call


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.learning_rat", 1e-3, r"model.learning_rat.*did you mean 'model.learning_rate'"),
        ("trainer.max_step", 3, r"trainer.max_step.*did you mean 'trainer.max_steps'"),
        ("curriculm", {"kd": 1.0}, r"curriculm.*did you mean 'curriculum.kd'"),
        ("model.routing.losses", {"feature_matching": 1.0}, r"feature_matching.*did you mean 'feature_matching_loss'"),
        (
            "model.kd_loss",
            {"divergence": "forwardkl"},
            r"model.kd_loss.divergence: forwardkl is not one of 'forward_kl'",
        ),
        ("model.kd_loss", {"bta": 0.1}, r"model.kd_loss.bta: there is no such key; did you mean 'beta'"),
        ("model.kd_loss", "jsd", r"model.kd_loss: jsd is no section; give its keys"),
        ("model.routing.tau", "x", r"^error: model.routing.tau: x is no float$"),
        ("model.routing.num_experts", 1.5, r"^error: model.routing.num_experts: 1.5 is no int$"),
        ("model.betas", 3, r"^error: model.betas: 3 is no list$"),
        ("model.lm_loss", "maybe", r"^error: model.lm_loss: maybe is no bool$"),
        ("model.student_layers", "x", r"^error: model.student_layers: x is no int or list$"),
        ("model.teacher_top_k", "x", r"^error: model.teacher_top_k: x is no int, nor one of 'native', 'all'$"),
        ("trainer.max_steps", "ten", r"^error: trainer.max_steps: ten is no int$"),
        ("trainer.strategy", "ddq", r"^error: trainer: .*invalid strategy name"),
        (
            "trainer.logger",
            "Nothing",
            r"^error: trainer.logger: Nothing is no class of that name; give its import path$",
        ),
        ("trainer.logger", {"class_path": "CSVLogger"}, r"^error: trainer.logger.save_dir: required; give it in the"),
        (
            "early_stopping",
            {"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss", "mode": "up"}},
            r"^error: [^(]*up[^(]*$",
        ),
        ("audit", {"on_nonfinite": "ignore"}, r"audit.on_nonfinite: ignore is not one of 'stop', 'skip'"),
        ("curriculum.layerwise", 0.1, r"curriculum.layerwise: 0.1 weighs nothing here: configure layerwise_loss"),
        ("curriculum.kd", -0.5, r"curriculum.kd: -0.5 is out of range: give values at least 0"),
        ("curriculum.temperature", 0.0, r"curriculum.temperature: 0.0 is out of range: give values above 0"),
        ("curriculum.feature", [[0.6, 0.1], [0.3, 0.0]], r"curriculum.feature: knots out of order"),
        ("curriculum.top_k_experts", 9, r"curriculum.top_k_experts: 9 is above the teacher's 4 experts"),
        ("train_debug.every_n_batches", 0, r"train_debug.every_n_batches: 0: give at least 1"),
        ("model.student", "elsewhere", r"model.student: 2 of student, student_layers and student_config are given"),
        ("model.student_layers", 9, r"model.student_layers.*9.*4 layers"),
        ("model.betas", [1.5, 2.0], r"model.betas: .1.5, 2.0. must lie in"),
        ("model.routing.tau", -1.0, r"model.routing.tau: -1.0"),
        ("model.routing.student_layers", [0, 99], r"model.routing.student_layers: 99 is not a layer"),
        ("curriculum.kd", [0.3, 0.1], r"curriculum.kd: .*given: \[0.3, 0.1\]"),
        (
            "trainer.val_check_interval",
            100000,
            r"^error: trainer.val_check_interval: 100000 micro-batches .* epoch's \d+; set .*epoch: null",
        ),
        ("trainer.max_epochs", 0, r"^error: trainer.max_epochs: 0 leaves nothing to train; give at least 1, or leave"),
        ("trainer.max_steps", 0, r"^error: trainer.max_steps: 0 leaves nothing to train"),
        ("trainer.limit_train_batches", 0, r"^error: trainer.limit_train_batches: 0 leaves nothing to train"),
        ("trainer.limit_train_batches", 0.0, r"^error: trainer.limit_train_batches: 0 leaves nothing to train"),
        ("trainer.accumulate_grad_batches", 0, r"^error: trainer.accumulate_grad_batches: 0; give at least 1$"),
        ("trainer.accumulate_grad_batches", -2, r"^error: trainer.accumulate_grad_batches: -2; give at least 1$"),
        ("trainer.check_val_every_n_epoch", 0, r"^error: trainer.check_val_every_n_epoch: 0; give at least 1$"),
        (
            "trainer.val_check_interval",
            0,
            r"^error: trainer.val_check_interval: 0; give micro-batches or a share of",
        ),
        ("trainer.val_check_interval", 0.0, r"^error: trainer.val_check_interval: 0; give micro-batches or a share"),
        ("trainer.gradient_clip_val", -1.0, r"^error: trainer.gradient_clip_val: -1.0 must be above 0 \(null = not"),
        ("trainer.gradient_clip_val", float("nan"), r"^error: trainer.gradient_clip_val: nan must be above 0"),
        ("trainer.max_epochs", 2e9, r"^error: trainer.max_epochs: 2000000000.0 is no int$"),
        ("trainer.callbacks", [{"class_path": "lightning.Nothing"}], r"no attribute 'Nothing'; give its import path$"),
        (
            "early_stopping",
            {"class_path": "EarlyStopping", "init_args": {"monitor": "val/kl_dv_T1"}},
            r"^error: early_stopping.monitor: val/kl_dv_T1 is not among what .*; did you mean 'val/kl_div_T1'\?$",
        ),
        (
            "checkpoint.init_args.monitor",
            "val/top9",
            r"^error: checkpoint.monitor: val/top9 is not among what this",
        ),
        ("trainer.barebones", True, r"^error: trainer.barebones: true has neither loggers, nor .*; leave it out"),
        (
            "trainer.default_root_dir",
            "config.yaml",  # a file, so no directory can be made in it
            r"^error: trainer.default_root_dir: config.yaml/lightning_logs/version_0 can't be written \(Not a dir",
        ),
        (
            "checkpoint",
            {"class_path": "ModelCheckpoint", "init_args": {"dirpath": "config.yaml/best"}},
            r"^error: checkpoint.dirpath: .*config.yaml/best can't be written \(Not a directory\); name another place",
        ),
        (
            "trainer.logger",
            {"class_path": "CSVLogger", "init_args": {"save_dir": "config.yaml"}},
            r"^error: trainer.logger: config.yaml can't be written \(Not a directory\); name another place",
        ),
        ("model.learning_rate", 0.0, r"model.learning_rate: 0.0 must be above 0"),
        ("data.dataset", "nowhere/at_all.txt", r"data.dataset.*nowhere/at_all.txt"),
        ("data.sequence_length", 4096, r"data.sequence_length.*4096"),
        ("data.per_device_batch_size", 0, r"data.per_device_batch_size.*0"),
        ("data.validation_split", 1.5, r"data.validation_split.*1.5"),
        ("data.format", "tokns", r"data.format: tokns is not one of 'auto', 'text'"),
        ("data.format", "messages", r"data.messages_column: 'messages' is no column of .*text.txt"),
        ("data.dataset", [{"dataset": "text.txt", "weight": 0}], r"data.dataset\[0\].weight: 0 must be above 0"),
        ("data.dataset", [{"dataset": "text.txt", "wieght": 1}], r"data.dataset\[0\].wieght: .*did you mean 'weight'"),
        ("data.group_by_length", True, r"data.group_by_length: true with data.packing true"),
        ("data.chat_template", "none.jinja", r"data.chat_template: 'none.jinja' is neither"),
        ("model.teacher", "package://no_such_package/file", r"model.teacher.*no_such_package.*pip install"),
        ("model.teacher", "./no_such_folder", r"model.teacher.*no_such_folder"),
    ],
)
def test_one_line_names_key_value_and_remedy(config, refused, path, value, message):
    edit(config, path, value)
    assert re.search(message, refused())


@pytest.mark.parametrize("command", ["validate", "test"])
def test_a_measurement_of_no_rows(config, refused, command):
    key = {"validate": "limit_val_batches", "test": "limit_test_batches"}[command]
    config["trainer"][key] = 0
    line = refused(subcommand=command)
    assert line == f"error: trainer.{key}: 0 leaves nothing to measure; give at least 1, or leave it out"


def test_a_configuration_in_another_encoding(refused, tmp_path):
    (tmp_path / "old.yaml").write_bytes("data: {dataset: früher.txt}\n".encode("latin-1"))
    line = refused("--config", str(tmp_path / "old.yaml"))
    assert re.fullmatch(r"error: config: a configuration is no UTF-8 text \(.*\); save it as UTF-8", line)


def test_a_seed_that_is_none(config, refused):
    config["seed_everything"] = -1
    assert refused() == "error: seed_everything: -1 is out of range; give 0 to 4294967295"


def test_tokens_that_were_added_to_a_tokenizer_and_not_to_its_model(config, refused, assets, tmp_path):
    """The text holds one of them."""
    teacher = shutil.copytree(assets / "llama", tmp_path / "teacher")
    tokenizer = load_tokenizer(str(teacher))
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(teacher)
    (tmp_path / "text.txt").write_text((assets / "text.txt").read_text().replace(" the ", " <more> "))
    config["model"]["teacher"], config["data"]["dataset"] = str(teacher), str(tmp_path / "text.txt")
    assert refused().startswith(
        "error: data.tokenizer: it made ids that are none of a model's: it has more tokens than"
    )


def test_null_is_named_where_a_callback_is_switched_off_by_another_word(refused):
    assert refused("--train_debug", "false") == "error: train_debug: false is no section; give its keys, or null"


def test_a_key_on_the_command_line_is_not_abbreviated(refused):
    line = refused("--trainer.max_step", "4")
    assert line == "error: trainer.max_step: there is no such key; did you mean 'trainer.max_steps'?"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["foo"], "foo: there is no such command; choose from fit, check, validate, test, cache, diagnose, .*"),
        (["chek"], "chek: there is no such command; did you mean 'check'\\?"),
        (["check"], "model.teacher: required, like data.dataset; give it in the configuration file or .*"),
        (["fit", "--model.teacher", "x"], "data.dataset: required; give it in the configuration file or .*"),
        (["export", "a.ckpt", "folder", "--dtyp", "float32"], "--dtyp: there is no such argument; see .*"),
    ],
)
def test_what_is_no_command_or_not_all_of_one(monkeypatch, capsys, arguments, line):
    from distill.cli import main

    monkeypatch.setattr("sys.argv", ["distill", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == 2
    assert re.fullmatch(f"error: {line}\n", capsys.readouterr().err)


def test_no_command_prints_them_all(monkeypatch, capsys):
    from distill.cli import COMMANDS, TRAINER, main

    monkeypatch.setattr("sys.argv", ["distill"])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == 2
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in TRAINER | COMMANDS)


def test_a_run_without_an_end(config, refused):
    config["trainer"] |= {"max_steps": -1, "max_epochs": -1}
    assert "trainer.max_steps: a horizon of inf steps" in refused()


def test_a_refusal_deletes_no_directory_that_was_there_before(config, distill, refused, tmp_path):
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": ".", "name": "own"}}
    config["trainer"] |= {"max_steps": 2, "logger": logger}
    logger["init_args"]["version"] = "kept"
    distill("fit", config)
    before = sorted(tmp_path.glob("own/kept/**/*"))
    config["data"]["text_column"] = "no_such_column"
    config["data"]["dataset"] = str(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "a"}) + "\n")
    refused(subcommand="validate")
    assert sorted(tmp_path.glob("own/kept/**/*")) == before


@pytest.mark.parametrize(
    ("callback", "options", "remedy"),
    [
        ("GradientAccumulationScheduler", {"scheduling": {0: 4, 3: 1}}, "set trainer.accumulate_grad_batches"),
        ("StochasticWeightAveraging", {"swa_lrs": 0.01}, "take EMAWeightAveraging"),
        ("LearningRateFinder", {}, "set model.learning_rate"),
        ("BatchSizeFinder", {}, "set data.per_device_batch_size"),
        ("ModelPruning", {"pruning_fn": "random_unstructured", "amount": 0.3}, "leave it out"),
        ("BackboneFinetuning", {}, "leave it out, or use model.lora"),
    ],
)
def test_callbacks_that_would_bend_the_run_are_refused_by_name(config, refused, callback, options, remedy):
    config["trainer"]["callbacks"] = [{"class_path": f"lightning.pytorch.callbacks.{callback}", "init_args": options}]
    assert re.fullmatch(rf"error: trainer.callbacks: {callback} .*; {remedy}.*", refused())


def test_checkpoints_that_are_written_some_time_later(config, refused):
    config["trainer"]["plugins"] = [{"class_path": "lightning.pytorch.plugins.AsyncCheckpointIO"}]
    assert re.search(r"trainer.plugins: AsyncCheckpointIO has written .*; leave it out", refused())


@pytest.mark.skipif(find_spec("transformer_engine") is not None, reason="the package is there")
def test_a_precision_whose_package_is_missing(refused):
    assert refused("--trainer.precision", "transformer-engine").startswith("error: trainer.precision: Requirement 'tr")


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_experts_in_64_bits(config, refused, assets, side):
    config["model"]["routing"] = None
    if side == "student":
        del config["model"]["student_layers"]
    config["model"][side] = str(assets / "qwen3_moe")
    config["trainer"]["precision"] = "64-true"
    assert re.search(r"trainer.precision: 64-true, but the experts of Qwen3Moe.*; use 32-true", refused())


def test_experts_asked_of_a_moe_teacher_that_has_others(config, refused, assets):
    config["model"] |= {"teacher": str(assets / "qwen3_moe"), "routing": {"num_experts": 5}}
    line = refused()
    assert "num_experts: 5" in line


def test_column_that_is_not_there(config, refused, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"body": "some text here"}) for _ in range(50)))
    config["data"]["dataset"] = str(tmp_path / "rows.jsonl")
    line = refused()
    assert "data.text_column" in line
    assert "body" in line


def test_empty_data(config, refused, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    config["data"]["dataset"] = str(tmp_path / "empty.txt")
    assert "data.dataset" in refused()


def test_all_labels_masked(config, refused, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": ""}) for _ in range(50)))
    config["data"]["dataset"] = str(tmp_path / "rows.jsonl")
    assert "data." in refused()


def chats(config: dict, path: Path, *messages: tuple[str, str]) -> None:
    """Makes the data 50 times one conversation of (role, content)."""
    row = {"messages": [{"role": role, "content": content} for role, content in messages]}
    path.write_text((json.dumps(row) + "\n") * 50)
    config["data"]["dataset"] = str(path)


def test_conversations_without_a_template(config, refused, tmp_path):
    chats(config, tmp_path / "chats.jsonl", ("user", "question"), ("assistant", "answer"))
    assert re.search(
        r"data.chat_template: null, and the tokenizer .*llama' has none of its own; give a Jinja", refused()
    )


def test_conversations_without_an_answer(config, refused, tmp_path):
    chats(config, tmp_path / "chats.jsonl", ("user", "question"))
    config["data"]["chat_template"] = PLAIN
    assert "data.dataset: all labels of 50 documents are masked (no completion" in refused()


def test_a_template_whose_completions_cannot_be_told(config, refused, tmp_path):
    thinking = ("assistant", "<think>first</think>answer")
    chats(config, tmp_path / "chats.jsonl", ("user", "question"), thinking, ("user", "again"), thinking)
    config["data"] |= {"chat_template": UNSTABLE, "sequence_length": 64}
    assert re.search(
        r"data.chat_template: .*chats.jsonl, row 1, .*message 2 .*data.completion_only_loss to false", refused()
    )


def test_streams_without_an_end_or_a_choice(config, refused):
    config["data"]["streaming"] = True
    config["trainer"] |= {"max_steps": -1, "max_epochs": 1}
    assert "data.streaming: true gives data without an end; set trainer.max_steps" in refused()
    config["trainer"]["max_steps"] = 3
    config["data"]["max_sequences"] = 10
    assert "data.max_sequences: 10 of a stream is unknown; limit trainer.max_steps instead" in refused()
    del config["data"]["max_sequences"]
    config["data"]["dataset"] = [{"dataset": config["data"]["dataset"]}] * 2
    assert "data.dataset: streams have no known length to be mixed by; give every part a weight" in refused()


def test_a_stream_of_which_nothing_is_held_out(config, refused):
    """One document, which is not among the held out ones."""
    config["data"]["streaming"] = True
    assert re.search(r"data.validation_split: 0.05 of the stream holds no rows; give a larger fraction", refused())


def test_another_tokenizer_without_bytes(config, refused, assets, tmp_path):
    folder = tmp_path / "student"
    shutil.copytree(assets / "llama", folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = {"[UNK]": 0, "a": 1, "b": 2}
    tokenizer |= {"model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}, "added_tokens": []}
    tokenizer |= {"pre_tokenizer": {"type": "Whitespace"}, "decoder": None, "post_processor": None}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    del config["model"]["student_layers"]
    config["model"]["student"] = str(folder)
    assert "(WordLevel) has no byte form; give a tokenizer of" in refused()


def test_pickled_weights(config, refused, assets, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(assets / "llama", folder)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    config["model"]["teacher"] = str(folder)
    assert "allow_pickle: true" in refused()


def test_remote_code(config, refused, assets, tmp_path):
    folder = tmp_path / "remote"
    shutil.copytree(assets / "llama", folder)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnLM"}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text("raise SystemExit('ran')")
    config["model"]["teacher"] = str(folder)
    assert "trust_remote_code: true" in refused()


def test_truncated_weights(config, refused, assets, tmp_path):
    folder = tmp_path / "truncated"
    shutil.copytree(assets / "llama", folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    config["model"]["teacher"] = str(folder)
    assert "truncated" in refused()


@pytest.fixture
def checkpoint(config, distill, tmp_path) -> Path:
    """A checkpoint of two steps outside any run directory."""
    config["trainer"]["max_steps"] = 2
    cli = distill("fit", config)
    path = tmp_path / "two.ckpt"
    shutil.copy(Path(cli.trainer.log_dir, "checkpoints", "last.ckpt"), path)
    shutil.rmtree(tmp_path / "lightning_logs")
    return path


def test_bad_checkpoints(config, refused, checkpoint, tmp_path):
    assert "does not exist" in refused("--ckpt_path", "nowhere.ckpt")
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(checkpoint.read_bytes()[:2000])
    assert "truncated" in refused("--ckpt_path", str(cut))
    content = torch.load(checkpoint, weights_only=True)
    newer = content | {"distill": content["distill"] | {"format": 99}}
    torch.save(newer, tmp_path / "newer.ckpt")
    assert "format 99 is newer" in refused("--ckpt_path", str(tmp_path / "newer.ckpt"))
    torch.save({k: v for k, v in content.items() if k != "distill"}, tmp_path / "alien.ckpt")
    assert "no checkpoint of distill" in refused("--ckpt_path", str(tmp_path / "alien.ckpt"), subcommand="validate")
    config["model"]["student_layers"] = 3
    assert "student_layers 2 -> 3" in refused("--ckpt_path", str(checkpoint))


def test_vocabulary_padding_is_no_error(config, distill, assets):
    del config["model"]["student_layers"]
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config["model"]["student_config"] = {"model_type": "llama", "vocab_size": 384, **sizes}
    config["trainer"]["max_steps"] = 2
    metrics = distill("fit", config).trainer.callback_metrics
    assert torch.isfinite(metrics["val/loss"])
