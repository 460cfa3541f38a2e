"""Attention, layerwise and contrastive losses within whole runs: order, any split, resume, observers, cost."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from conftest import log_of
from distill.curriculum import WEIGHT_KEY
from distill.errors import UserError
from distill.losses.attention import AttentionTransfer
from distill.losses.contrastive import Contrastive
from distill.losses.layerwise import Layerwise
from distill.models.trace import Needs
from distill.training import objective as objective_module
from distill.training.callbacks.curriculum import Curriculum
from distill.training.module import DistillationModule
from helpers.training_log import parse

CONTRASTIVE = {"tokens_per_row": 8, "queue_size": 100}
SUMS = {"feature_matching_loss": 1.0, "expert_importance_loss": 1.0, "attention_alignment_loss": 1.0}


@pytest.fixture
def config(config):
    """A run of a few seconds with all nine components."""
    config["model"] |= {"attention": {}, "layerwise": {}, "contrastive": dict(CONTRASTIVE)}
    return config


def constant(**weights):
    return {"feature": 0.1, "attention": 0.1, "layerwise": 0.05, "contrastive": 0.05} | weights


def state_of(cli):
    return {name: value.clone() for name, value in cli.model.state_dict().items()}


def same_bits(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_components_come_and_go_with_the_curriculum_in_the_documented_order(distill, config):
    config["train_debug"] = {"every_n_batches": 1}
    config["trainer"]["val_check_interval"] = 10
    cli = distill("fit", config)
    assert cli.model.components == list(WEIGHT_KEY)
    text = log_of(cli)
    blocks = parse(text)
    listed = {}
    for block in blocks:
        if block.kind == "TRAIN DEBUG":
            listed[block.step] = [name for name in block.values if name.endswith("_loss")]
            assert block.values["sum"] == pytest.approx(block.values["total"], abs=1e-4)
    assert listed[3] == ["kd_loss", "lm_loss"]
    assert listed[9] == [name for name in WEIGHT_KEY if name not in ("layerwise_loss", "contrastive_loss")]
    assert listed[19] == list(WEIGHT_KEY)
    last = text[text.rindex("[Eval]") :].splitlines()[1:10]
    assert [line.split(":")[0].strip() for line in last] == list(WEIGHT_KEY)
    metrics = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    for name in ("attention_loss", "layerwise_loss", "contrastive_loss"):
        key = WEIGHT_KEY[name]
        assert metrics[f"train/{name}_scaled"] == pytest.approx(metrics[f"train/{name}"] * metrics[f"curriculum/{key}"])
        assert metrics[f"val/{name}"] > 0
    assert cli.model.contrastive.queue_contexts_Q.bool().any()


@pytest.mark.parametrize("form", ["relations", pytest.param("maps", marks=pytest.mark.slow)])
def test_any_accumulation_has_the_same_losses_and_parameters(distill, config, tmp_path, form):
    """Rows of uneven length, one document each; all components that are sums over units."""
    lengths = [7, 90, 20, 31, 12, 300, 55, 18]
    words = [f"item {n} " + "abc def " * (lengths[n % 8] // 8 + 1) for n in range(120)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in words))
    config["data"] |= {"dataset": str(tmp_path / "rows.jsonl"), "packing": False, "per_device_batch_size": 8}
    config["model"]["routing"]["losses"] = SUMS
    config["model"] |= {"attention": {"form": form}, "contrastive": None}
    config["curriculum"] = {"feature": 0.1, "attention": 0.1, "layerwise": 0.05}
    config["trainer"] |= {"max_steps": 4, "precision": "64-true"}
    whole = distill("fit", config)
    one = state_of(whole)
    config["data"]["per_device_batch_size"] = 2
    config["trainer"]["accumulate_grad_batches"] = 4
    split = distill("fit", config)
    for name, value in state_of(split).items():
        torch.testing.assert_close(value, one[name], rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    ours, theirs = split.trainer.callback_metrics, whole.trainer.callback_metrics
    for name in ("train/loss", "train/attention_loss", "train/layerwise_loss", "val/attention_loss", "val/loss"):
        assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=1e-6), name


@pytest.mark.parametrize("precision", ["32-true", pytest.param("bf16-mixed", marks=pytest.mark.slow)])
def test_gradient_checkpointing_and_precision_stay_close(distill, config, precision):
    config["trainer"] |= {"max_steps": 3}
    config["curriculum"] = constant()
    plain = distill("fit", config).trainer.callback_metrics
    config["model"]["gradient_checkpointing"] = True
    config["trainer"]["precision"] = precision
    other = distill("fit", config).trainer.callback_metrics
    tolerance = 1e-5 if precision == "32-true" else 5e-2
    for name in ("train/attention_loss", "train/layerwise_loss", "train/contrastive_loss", "train/grad_norm"):
        assert float(other[name]) == pytest.approx(float(plain[name]), rel=tolerance), name


def test_a_resumed_run_is_the_unbroken_one_queue_included(distill, config):
    config["curriculum"] = constant()
    config["trainer"] |= {"max_steps": 6, "val_check_interval": 3}
    saving = {"monitor": None, "save_top_k": -1, "filename": "step={step}", "auto_insert_metric_name": False}
    config["checkpoint"] = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saving}
    unbroken = distill("fit", config)
    path = Path(unbroken.trainer.log_dir, "checkpoints", "step=3.ckpt")
    stored = torch.load(path, weights_only=True)["state_dict"]
    assert int(stored["contrastive.place"]) == 3 * 4 * 8 % 100
    resumed = distill("fit", config, "--ckpt_path", str(path))
    same_bits(state_of(resumed), state_of(unbroken))
    assert not torch.equal(stored["contrastive.queue_QD"], unbroken.model.contrastive.queue_QD)


class Measure(Callback):
    """Asks for every component on every step, as a dump might."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.measure_inactive |= frozenset(pl_module.components)


def test_neither_validation_nor_measuring_at_weight_zero_changes_a_bit(distill, config):
    """Both look at the losses, the queue among them, and leave no trace in it."""
    config["curriculum"] = {"contrastive": [[0.4, 0.0], [0.5, 0.05]], "layerwise": [[0.4, 0.0], [0.5, 0.05]]}
    config["trainer"] |= {"max_steps": 6, "num_sanity_val_steps": 0}
    plain = distill("fit", config)
    config["trainer"] |= {"val_check_interval": 1, "callbacks": [{"class_path": f"{__name__}.Measure"}]}
    config["train_debug"] = None
    watched = distill("fit", config)
    same_bits(state_of(watched), state_of(plain))


def test_weight_zero_costs_nothing(distill, config, monkeypatch):
    """In the first phase no layer's state or attention is asked for, and no loss is called."""
    asked, called = [], []
    for name, module in (("trace", objective_module), ("trace", __import__("distill.teachers.online", fromlist=["x"]))):
        original = getattr(module, name)

        def note(model, batch, needs=Needs(), original=original):  # noqa: B008  (frozen)
            asked.append(needs)
            return original(model, batch, needs)

        monkeypatch.setattr(module, name, note)
    for loss, method in ((AttentionTransfer, "__call__"), (Layerwise, "forward"), (Contrastive, "forward")):
        original_loss = getattr(loss, method)

        def note_loss(self, *args, original=original_loss):
            called.append(self.component)
            return original(self, *args)

        monkeypatch.setattr(loss, method, note_loss)
    config["model"]["routing"] = None
    config["curriculum"] = {"attention": 0.0, "layerwise": 0.0, "contrastive": 0.0}
    config["trainer"]["max_steps"] = 2
    cli = distill("fit", config)
    assert set(asked) == {Needs()}
    assert not called
    assert not cli.model.contrastive.queue_contexts_Q.any()
    asked.clear()
    config["curriculum"] = {"attention": 0.1, "layerwise": 0.0, "contrastive": 0.0}
    distill("fit", config)
    assert set(asked) - {Needs()} == {Needs(attention=frozenset([1])), Needs(attention=frozenset([3]))}
    assert set(called) == {"attention_loss"}


def test_projections_of_weight_zero_stay_as_they_were(distill, config):
    config["curriculum"] = {"layerwise": 0.0, "contrastive": 0.1}
    config["model"]["weight_decay"] = 0.5
    config["trainer"]["max_steps"] = 0
    before = state_of(distill("validate", config))
    config["trainer"]["max_steps"] = 3
    after = state_of(distill("fit", config))
    for name, value in before.items():
        if name.startswith("layerwise."):
            assert torch.equal(value, after[name]), name
    assert not torch.equal(before["contrastive.projection.weight"], after["contrastive.projection.weight"])


def test_they_train_the_student_by_themselves(distill, config):
    """Without KD and LM loss only what the losses reach moves: the layer above the last one read does not."""
    config["model"] |= {"kd_loss": None, "lm_loss": False, "routing": None, "weight_decay": 0.5}
    config["model"] |= {"attention": {"student_layer": 0}, "layerwise": {"student_layers": [0]}}
    config["model"]["contrastive"] = CONTRASTIVE | {"student_layer": 0}
    config["curriculum"] = {"attention": 1.0, "layerwise": 1.0, "contrastive": 1.0}
    config["trainer"] |= {"max_steps": 0}
    before = state_of(distill("validate", config))
    config["trainer"] |= {"max_steps": 10}
    cli = distill("fit", config)
    after = state_of(cli)
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert any(".layers.0." in name for name in moved)
    assert not any(".layers.1." in name or "lm_head" in name for name in moved)
    metrics = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    parts = [metrics[f"val/{name}"] for name in ("attention_loss", "layerwise_loss", "contrastive_loss")]
    assert metrics["val/loss"] == pytest.approx(sum(parts), rel=1e-6)


def test_a_key_without_its_component_is_an_error_and_a_default_one_counts_zero(distill, config):
    config["model"] |= {"layerwise": None, "contrastive": None}
    config["trainer"]["max_steps"] = 1
    (block,) = [b for b in parse(log_of(distill("fit", config))) if b.kind == "CURRICULUM"]
    assert block.values["layerwise"] == block.values["contrastive"] == 0
    config["curriculum"] = {"contrastive": 0.2}
    with pytest.raises(UserError, match=r"curriculum.contrastive: 0.2 weighs nothing here: configure contrastive_loss"):
        distill("fit", config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": {"form": "map"}}, "form: map is not one of 'relations', 'maps'"),
        ({"attention": {"layer": 3}}, "layer"),
        ({"attention": {"teacher_layer": 9}}, "model.attention.teacher_layer: 9 is not a layer"),
        (
            {"layerwise": {"student_layers": 3}},
            "model.layerwise.student_layers: 3 are more than the student's 2 layers",
        ),
        ({"contrastive": {"temperature": 0}}, "model.contrastive.temperature: 0.0; give a number above 0"),
    ],
)
def test_bad_options_are_one_line_before_any_run(distill, config, tmp_path, options, message):
    config["model"] |= options
    with pytest.raises(UserError, match=message) as caught:
        distill("fit", config)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("lightning_logs/*"))


def test_the_module_takes_them_from_python(assets):
    module = DistillationModule(
        str(assets / "llama"), student_layers=2, attention=AttentionTransfer("maps"), layerwise=Layerwise("cosine")
    )
    assert module.components == ["kd_loss", "lm_loss", "attention_loss", "layerwise_loss"]
    assert module.auxiliaries == [module.layerwise]
    assert Curriculum().state_at(1, 1).weights["layerwise"] == 0.05
