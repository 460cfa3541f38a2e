"""Gradient norms and cosines per component against plain autograd, and that asking for them changes no bit."""

import csv
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.nn.functional import cross_entropy, kl_div

from distill.errors import UserError
from distill.training.callbacks.gradients import Gradients
from helpers.two_ranks import fit


def logged(cli, prefix="gradients/"):
    """Step -> the figures of that prefix without it, of the run's metrics.csv."""
    text = Path(cli.trainer.log_dir, "metrics.csv").read_text()
    found = {}
    for row in csv.DictReader(text.splitlines()):
        figures = {key.removeprefix(prefix): float(v) for key, v in row.items() if key.startswith(prefix) and v}
        if figures:
            found[int(row["step"])] = figures
    return found


class PlainGradients:
    """What plain logits and autograd say of the weighted KD and LM loss, for the last layer, before each batch."""

    def __init__(self):
        self.found = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        ids, labels = batch.student.input_ids, batch.student.labels
        documents = {"position_ids": batch.student.position_ids} if batch.student.packed else {}
        student = pl_module.student(ids, **documents).logits[:, :-1].flatten(0, 1)
        teacher = pl_module.teacher.model(ids, **documents).logits[:, :-1].flatten(0, 1).detach()
        labels = labels[:, 1:].flatten()
        valid = labels != -100
        student, teacher, labels = student[valid], teacher[valid], labels[valid]
        log_q, log_p = (student / 2).log_softmax(-1), (teacher / 2).log_softmax(-1)
        kd = 0.7 * 4 * kl_div(log_q, log_p, log_target=True, reduction="batchmean")
        parameters = list(pl_module.student.model.layers[-1].parameters())
        vectors = [
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)])
            for loss in (kd, 0.3 * cross_entropy(student, labels))
        ]
        self.found.append(
            {
                "kd_loss_norm": vectors[0].norm(),
                "lm_loss_norm": vectors[1].norm(),
                "lm_loss_cosine": torch.cosine_similarity(*vectors, dim=0),
            }
        )


def test_norms_and_cosines_equal_plain_autograd(config, distill, monkeypatch):
    config["trainer"] |= {"max_steps": 4, "log_every_n_steps": 3}  # steps of ours that are none of the loggers'
    config["curriculum"] = {"feature": 0.0, "attention": 0.0}
    plain = PlainGradients()
    start = Gradients.on_train_batch_start

    def both(self, *args):
        plain.on_train_batch_start(*args)
        start(self, *args)

    monkeypatch.setattr(Gradients, "on_train_batch_start", both)
    cli = distill("fit", config, "--gradients.every_n_steps", "2")
    figures = logged(cli)
    assert sorted(figures) == [0, 2]
    for step, values in figures.items():
        assert values.pop("layer") == 1
        assert values == pytest.approx({k: float(v) for k, v in plain.found[step].items()}, rel=1e-4)


def test_a_component_that_taps_an_earlier_layer_moves_the_comparison_there(config, distill):
    config["model"]["routing"] |= {"teacher_layers": [1], "student_layers": [0]}
    config["curriculum"] = {"feature": 0.1, "attention": 0.1}
    config["trainer"]["max_steps"] = 1
    figures = logged(distill("fit", config, "--gradients", "{}"))[0]
    assert figures["layer"] == 0
    components = {name.removesuffix("_norm") for name in figures if name.endswith("_norm")}
    assert components == {
        "kd_loss",
        "lm_loss",
        *(f"routing_{name}_loss" for name in ("feature_matching", "expert_importance", "load_balancing")),
        "routing_attention_alignment_loss",
    }
    assert {name.removesuffix("_cosine") for name in figures if name.endswith("_cosine")} == components - {"kd_loss"}
    assert all(-1.0001 <= value <= 1.0001 for name, value in figures.items() if name.endswith("_cosine"))
    assert all(value > 0 for name, value in figures.items() if name.endswith("_norm"))


def test_without_kd_there_are_norms_but_no_cosines(config, distill):
    config["model"] |= {"kd_loss": None}
    config["trainer"]["max_steps"] = 1
    figures = logged(distill("fit", config, "--gradients.every_n_steps", "1"))[0]
    assert set(figures) == {"lm_loss_norm", "layer"}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_changes_no_bit_of_the_training(config, distill, checkpointing):
    config["model"] |= {
        "student_layers": None,
        "student_config": {
            "model_type": "llama", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "attention_dropout": 0.2,
        },
        "gradient_checkpointing": checkpointing,
    }  # fmt: skip
    config["curriculum"] = {"feature": [[0.0, 0.0], [0.5, 0.1]], "attention": 0.1}
    config["trainer"] |= {"max_steps": 4, "accumulate_grad_batches": 2}
    states, values = [], []
    for arguments in ([], ["--gradients.every_n_steps", "1"]):
        cli = distill("fit", config, *arguments)
        states.append({name: value.clone() for name, value in cli.model.state_dict().items()})
        values.append(logged(cli, "train/loss"))
    assert sorted(logged(cli)) == [0, 1, 2, 3]
    assert values[0] == values[1]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_it_is_off_by_default(config, distill):
    config["trainer"]["max_steps"] = 1
    cli = distill("fit", config)
    assert not any(isinstance(callback, Gradients) for callback in cli.trainer.callbacks)
    assert logged(cli) == {}


def test_a_distance_below_one_is_refused():
    with pytest.raises(UserError, match=r"gradients.every_n_steps: 0; give at least 1"):
        Gradients(every_n_steps=0)


def test_a_sharded_student_is_refused():
    trainer = SimpleNamespace(strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1))
    with pytest.raises(UserError, match=r"gradients: ModelParallelStrategy shards the student.*set gradients to null"):
        Gradients().setup(trainer, None, "fit")


@pytest.mark.slow
def test_two_ranks_train_alike_with_and_without_it(config, tmp_path):
    config["model"]["contrastive"] = {"tokens_per_row": 8, "queue_size": 64}
    config["curriculum"] = {"feature": 0.1, "attention": 0.1, "contrastive": 0.05}
    config["trainer"] |= {"max_steps": 3, "strategy": "ddp", "devices": 2}
    _, without, _ = fit(config, tmp_path / "without")
    rows, weights, _ = fit(config, tmp_path / "with", "--gradients.every_n_steps", "1")
    assert sum(bool(row["gradients/contrastive_loss_cosine"]) for row in rows) == 3
    assert without.keys() == weights.keys()
    assert all(torch.equal(without[name], weights[name]) for name in without)
