"""`distill cache`: a run learns from it what it would from the teacher, and what does not belong is refused."""

import csv
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from conftest import small_config, text_of_stdlib
from distill.commands import cache
from distill.commands.fit import run
from distill.curriculum import Schedules
from distill.errors import UserError
from distill.models.fsdp2 import FSDP2
from distill.teachers import cache_files
from distill.teachers.cache_files import read_manifest
from distill.training import cache_build
from distill.training.cache_request import Request
from helpers import two_ranks
from helpers.killed import contents, killed_at_file

SHARD = ("--shard_rows", "100")
COMMAND = ("cache", "--config", "config.yaml", "--output", "cache", *SHARD)


def plain(assets: Path) -> dict:
    """A run on vocabulary alone, whose student is cut from the teacher; temperature 2."""
    config = small_config(assets)
    config["model"]["routing"] = None
    config["trainer"] |= {"max_steps": 12, "val_check_interval": 6}
    return config


@pytest.fixture
def config(assets, tmp_path, monkeypatch) -> dict:
    monkeypatch.chdir(tmp_path)
    return plain(assets)


@pytest.fixture(scope="module")
def stored(assets, tmp_path_factory) -> dict[str, Path]:
    """Caches of that run, by their encoding."""
    folders = {}
    for name, kd in (("hidden", {}), ("top_k", {"top_k": 16}), ("sampled", {"samples": 20})):
        folder = tmp_path_factory.mktemp(name)
        config = plain(assets)
        config["model"]["kd_loss"] = kd
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["distill"])
            patch.chdir(folder)
            run([*COMMAND])
        folders[name] = folder / "cache"
    return folders


@pytest.fixture
def at(stored, config):
    """The run, learning from a cache of an encoding."""

    def changed(name: str, **model) -> dict:
        return config | {"model": config["model"] | {"teacher": str(stored[name])} | model}

    return changed


def ran(cli) -> tuple[list[dict], dict]:
    with Path(cli.trainer.log_dir, "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return rows, {name: value.clone() for name, value in cli.model.student.state_dict().items()}


def assert_same(one, other, tolerance: float):
    compared = 0
    for ours, theirs in zip(one[0], other[0], strict=True):
        for name, value in ours.items():
            if name.startswith(("train/", "val/")) and value and "tokens_per_s" not in name and "memory" not in name:
                assert float(theirs[name]) == pytest.approx(float(value), rel=tolerance, abs=tolerance), name
                compared += 1
    assert compared > 60
    for name, value in one[1].items():
        torch.testing.assert_close(other[1][name], value, rtol=tolerance, atol=tolerance)


def test_training_from_whole_states_equals_the_live_run(distill, config, at):
    live = ran(distill("fit", config))
    cached = distill("fit", at("hidden"))
    assert_same(live, ran(cached), 1e-5)
    assert all(parameter.is_meta for parameter in cached.model.teacher.model.parameters())
    thinned = {"kd_loss": {"top_k": 16, "divergence": "reverse_kl"}}  # from whole states, as a live teacher thins
    live = ran(distill("fit", config | {"model": config["model"] | thinned}))
    assert_same(live, ran(distill("fit", at("hidden", **thinned))), 1e-5)


def test_states_in_half_the_bits_are_off_by_their_rounding(distill, config, at, tmp_path):
    distill("cache", config, "--output", "half", "--dtype", "bfloat16")
    assert_same(ran(distill("fit", config)), ran(distill("fit", at("hidden", teacher=str(tmp_path / "half")))), 1e-2)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_thinned_targets_from_disk_are_those_of_the_live_teacher(distill, config, at, divergence):
    kd = {"top_k": 16, "divergence": divergence}
    live = ran(distill("fit", config | {"model": config["model"] | {"kd_loss": kd}}))
    assert_same(live, ran(distill("fit", at("top_k", kd_loss=kd))), 3e-3)  # log-probabilities in 8 bits


def test_draws_from_disk_train_and_whole_metrics_stay_exact(distill, config, at):
    live = ran(distill("fit", config | {"model": config["model"] | {"kd_loss": {"samples": 20}}}))
    cached = ran(distill("fit", at("sampled", kd_loss={"samples": 20})))
    before, after = ([row for row in rows if row["val/kl_div_T1"]] for rows, _ in (live, cached))
    assert len(before) == len(after) == 2
    for ours, theirs in zip(before, after, strict=True):  # other draws, the same teacher
        assert float(theirs["val/kl_div_T1"]) == pytest.approx(float(ours["val/kl_div_T1"]), rel=0.02)
        assert float(theirs["val/teacher_perplexity"]) == pytest.approx(float(ours["val/teacher_perplexity"]), rel=1e-5)


def test_a_cached_run_that_is_broken_off_and_resumed_is_the_unbroken_one(distill, at):
    config = at("top_k", kd_loss={"top_k": 8})  # fewer ids than the cache holds
    whole = ran(distill("fit", config))
    first = distill("fit", config, "--last_checkpoint.every_n_steps", "5")
    checkpoint = sorted(Path(first.trainer.log_dir, "checkpoints").glob("*.ckpt"))
    middle = [path for path in checkpoint if torch.load(path, weights_only=True)["global_step"] < 12]
    assert middle, checkpoint
    again = ran(distill("fit", config, "--ckpt_path", str(middle[0])))
    assert all(torch.equal(value, again[1][name]) for name, value in whole[1].items())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("hidden", {"model.routing": {"teacher_layers": 2}}, "model.routing: looks at the teacher's layers"),
        ("hidden", {"model.layerwise": {}}, "model.layerwise: looks at the teacher's layers"),
        ("hidden", {"data.sequence_length": 24}, "data.sequence_length: 24, but the cache"),
        ("hidden", {"model.teacher_quantization": "int8"}, "model.teacher_quantization: int8, but the cache"),
        ("hidden", {"model.teacher_dtype": "bfloat16"}, "model.teacher_dtype: bfloat16, but the cache"),
        ("top_k", {}, "model.kd_loss.top_k: None, but the cache .* holds 16 ids a token"),
        ("top_k", {"model.kd_loss": {"top_k": 17}}, "model.kd_loss.top_k: 17, but the cache"),
        ("sampled", {"model.kd_loss": {"samples": 21}}, "model.kd_loss.samples: 21, but the cache"),
        (
            "top_k",
            {"model.kd_loss": {"top_k": 16}, "curriculum": {"temperature": [[0, 2.0], [1, 1.0]]}},
            "curriculum.temperature: .* were made at 2; set it to that constant",
        ),
    ],
)
def test_what_does_not_belong_is_refused_in_one_line_before_the_first_step(distill, at, name, change, message):
    config = at(name)
    for key, value in change.items():
        section, _, inner = key.partition(".")
        if inner:
            config[section] = config[section] | {inner: value}
        else:
            config[section] = value
    with pytest.raises(UserError, match=message) as error:
        distill("fit", config)
    assert "\n" not in str(error.value)
    assert not list(Path("lightning_logs").glob("*/checkpoints"))


def test_other_packing_and_streams_are_refused(distill, config, tmp_path):
    text, lines = text_of_stdlib(20_000), tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps({"text": text[at : at + 90]}) + "\n" for at in range(0, len(text), 90)))
    config["data"] |= {"dataset": str(lines)}
    distill("cache", config, "--output", "lines")
    config["model"]["teacher"] = "lines"
    with pytest.raises(UserError, match=r"data.packing: False, but the cache lines was made with True; use that"):
        distill("fit", config, "--data.packing", "false")
    with pytest.raises(UserError, match=r"data.streaming: true, but a window of a stream"):
        distill("fit", config, "--data.streaming", "true", "--data.max_validation_sequences", "4")


def other_text(tmp_path: Path, characters: int) -> str:
    path = tmp_path / "text.txt"
    path.write_text(text_of_stdlib(characters))
    return str(path)


def test_other_data_are_refused_and_data_that_grew_are_added(distill, config, at, tmp_path):
    config["data"]["dataset"] = other_text(tmp_path, 8_000)
    distill("cache", config, "--output", "grown", *SHARD)
    few = read_manifest(Path("grown"))
    other_text(tmp_path, 12_000)
    run_of_more = config | {"model": config["model"] | {"teacher": "grown"}}
    with pytest.raises(UserError, match=r"lacks \d+; run distill cache --output grown with this configuration to add"):
        distill("fit", run_of_more)
    distill("cache", config, "--output", "grown", *SHARD)
    more = read_manifest(Path("grown"))
    assert more.shards[: len(few.shards)] == few.shards
    assert len(more.shards) > len(few.shards)
    assert sum(shard.rows for shard in more.shards) < 1.2 * len(text_of_stdlib(12_000)) / 40
    live = ran(distill("fit", config))
    assert_same(live, ran(distill("fit", run_of_more)), 1e-5)
    config["data"]["dataset"] = other_text(tmp_path, 12_000)
    Path(config["data"]["dataset"]).write_text(text_of_stdlib(40_000)[20_000:32_000])
    with pytest.raises(UserError, match=r"of which the cache grown lacks|but the cache grown was made with"):
        distill("fit", run_of_more)


def test_another_teacher_or_tokenizer_is_refused(distill, config, at, stored, assets, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(assets / "llama", other)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-40] ^= 64
    (other / "model.safetensors").write_bytes(weights)
    copy = shutil.copytree(stored["hidden"], tmp_path / "copy")
    with pytest.raises(UserError, match=r"copy is of another teacher; name another --output"):
        distill("cache", config | {"model": config["model"] | {"teacher": str(other)}}, "--output", str(copy))
    moved = tmp_path / "teacher"
    shutil.copytree(assets / "llama", moved)
    of_moved = config | {"model": config["model"] | {"teacher": str(moved)}}
    distill("cache", of_moved, "--output", "moved", "--max_rows", "20")
    shutil.copy(other / "model.safetensors", moved / "model.safetensors")
    with pytest.raises(UserError, match=r"is of another teacher than the one that .* is now"):
        distill("fit", config | {"model": config["model"] | {"teacher": "moved"}})

    words = shutil.copytree(assets / "llama", tmp_path / "words")
    text = (words / "tokenizer.json").read_text()
    (words / "tokenizer.json").write_text(text.replace('"ByteLevel"', '"ByteLevel" ').replace("<eos>", "<end>"))
    settings = (words / "tokenizer_config.json").read_text()
    (words / "tokenizer_config.json").write_text(settings.replace("<eos>", "<end>"))
    changed = at("hidden")
    changed["data"] = changed["data"] | {"tokenizer": str(words)}
    with pytest.raises(UserError, match=r"was made with another tokenizer than data\.tokenizer"):
        distill("fit", changed)


def test_damage_is_told_before_the_first_step_and_by_verify(distill, at, stored, tmp_path, capsys):
    copy = shutil.copytree(stored["hidden"], tmp_path / "copy")
    assert cache.main(["verify", str(copy)]) == 0
    shard = copy / "shard-00003.safetensors"
    content = bytearray(shard.read_bytes())
    content[5_000] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"has a damaged shard-00003.safetensors, whose checksum is another; copy it"):
        distill("fit", at("hidden", teacher=str(copy)))
    assert cache.main(["verify", str(copy)]) == 1
    shard.write_bytes(content[:-8])
    with pytest.raises(UserError, match=r"bytes of the [\d,]+ of shard-00003"):
        distill("fit", at("hidden", teacher=str(copy)))
    capsys.readouterr()
    assert cache.main(["info", str(stored["top_k"])]) == 0
    shown = capsys.readouterr().out
    assert "training: top_k (k 16, temperature 2.0, vocab_size 320), 774 rows, 23,968 targets" in shown
    assert "validation: hidden (dtype float32), 8 rows, 248 targets" in shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--encoding", "top_k"), "--encoding: top_k needs model.kd_loss.top_k, which is null"),
        (("--encoding", "hiden"), "--encoding: 'hiden' is no encoding; did you mean 'hidden'?"),
        (("--dtype", "int8"), "--dtype: 'int8'; give float32 or bfloat16"),
        (("--max_rows", "0"), "--max_rows: 0; give 1 or more"),
        (
            ("--model.kd_loss.top_k", "4", "--curriculum.temperature", "[[0,1],[1,2]]"),
            "curriculum.temperature: .* moves",
        ),
        (("--data.streaming", "true"), "data.streaming: true, but a window of a stream"),
        (("--output", "taken"), "--output: taken exists and is no cache"),
    ],
)
def test_what_cannot_be_built_is_refused(distill, config, flags, message):
    Path("taken").mkdir()
    Path("taken", "file").write_text("")
    with pytest.raises(UserError, match=message):
        distill("cache", config, *(() if "--output" in flags else ("--output", "cache")), *flags)
    assert not Path("cache").exists()


def test_a_sharded_teacher_is_refused():
    trainer = SimpleNamespace(strategy=FSDP2())
    with pytest.raises(UserError, match=r"^trainer.strategy: a sharded teacher cannot be cached yet; use ddp, or .*$"):
        cache_build.CacheBuilder(Request("cache"), None, trainer, None, Schedules(), print)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(distill, config, monkeypatch):
    usage = type("Usage", (), {"free": 100_000})
    monkeypatch.setattr(cache_build.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"--output: cache needs 0.00 GB and the disk has 0.00"):
        distill("cache", config, "--output", "cache")
    assert not Path("cache").exists()


def test_a_build_that_is_killed_goes_on_where_it_was(config, stored, monkeypatch):
    monkeypatch.setattr("sys.argv", ["distill"])
    config["model"]["kd_loss"] = {"samples": 20}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    made: list[str] = []
    build = cache_build.CacheBuilder._make
    monkeypatch.setattr(
        cache_build.CacheBuilder, "_make", lambda self, task: (made.append(task.file), build(self, task))
    )
    points = sorted(random.Random(0).sample(range(1, 6), 5))
    for point in points:  # of the manifest, the head, shards; each resumed build dies a few files later
        killed_at_file(point, *COMMAND)
    there = {path.name for path in Path("cache").glob("shard-*")}
    assert 2 < len(there) < 9
    with pytest.raises(UserError, match="is unfinished; run distill cache"):
        read_manifest(Path("cache"))
    run([*COMMAND])
    assert not there & set(made)
    assert len(there) + len(made) == 9
    assert contents(Path("cache")) == contents(stored["sampled"])


def test_two_ranks_build_and_read_what_one_does(config, stored, tmp_path):
    """Programs of their own: gloo's ranks are started by the command line."""
    config["model"]["kd_loss"] = {"top_k": 16}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    ranks = ("--trainer.strategy", "ddp", "--trainer.devices", "2")
    command = [
        sys.executable,
        "-m",
        "distill.cli",
        "cache",
        "--config",
        "config.yaml",
        "--output",
        "two",
        *SHARD,
        *ranks,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert contents(tmp_path / "two") == contents(stored["top_k"])
    config["model"]["teacher"] = str(tmp_path / "two")
    config["trainer"]["max_steps"] = 20
    one = two_ranks.fit(config, tmp_path / "one")
    config["data"]["per_device_batch_size"] = 2
    two_ranks.assert_same(one, two_ranks.fit(config, tmp_path / "both", *ranks), same_blocks=False)


def test_check_compares_the_cache_with_its_teacher_and_says_what_it_costs(distill, at, capsys):
    with pytest.raises(SystemExit):  # a random teacher looks bad
        distill("check", at("top_k", kd_loss={"top_k": 16}))
    shown = " ".join(capsys.readouterr().out.split())
    found = re.search(r"Cache: 64 training rows \(1,9\d\d targets\) beside .*largest difference of a log-probability "
                      r"(\S+) nats", shown)  # fmt: skip
    assert found
    assert float(found[1]) < 0.02
    assert re.search(r"top_k, as it is │ *4\d\.\d", shown)
    assert "bf16 logits │ 640.0" in shown.replace("  ", " ")
    assert not re.search(r"Suspicious: model.teacher: \S+ differs", shown)


def test_a_checkpoint_goes_on_only_from_the_cache_that_it_learned_from(distill, config):
    few = (*SHARD, "--max_rows", "100")
    config["data"] |= {"max_sequences": 60}
    distill("cache", config, "--output", "kept", *few)
    assert cache_files.teacher_behind("kept") == config["model"]["teacher"]  # which evaluate and predict load
    config["model"]["teacher"] = "kept"
    first = distill("fit", config, "--last_checkpoint.every_n_steps", "5")
    checkpoint = str(Path(first.trainer.log_dir, "checkpoints", "previous.ckpt"))
    shutil.rmtree("kept")
    config["model"]["teacher"] = first.model.teacher.manifest.teacher["source"]
    distill("cache", config, "--output", "kept", "--dtype", "bfloat16", *few)
    config["model"]["teacher"] = "kept"
    with pytest.raises(UserError, match=r"model.teacher_cache: '\w+', but the checkpoint was made with '\w+'"):
        distill("fit", config, "--ckpt_path", checkpoint)
