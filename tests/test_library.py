"""`distill` used from Python: what is importable, what a run has without the command, and what is refused by name."""

import subprocess
import sys

import lightning as L
import pytest
import torch

import distill as library
from distill import (
    AttentionTransfer,
    Contrastive,
    Curriculum,
    DistillationDataModule,
    DistillationModule,
    ExactResume,
    KDLoss,
    Layerwise,
    LoRA,
    LossAudit,
    Routing,
    UserError,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's to a user of the library


def trainer(**options) -> L.Trainer:
    """A trainer that knows nothing of us and keeps nothing."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(**(quiet | {"max_steps": 4, "logger": False, "enable_checkpointing": False} | options))


@pytest.fixture
def parts(assets, tmp_path, monkeypatch):
    """Makes a module and its data."""
    monkeypatch.chdir(tmp_path)
    data = {"dataset": str(assets / "text.txt"), "sequence_length": 32, "max_validation_sequences": 8}

    def make(**options):
        return DistillationModule(str(assets / "llama"), student_layers=2, **options), DistillationDataModule(**data)

    return make


def test_every_name_is_there_and_none_is_imported_before_it_is_asked_for():
    for name in library.__all__:
        assert getattr(library, name).__name__ == name
    assert set(library.__all__) <= set(dir(library))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = library.no_such_name
    program = "import sys, distill; from distill import UserError; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_trainer_without_a_curriculum_is_told_its_weights(parts, caplog):
    module, data = parts()
    plain = trainer()
    with caplog.at_level("INFO"):
        plain.fit(module, data)
    assert "every loss weighs 1 throughout, at temperature 1" in caplog.text
    assert set(module.component_weights().values()) == {1.0}
    assert module.curriculum.temperature == 1.0
    assert [type(callback) for callback in plain.callbacks].count(ExactResume) == 1


def test_a_curriculum_that_is_given_stays(parts):
    module, data = parts()
    given = Curriculum(kd=1.0, lm=0.0, temperature=1.0)
    trainer(callbacks=[given]).fit(module, data)
    assert module.curriculum == given.state_at(3, 4)


def test_the_command_brings_back_no_audit_that_was_switched_off(distill, config):
    config["trainer"]["max_steps"] = 2
    cli = distill("fit", config, "--audit", "null")
    kinds = [type(callback) for callback in cli.trainer.callbacks]
    assert kinds.count(Curriculum) == kinds.count(ExactResume) == 1
    assert LossAudit not in kinds
    assert LossAudit in [type(callback) for callback in distill("fit", config).trainer.callbacks]


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("kd_loss", KDLoss),
        ("lora", LoRA),
        ("routing", Routing),
        ("attention", AttentionTransfer),
        ("layerwise", Layerwise),
        ("contrastive", Contrastive),
    ],
)
def test_a_section_of_the_yaml_as_a_dict_is_told_its_class(key, kind):
    words = rf"^model.{key}: \{{'a': 1\}} is a dict; give distill.{kind.__name__}\(a=1\)$"
    with pytest.raises(UserError, match=words):
        DistillationModule("teacher", student_layers=2, **{key: {"a": 1}})


def test_a_checkpoint_gives_its_student_and_says_how(parts, tmp_path):
    module, data = parts()
    plain = trainer()
    plain.fit(module, data)
    plain.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"a.ckpt has no teacher .*distill.load_student\(path\).model is its student"):
        DistillationModule.load_from_checkpoint(tmp_path / "a.ckpt")
    student = library.load_student(tmp_path / "a.ckpt").model
    assert torch.equal(student.lm_head.weight, module.student.lm_head.weight)
