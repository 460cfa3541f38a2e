"""`distill cache --states true`: a run with losses on layers learns from it what it would from a mixture of experts."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from conftest import small_config, text_of_stdlib
from distill.commands import cache
from distill.commands.fit import run
from distill.curriculum import WEIGHT_KEY
from distill.errors import UserError
from distill.teachers.cache_files import read_manifest
from distill.training import cache_build
from helpers import two_ranks
from helpers.killed import contents, killed_at_file

STATES = ("--states", "true", "--shard_rows", "100")
COMMAND = ("cache", "--config", "config.yaml", "--output", "cache", *STATES)
WEIGHTS = {"feature": 0.1, "attention": 0.1, "layerwise": 0.05, "contrastive": 0.05}


def curriculum(assets: Path) -> dict:
    """A run with the four routing losses, layerwise and contrastive, all on from the first step."""
    config = small_config(assets)
    config["model"] |= {
        "teacher": str(assets / "qwen3_moe"),
        "routing": {"teacher_layers": 2},
        "layerwise": {},
        "contrastive": {"tokens_per_row": 8, "queue_size": 100, "teacher_layer": 2},
    }
    config["curriculum"] = dict(WEIGHTS)
    config["trainer"] |= {"max_steps": 12, "val_check_interval": 6}
    return config


@pytest.fixture
def config(assets, tmp_path, monkeypatch) -> dict:
    monkeypatch.chdir(tmp_path)
    return curriculum(assets)


@pytest.fixture(scope="module")
def stored(assets, tmp_path_factory) -> dict[str, Path]:
    """Caches of that run, by their encoding."""
    folders = {}
    for name, kd in (("hidden", {}), ("top_k", {"top_k": 16})):
        folder = tmp_path_factory.mktemp(name)
        config = curriculum(assets)
        config["model"]["kd_loss"] = kd
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["distill"])
            patch.chdir(folder)
            run([*COMMAND])
        folders[name] = folder / "cache"
    return folders


def from_cache(config: dict, folder: Path | str, **model) -> dict:
    return config | {"model": config["model"] | {"teacher": str(folder)} | model}


def ran(cli) -> tuple[list[dict], dict]:
    with Path(cli.trainer.log_dir, "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    state = {name: value.clone() for name, value in cli.model.state_dict().items()}
    state["contrastive.queue_QD"] *= state["contrastive.queue_contexts_Q"].bool()[:, None]  # others hold no token
    return rows, state


def assert_same(one, other, tolerance: float, names: set[str]):
    compared = set()
    for ours, theirs in zip(one[0], other[0], strict=True):
        for name, value in ours.items():
            if name.startswith(("train/", "val/", "routing/")) and value and not name.endswith(("_per_s", "_gib")):
                assert float(theirs[name]) == pytest.approx(float(value), rel=tolerance, abs=tolerance), name
                compared.add(name)
    assert {f"{part}/{name}" for part in ("train", "val") for name in names} <= compared
    for name, value in one[1].items():
        torch.testing.assert_close(other[1][name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: n + m)


ALL = set(WEIGHT_KEY) - {"attention_loss"}


def test_the_whole_curriculum_from_disk_equals_the_live_run(distill, config, stored):
    live = distill("fit", config)
    cached = distill("fit", from_cache(config, stored["hidden"]))
    assert set(live.model.components) == ALL
    assert not live.model.layerwise.projections, "the student speaks the teacher's language"
    assert_same(ran(live), ran(cached), 1e-5, ALL)
    assert all(parameter.is_meta for parameter in cached.model.teacher.model.parameters())


def test_rows_of_uneven_length_and_a_student_of_another_width(distill, config, monkeypatch):
    """Padding, thinned targets, projections; batches as long as their longest row."""
    monkeypatch.setattr("distill.data.rows.table.MULTIPLE", 16)
    words = [{"text": f"item {n} " + "abc def " * (n % 9)} for n in range(90)]
    Path("rows.jsonl").write_text("".join(json.dumps(word) + "\n" for word in words))
    config["data"] |= {"dataset": "rows.jsonl", "packing": False, "sequence_length": 64, "group_by_length": True}
    student = {"model_type": "llama", "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
    student |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    config["model"] |= {"student_layers": None, "student_config": student, "kd_loss": {"samples": 8}}
    config["curriculum"]["kd"] = 0.0  # draws of a cache are others
    distill("cache", config, "--output", "cache", *STATES)
    live, cached = distill("fit", config), distill("fit", from_cache(config, "cache"))
    assert len(cached.model.layerwise.projections) == 2
    one, other = ran(live), ran(cached)
    for rows in (one[0], other[0]):
        for row in rows:
            row.pop("val/kd_loss", None)
    assert_same(one, other, 1e-5, ALL - {"kd_loss"})


def test_a_run_without_vocabulary_learns_from_states_alone(distill, config, stored):
    config["model"] |= {"kd_loss": None, "lm_loss": False, "layerwise": None}
    config["curriculum"].pop("layerwise")
    config["model"]["contrastive"] = {"tokens_per_row": 8, "queue_size": 0, "teacher_layer": 2}
    live, cached = distill("fit", config), distill("fit", from_cache(config, stored["top_k"]))
    assert_same(
        ran(live), ran(cached), 1e-5, {"contrastive_loss"} | {name for name in ALL if name.startswith("routing")}
    )


def test_thinned_targets_and_states_beside_them(distill, config, stored):
    kd = {"kd_loss": {"top_k": 16}}
    live = distill("fit", config | {"model": config["model"] | kd})
    assert_same(ran(live), ran(distill("fit", from_cache(config, stored["top_k"], **kd))), 3e-3, ALL)


def test_states_in_half_the_bits_are_off_by_their_rounding(distill, config, capsys):
    distill("cache", config, "--output", "half", "--dtype", "bfloat16", *STATES)
    shown = capsys.readouterr().out
    fields = {(field["layer"], field["name"]): field for field in read_manifest(Path("half")).states}
    assert {field["dtype"] for (_, name), field in fields.items() if name in ("hidden", "mixture_TD")} == {"bfloat16"}
    assert "hidden of teacher layers [1, 2, 3] and routing of teacher layers [1, 3] in bfloat16" in shown
    # 3 hidden states and 2 mixtures of 16 numbers in 2 bytes; 4 logits and 2 weights in 4, 2 indices in 1
    assert f"{5 * 32 + 2 * (24 + 2)} B a position" in shown
    assert_same(ran(distill("fit", config)), ran(distill("fit", from_cache(config, "half"))), 2e-2, ALL)


def test_a_run_that_is_broken_off_and_resumed_is_the_unbroken_one(distill, config, stored):
    config = from_cache(config, stored["top_k"], kd_loss={"top_k": 8})
    whole = distill("fit", config, "--last_checkpoint.every_n_steps", "5")
    checkpoint = str(Path(whole.trainer.log_dir, "checkpoints", "previous.ckpt"))
    assert torch.load(checkpoint, weights_only=True)["global_step"] < 12
    again = distill("fit", config, "--ckpt_path", checkpoint)
    assert all(torch.equal(value, ran(again)[1][name]) for name, value in ran(whole)[1].items())


def test_routing_with_all_experts_is_stored_with_all(distill, config):
    config["model"] |= {"teacher_top_k": "all", "layerwise": None}
    config["curriculum"] = {"feature": 0.1, "attention": 0.1, "contrastive": 0.05, "top_k_experts": 4}
    distill("cache", config, "--output", "cache", *STATES)
    live, cached = distill("fit", config), distill("fit", from_cache(config, "cache"))
    assert_same(ran(live), ran(cached), 1e-5, ALL - {"layerwise_loss"})


def test_a_build_that_is_killed_goes_on_where_it_was(config, stored, monkeypatch):
    monkeypatch.setattr("sys.argv", ["distill"])
    Path("config.yaml").write_text(yaml.safe_dump(config))
    made: list[str] = []
    build = cache_build.CacheBuilder._make
    monkeypatch.setattr(
        cache_build.CacheBuilder, "_make", lambda self, task: (made.append(task.file), build(self, task))
    )
    for point in (6, 3):
        killed_at_file(point, *COMMAND)
    there = {path.name for path in Path("cache").glob("shard-*")}
    assert 0 < len(there) < 9
    run([*COMMAND])
    assert not there & set(made)
    assert len(there) + len(made) == 9
    assert contents(Path("cache")) == contents(stored["hidden"])


@pytest.mark.slow
def test_two_ranks_build_and_read_what_one_does(config, stored, tmp_path):
    """Programs of their own: gloo's ranks are started by the command line."""
    Path("config.yaml").write_text(yaml.safe_dump(config))
    ranks = ("--trainer.strategy", "ddp", "--trainer.devices", "2")
    command = [sys.executable, "-m", "distill.cli", *COMMAND, *ranks]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert contents(Path("cache")) == contents(stored["hidden"])
    config = from_cache(config, tmp_path / "cache")
    config["trainer"]["max_steps"] = 20
    one = two_ranks.fit(config, tmp_path / "one")
    config["data"]["per_device_batch_size"] = 2
    two_ranks.assert_same(one, two_ranks.fit(config, tmp_path / "both", *ranks), same_blocks=False)


def test_rows_that_are_added_bring_their_states(distill, config, tmp_path):
    config["data"]["dataset"] = str(tmp_path / "text.txt")
    Path("text.txt").write_text(text_of_stdlib(6_000))
    distill("cache", config, "--output", "grown", *STATES)
    few = read_manifest(Path("grown"))
    Path("text.txt").write_text(text_of_stdlib(10_000))
    distill("cache", config, "--output", "grown", *STATES)
    more = read_manifest(Path("grown"))
    assert more.shards[: len(few.shards)] == few.shards
    assert all(shard.positions > shard.tokens > 0 for shard in more.shards)
    assert_same(ran(distill("fit", config)), ran(distill("fit", from_cache(config, "grown"))), 1e-5, ALL)
    for changed in (("--states", "false"), ("--model.routing.teacher_layers", "[1]"), ("--dtype", "bfloat16")):
        with pytest.raises(UserError, match=r"the cache grown holds .* not .*; name another --output"):
            distill("cache", config, "--output", "grown", *STATES, *changed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model.layerwise": {"teacher_layers": [0, 3]}},
            "model.layerwise.teacher_layers: looks at the hidden states of the teacher's layer 0, of which the cache "
            r".* holds nothing \(it has hidden of teacher layers \[1, 2, 3\] and",
        ),
        (
            {"model.contrastive": {"teacher_layer": 0}},
            "model.contrastive.teacher_layer: .* layer 0, of which the cache",
        ),
        (
            {"model.routing": {"teacher_layers": [1, 2]}},
            "model.routing.teacher_layers: looks at the routing .* layer 2",
        ),
        ({"model.attention": {}}, "model.attention: looks at the teacher's queries, keys and values, which no cache"),
        ({"model.routing": {"tau": 1.0}}, "model.routing.tau: 1.0 asks every expert .* set it to inf, or give a live"),
        (
            {"curriculum": {"top_k_experts": 3}},
            "curriculum.top_k_experts: 3.*, but the routing in the cache .* is with 2",
        ),
        ({"curriculum": {"top_k_experts": [[0.5, 2], [1, 4]]}}, "curriculum.top_k_experts: .* set it to 2, or give a"),
        ({"model.teacher_top_k": "all"}, "model.teacher_top_k: all, but the cache"),
    ],
)
def test_what_is_not_there_is_refused_by_the_components_name(distill, config, stored, change, message):
    config = from_cache(config, stored["hidden"])
    for key, value in change.items():
        section, _, inner = key.partition(".")
        config[section] = config[section] | ({inner: value} if inner else value)
    with pytest.raises(UserError, match=message) as error:
        distill("fit", config)
    assert "\n" not in str(error.value)
    assert not list(Path("lightning_logs").glob("*/checkpoints"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"routing": None, "layerwise": None, "contrastive": None}, "--states: true, but no loss looks at layers"),
        ({"attention": {}}, "model.attention: looks at the teacher's queries, keys and values, which no cache holds"),
        ({"routing": {"tau": 2.0}}, "model.routing.tau: 2.0 asks every expert"),
        ({"teacher_top_k": 3}, r"curriculum.top_k_experts: null \(the native 2\), but the routing in .* is with 3"),
        ({"teacher": "llama"}, "model.routing.teacher_layers: cuts experts out of a dense teacher's weights"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_it_is_built(distill, config, assets, change, message):
    if "teacher" in change:
        change = {"teacher": str(assets / change["teacher"])}
    with pytest.raises(UserError, match=message):
        distill("cache", config | {"model": config["model"] | change}, "--output", "cache", *STATES)
    assert not Path("cache").exists()


def test_slices_of_a_dense_teacher_are_refused_and_its_hidden_states_are_not(distill, config, assets):
    dense = {"teacher": str(assets / "llama"), "routing": None, "contrastive": None}
    config |= {"model": config["model"] | dense, "curriculum": {"layerwise": 0.1}}
    distill("cache", config, "--output", "cache", *STATES)
    config["model"]["teacher"] = "cache"
    distill("fit", config)
    with pytest.raises(UserError, match=r"model.routing.teacher_layers: cuts experts out of a dense teacher's weights"):
        distill("fit", config | {"model": config["model"] | {"routing": {"num_experts": 4}}})


def test_damage_to_states_is_told(stored, tmp_path, capsys):
    copy = shutil.copytree(stored["hidden"], tmp_path / "copy")
    shard = copy / "shard-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-7] ^= 1
    shard.write_bytes(content)
    assert cache.main(["verify", str(copy)]) == 1
    assert "damaged shard-00002.safetensors" in capsys.readouterr().out
    assert cache.main(["info", str(stored["hidden"])]) == 0
    shown = capsys.readouterr().out
    assert "beside them hidden of teacher layers [1, 2, 3] and routing of teacher layers [1, 3] in float32" in shown
    assert f"{5 * 64 + 2 * (24 + 2)} B a position" in shown
    assert "training: hidden (dtype float32), 774 rows, 23,968 targets" in shown


def test_check_compares_states_with_the_live_teachers(distill, config, stored, capsys):
    with pytest.raises(SystemExit):  # a random teacher looks bad
        distill("check", from_cache(config, stored["hidden"]))
    shown = " ".join(capsys.readouterr().out.split())
    found = re.search(
        r"largest difference of a log-probability (\S+) nats, of a layer's states (\S+) of their size", shown
    )
    assert found
    assert max(float(found[1]), float(found[2])) < 1e-5
    assert "states of layers, a position │ 372" in shown
