"""Several validation sets: each one's figures, the totals of the first, the choice of a checkpoint by any of them."""

import json
import re
from contextlib import nullcontext
from pathlib import Path

import pytest

from conftest import log_of, text_of_stdlib
from distill.commands.evaluate import evaluate
from distill.data.datamodule import DistillationDataModule
from distill.errors import UserError
from helpers.two_ranks import fit as fit_apart

SHORT = "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + '\\n' }}{% endfor %}"
METRICS = {
    "nll": "student_nll",
    "kl_div_T1": "kl_div_T1",
    "bits_per_byte": "bits_per_byte",
    "ece": "ece",
    "entropy": "student_entropy",
    "top1_agreement": "top1_agreement",
    "top5_agreement": "top5_agreement",
    "acceptance": "acceptance",
}


@pytest.fixture
def three(config, assets, tmp_path) -> dict:
    """A run of four steps that is measured on held-out rows, on other text, and on conversations."""
    (tmp_path / "wiki.txt").write_text(
        "".join(f"The river {n} flows to the sea in {n * 37 % 91} days.\n" for n in range(60))
    )
    turns = [{"role": "user", "content": "far?"}, {"role": "assistant", "content": "Seven miles."}]
    lines = [json.dumps({"turns": [*turns, {"role": "user", "content": str(n)}]}) for n in range(9)]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    chat = {"dataset": "chats.jsonl", "format": "messages", "messages_column": "turns"}
    config["data"] |= {"validation": {"in_domain": 0.05, "wiki": str(tmp_path / "wiki.txt"), "chat": chat}}
    config["data"] |= {"chat_template": SHORT, "max_validation_sequences": None}
    config["trainer"] |= {"max_steps": 4, "val_check_interval": 2, "num_sanity_val_steps": 0}
    return config


def measured(cli) -> dict[str, float]:
    metrics = cli.trainer.callback_metrics
    return {name: float(value) for name, value in metrics.items() if name.startswith("val/")}


def test_each_set_has_the_figures_of_evaluate(three, distill, tmp_path, capsys):
    cli = distill("fit", three)
    found = measured(cli)
    checkpoint = str(Path(cli.trainer.log_dir, "checkpoints", "last.ckpt"))
    report = evaluate(checkpoint)
    assert list(report["sets"]) == ["in_domain", "wiki", "chat"]
    assert report["models"] == report["sets"]["in_domain"]["models"]
    wiki = evaluate(checkpoint, text=str(tmp_path / "wiki.txt"))
    assert wiki["measured_on"]["rows"] == report["sets"]["wiki"]["rows"]
    for ours, theirs in METRICS.items():
        for name, one in report["sets"].items():
            logged = found[f"val/{name}/{theirs}"]
            assert one["models"]["student"][ours] == pytest.approx(logged, rel=1e-6, abs=1e-9), (name, ours)
        assert found[f"val/{theirs}"] == found[f"val/in_domain/{theirs}"]
        logged = found[f"val/wiki/{theirs}"]
        assert wiki["models"]["student"][ours] == pytest.approx(logged, rel=1e-6, abs=1e-9), ours
    table = capsys.readouterr().out
    for name in (
        "val/kl_div_T1",
        "val/wiki/kl_div_T1",
        "val/wiki/bits_per_byte",
        "val/chat/acceptance",
        "val/wiki/student_perplexity",
    ):
        assert name in table
    assert "val/in_domain" not in table


def test_the_first_set_is_what_the_single_key_says(three, distill):
    several = measured(distill("fit", three))
    del three["data"]["validation"]
    alone = measured(distill("fit", three))
    assert {name: several[name] for name in alone} == alone
    assert not any(name.count("/") == 2 for name in alone)
    assert "val/loss" in alone
    assert not any(name.endswith("/loss") for name in several if name.count("/") == 2)


def test_the_audit_sees_every_set(three, distill, monkeypatch):
    from distill.training.callbacks.audit import LossAudit

    seen, entered = [], LossAudit._enter
    monkeypatch.setattr(LossAudit, "_enter", lambda self, *args: (seen.append(args[3]), entered(self, *args))[1])
    cli = distill("fit", three)
    batches = sum(len(loader) for loader in cli.datamodule.val_dataloader().values())
    assert seen.count("validation") == 2 * batches


def test_validate_prints_each_figure_once(three, distill, capsys):
    three["trainer"] |= {"max_steps": 1, "val_check_interval": 1}
    cli = distill("fit", three)
    capsys.readouterr()
    distill("validate", three, "--ckpt_path", str(Path(cli.trainer.log_dir, "checkpoints", "last.ckpt")))
    table = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).partition("Validate metric")[2]  # bars may colour it
    assert re.search(r"val/wiki/kl_div_T1\s+│\s+\d\.\d+\s+│\n", table)
    assert "DataLoader 1" not in table


@pytest.mark.slow
def test_two_ranks_equal_one(three, tmp_path):
    """Nine conversations, so that one rank's last batch is empty."""
    three["data"]["validation"]["chat"]["dataset"] = str(tmp_path / "chats.jsonl")
    one, _, _ = fit_apart(three, tmp_path / "one")
    three["data"]["per_device_batch_size"] = 2
    two, _, _ = fit_apart(three, tmp_path / "two", "--trainer.strategy", "ddp", "--trainer.devices", "2")
    names = [name for name in one[0] if name.startswith("val/") and name.count("/") == 2]
    assert len(names) == 3 * 12
    for ours, theirs in zip(one, two, strict=True):
        for name in names:
            assert bool(ours[name]) == bool(theirs[name])
            if ours[name]:
                assert float(theirs[name]) == pytest.approx(float(ours[name]), rel=1e-5), name


def test_rows_are_cached_and_the_same_training_rows_stay(three, monkeypatch, assets):
    def ready(**changes):
        data = DistillationDataModule(**(three["data"] | {"tokenizer": str(assets / "llama")} | changes))
        data.prepare_data()
        data.setup()
        return data

    first = ready()
    monkeypatch.setattr("distill.data.documents.encode.tokenize", lambda *_: pytest.fail("tokenised again"))
    again = ready()
    assert {name: len(rows) for name, rows in again.held_out.items()} == {n: len(r) for n, r in first.held_out.items()}
    alone = ready(validation=None)
    assert alone.train_rows.indices.tolist() == first.train_rows.indices.tolist()
    assert alone.validation_rows.indices.tolist() == first.held_out["in_domain"].indices.tolist()
    assert [len(rows) for rows in ready(max_validation_sequences=3).held_out.values()] == [3, 3, 3]
    everything = ready(validation={"wiki": three["data"]["validation"]["wiki"]})
    assert len(everything.train_rows) == len(first.train_rows) + len(first.held_out["in_domain"])


def test_of_a_stream(three, distill):
    three["data"] |= {"streaming": True, "shuffle_buffer": 40, "dataset": "parts.jsonl", "max_validation_sequences": 5}
    pieces = [text_of_stdlib(40_000)[at : at + 500] for at in range(0, 40_000, 500)]
    Path("parts.jsonl").write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
    three["data"]["validation"]["in_domain"] = 0.3
    del three["data"]["chat_template"], three["data"]["validation"]["chat"]
    cli = distill("fit", three)
    assert [len(rows) for rows in cli.datamodule.held_out.values()] == [5, 5]
    assert measured(cli)["val/wiki/kl_div_T1"] > 0


BEST = {"monitor": "val/wiki/kl_div_T1", "mode": "max", "filename": "step={step}", "auto_insert_metric_name": False}


def chosen_by(config: dict, **how) -> dict:
    config["checkpoint"] = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": BEST | how}
    return config


def test_the_best_is_linked_and_told_and_a_resumed_run_chooses_the_same(three, distill, capsys):
    """By the highest KL, so that the best is not the last one."""
    config = chosen_by(three)
    whole = distill("fit", config)
    told = re.search(r"Best checkpoint: best\.ckpt \(step=2\.ckpt\), .*", capsys.readouterr().out)[0]
    score = float(whole.trainer.checkpoint_callback.best_model_score)
    assert told.endswith(f"by the highest val/wiki/kl_div_T1, {score:.4f} at step 2 of 4")
    folder = Path(whole.trainer.log_dir, "checkpoints")
    assert (folder / "best.ckpt").resolve() == (folder / "step=2.ckpt").resolve()
    assert evaluate(str(folder / "best.ckpt"))["sets"]["wiki"]["models"]["student"]["kl_div_T1"] == pytest.approx(
        score, rel=1e-6
    )
    resumed = distill("fit", config, "--ckpt_path", str(folder / "previous.ckpt"))
    again = Path(resumed.trainer.log_dir, "checkpoints")
    assert again != folder
    assert (again / "best.ckpt").resolve() == (folder / "step=2.ckpt").resolve()
    assert told in capsys.readouterr().out
    assert measured(resumed) == measured(whole)


@pytest.mark.filterwarnings("ignore:The curriculum's horizon")
@pytest.mark.parametrize("same", [True, False])
def test_a_best_that_was_measured_on_other_rows_is_not_the_one_to_beat(three, distill, same):
    """By the lowest KL on the first set, which falls; on the conversations it is higher than it was on the river."""
    sets = three["data"]["validation"]
    three["early_stopping"] = {"class_path": "lightning.pytorch.callbacks.EarlyStopping"}
    three["early_stopping"]["init_args"] = {"monitor": "val/kl_div_T1", "patience": 2}
    config = chosen_by(three, monitor="val/kl_div_T1", mode="min")
    three["data"]["validation"] = {"wiki": sets["wiki"]}
    first = distill("fit", config)
    before = first.trainer.checkpoint_callback.best_model_score
    three["data"]["validation"] = {name: sets[name] for name in (("wiki", "chat") if same else ("chat", "wiki"))}
    three["trainer"] |= {"max_steps": 8, "val_check_interval": 4}
    told = "val/kl_div_T1 is measured on other rows than in the checkpoint, so the best of it begins anew"
    with nullcontext() if same else pytest.warns(UserWarning, match=told):
        again = distill("fit", config, "--ckpt_path", str(Path(first.trainer.log_dir, "checkpoints", "last.ckpt")))
    assert (again.trainer.checkpoint_callback.best_model_score < before) == same
    folder = Path(again.trainer.log_dir, "checkpoints")
    assert (folder / "best.ckpt").resolve() == (folder / "step=8.ckpt").resolve()
    assert again.trainer.early_stopping_callback.wait_count == 0


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"validation": {}}, "data.validation: {}; name at least one set"),
        ({"validation": {"a/b": 0.1}}, "data.validation: 'a/b' stands in names of metrics"),
        ({"validation": {"": 0.1}}, "data.validation: '' stands in names of metrics"),
        ({"validation": {1: 0.1}}, "data.validation: 1 stands in names of metrics; give letters"),
        ({"validation": {"a": None}}, "data.validation.a: None; give a fraction, a split, another source, or"),
        (
            {"validation": {"a": ["x.txt"]}},
            "data.validation.a: ['x.txt']; give a fraction, a split, another source, or",
        ),
        ({"validation": {"a": 1.5}}, "data.validation.a: 1.5; give a fraction"),
        ({"validation": {"a": 0.1, "b": 0.1}}, "data.validation.b: 0.1 would hold out rows like data.validation.a"),
        ({"validation": {"a": 0.1}, "validation_split": 0.1}, "data.validation_split: 0.1 beside data.validation"),
        (
            {"validation": {"a": {"datset": "x"}}},
            "data.validation.a.datset: is no key of a part; did you mean 'dataset'?",
        ),
        ({"validation": {"a": {"split": "x"}}}, "data.validation.a.dataset: missing"),
        (
            {"validation": {"a": {"dataset": "x", "weight": 1}}},
            "data.validation.a.weight: 1; a validation set has none",
        ),
        ({"validation": {"a": "none.txt"}}, "data.validation.a: 'none.txt' does not exist"),
        ({"validation": {"a": {"dataset": "none.txt"}}}, "data.validation.a.dataset: 'none.txt' does not exist"),
    ],
)
def test_refused_sets(data, told, assets, config):
    options = config["data"] | {"tokenizer": str(assets / "llama")} | data
    with pytest.raises(UserError, match=re.escape(told)):
        DistillationDataModule(**options).prepare_data()


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"monitor": "val/acceptance", "mode": "min"}, "checkpoint.mode: min, but more of val/acceptance is better"),
        ({"monitor": "val/wikj/kl_div_T1"}, "no validation set is called wikj; did you mean 'wiki'?"),
        ({"monitor": "tasks/arc_easy/acc"}, "checkpoint.monitor: tasks/arc_easy/acc, but no task is run"),
    ],
)
def test_refused_monitors(three, distill, how, told):
    with pytest.raises(UserError, match=re.escape(told)):
        distill("fit", chosen_by(three, **how))


def test_early_stopping_by_a_set(three, distill):
    early = {"monitor": "val/wiki/kl_div_T1", "mode": "max", "patience": 2}
    three["early_stopping"] = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": early}
    three["trainer"]["max_steps"] = 20
    cli = distill("fit", three)
    assert "Stopped early at step 6 of 20: val/wiki/kl_div_T1 has not improved for 2 validations" in log_of(cli)
