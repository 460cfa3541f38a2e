"""What goes wrong over the course of a run: flat losses, jumps, contradicting gradients, lost steps."""

import math
from dataclasses import replace

import pytest

from distill.commands.diagnose import diagnose
from distill.training.module import DistillationModule
from helpers.diagnosis import EXAMPLE, judge, names, plant_losses


def test_a_student_that_does_not_learn(finding, config):
    config["trainer"] |= {"max_steps": 24, "val_check_interval": 12}
    found = finding("loss flat", "--model.learning_rate", "1e-9")
    assert "val/kl_div_T1" in found.title
    assert "raise model.learning_rate" in found.fix


@pytest.mark.parametrize(("last", "step", "found"), [(0.0049, 12, []), (0.0049, 200, ["loss rises"]), (0.004, 12, [])])
def test_a_divergence_that_rises_is_not_in_order(tmp_path, last, step, found):
    (tmp_path / "metrics.csv").write_text(
        f"epoch,step,train/kd_loss,val/kl_div_T1\n0,5,0.1,0.0047\n0,{step},0.1,{last}\n"
    )
    (tmp_path / "config.yaml").write_text("trainer:\n  max_steps: 200\n")
    diagnosis = diagnose(str(tmp_path))
    assert names(diagnosis) == found
    assert any("val/kl_div_T1 went" in sentence for sentence in diagnosis.healthy) == (last < 0.0047)
    unclear = "val/kl_div_T1 went from 0.0047 to 0.0049 in 7 steps, too few to say why it did not fall."
    assert (unclear in diagnosis.not_judged) == (last > 0.0047 and step == 12)


def test_metrics_alone(tmp_path):
    header = "epoch,step,train/kd_loss,train/lr,curriculum/temperature\n"
    noise = [0.0, 0.02, -0.01, 0.01, -0.02]
    rows = [f"0,{step},{3.0 + noise[step % 5]},0.001,2.0" for step in range(0, 200, 10)]
    (tmp_path / "metrics.csv").write_text(header + "\n".join(rows) + "\n")
    (tmp_path / "config.yaml").write_text("trainer:\n  max_steps: 200\nmodel:\n  warmup_steps: 0\n")
    assert names(diagnose(str(tmp_path))) == ["loss flat"]
    falling = [f"0,{step},{3.0 - step / 200 + noise[step % 5]},0.001,2.0" for step in range(0, 200, 10)]
    (tmp_path / "metrics.csv").write_text(header + "\n".join(falling) + "\n")
    assert names(diagnose(str(tmp_path))) == []


def test_a_temperature_that_makes_the_loss_jump(finding, config):
    config["trainer"] |= {"max_steps": 16, "val_check_interval": 16}
    found = finding("temperature jump", "--curriculum.temperature", "[[0.5, 1.0], [0.51, 0.1]]")
    assert "temperature changes from 1 to 0.1" in found.title
    assert "at step 9" in found.title
    assert "val/kl_div_T1" in found.fix


def test_routed_experts_that_make_the_loss_jump(finding, config):
    config["model"] |= {"router_learning_rate": 0.1}
    config["model"]["routing"]["native_top_k"] = 1
    config["curriculum"] = {"feature": 1.0, "top_k_experts": [[0.5, 4.0], [0.51, 1.0]]}
    config["data"]["max_sequences"] = 4
    config["trainer"] |= {"max_steps": 24, "val_check_interval": None, "check_val_every_n_epoch": 24}
    found = finding("top-k jump")
    assert "top_k_experts changes from 4 to 1" in found.title
    assert "train/routing_" in found.title


def test_a_component_that_pulls_against_kd(finding, config, monkeypatch):
    true = DistillationModule.losses

    def losses(self, *args, **kwargs):
        result = true(self, *args, **kwargs)
        if kwargs.get("components") == ["lm_loss"] or (self.trainer.training and not kwargs.get("components")):
            agreement = true(self, *args, **{**kwargs, "components": ["kd_loss"]}).total
            result = replace(result, total=result.total - 2 * (agreement - agreement.detach()))
        return result

    monkeypatch.setattr(DistillationModule, "losses", losses)
    config["gradients"] = {"every_n_steps": 3}
    found = finding("contradicting gradients")
    assert "The gradient of lm_loss points against KD's" in found.title


def test_a_loss_that_is_not_a_number(finding, monkeypatch):
    def bug(module, result):
        bad = module.trainer.training and module.curriculum.step == 8
        return replace(result, total=result.total * math.nan) if bad else result

    plant_losses(monkeypatch, bug)
    found = finding("non-finite", "--trainer.val_check_interval", "12")
    assert "first at step 8" in found.title
    assert "[TRAIN DEBUG] step 8: Progress bar loss: nan" in found.evidence[0]


def test_skipped_steps(fit, config, monkeypatch):
    def bug(module, result):
        bad = module.trainer.training and module.curriculum.step == 6
        return replace(result, total=result.total * math.nan) if bad else result

    plant_losses(monkeypatch, bug)
    config["audit"] = {"on_nonfinite": "skip"}
    with pytest.warns(UserWarning, match="step skipped"):
        diagnosis = diagnose(fit())
    assert "skipped steps" in names(diagnosis)
    assert set(names(diagnosis)) <= {"skipped steps", "non-finite"}


def test_what_was_suspicious_at_the_start_is_a_finding(tmp_path):
    sentence = "teacher: its perplexity on the data is 9,9.0, worse than counting tokens (7.0): its weights are random"
    diagnosis = judge(f"Suspicious: {sentence}\n{EXAMPLE[EXAMPLE.index('[CURRICULUM]') :]}", tmp_path)
    assert names(diagnosis)[0] == "preflight"
    assert diagnosis.findings[0].title == sentence
    assert diagnosis.findings[0].evidence == [f"quoted.log line 1: Suspicious: {sentence}"]
