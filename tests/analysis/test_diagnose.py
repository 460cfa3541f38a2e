"""`distill diagnose` on real short runs with a fault planted in each, on healthy ones, and on quoted lines."""

import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from torch.optim.lr_scheduler import LambdaLR

import distill.training.module
from distill.cli import COMMANDS
from distill.commands.diagnose import diagnose, main
from distill.curriculum import WEIGHT_KEY
from distill.errors import UserError
from distill.losses.routing import Routing
from distill.training.module import DistillationModule

EXAMPLE = (Path(__file__).parents[1] / "assets" / "quoted.log").read_text()


FEATURE = "routing_feature_matching_loss"


def names(diagnosis):
    return [finding.name for finding in diagnosis.findings]


@pytest.fixture
def fit(distill, config):
    """Runs a short fit and returns its directory."""
    config["train_debug"], config["preflight"] = {"every_n_batches": 4}, None  # which suspects an untrained teacher
    config["model"]["learning_rate"] = 1e-2
    config["model"]["routing"]["teacher_layers"] = 1
    config["trainer"] |= {"max_steps": 12, "val_check_interval": 6, "enable_model_summary": False}
    config["data"]["max_validation_sequences"] = 4
    config["checkpoint"] = None

    def call(*args: str) -> str:
        return distill("fit", config, *args).trainer.log_dir

    return call


@pytest.fixture
def finding(fit, config):
    """Runs a faulty fit, audit off; the one thing that is found must have the name given."""
    config["audit"] = None

    def call(name: str, *args: str):
        diagnosis = diagnose(fit(*args))
        assert names(diagnosis) == [name], [found.title for found in diagnosis.findings]
        return diagnosis.findings[0]

    return call


def plant_losses(monkeypatch, bug):
    """Replaces the module's losses by `bug(module, result)` of the true ones."""
    true = DistillationModule.losses
    monkeypatch.setattr(DistillationModule, "losses", lambda self, *a, **k: bug(self, true(self, *a, **k)))


def plant_schedule(monkeypatch, times=1.0, factor=None):
    """Another unit for the schedule's steps, or a constant factor instead of it."""
    true = distill.training.module.warmup_cosine

    def schedule(optimizer, warmup, horizon, floor):
        if factor is not None:
            return LambdaLR(optimizer, lambda step: factor)
        return true(optimizer, int(warmup * times), int(horizon * times), floor)

    monkeypatch.setattr(distill.training.module, "warmup_cosine", schedule)


# Weights


def test_losses_added_without_their_weight(finding, monkeypatch):
    true = DistillationModule.losses

    def losses(self, *args, **kwargs):
        state = self.curriculum
        if self.trainer.training:
            self.curriculum = replace(state, weights={**state.weights, "feature": 1.0})
        result = true(self, *args, **kwargs)
        self.curriculum = state
        return result

    monkeypatch.setattr(DistillationModule, "losses", losses)
    found = finding("routing bypass")
    assert FEATURE in found.title
    assert "training.log line" in found.evidence[0]
    assert "[CURRICULUM] step 0: feature: 0.0000" in found.evidence[0]
    assert "skip components of weight zero" in found.fix


def test_a_raw_value_in_the_total_that_the_components_do_not_list(finding, monkeypatch):
    def bug(module, result):
        raw = result.breakdown.raw
        hidden = module.training and FEATURE in raw and module.curriculum.weights["feature"] == 0
        return replace(result, total=result.total + raw[FEATURE]) if hidden else result

    plant_losses(monkeypatch, bug)
    found = finding("routing bypass")
    assert f"({FEATURE})" in found.title
    assert [line.split(": ")[1] for line in found.evidence[:3]] == [
        "Sum of components",
        "Total loss (outputs['loss'])",
        "Raw",
    ]


def test_validation_with_all_weights_at_one(finding, monkeypatch):
    true = DistillationModule.on_validation_epoch_start

    def start(self):
        self.curriculum = replace(self.curriculum, weights=dict.fromkeys(self.curriculum.weights, 1.0))
        true(self)

    monkeypatch.setattr(DistillationModule, "on_validation_epoch_start", start)
    found = finding("eval bypass")
    assert "kd_loss" in found.title
    assert FEATURE in found.title
    assert "give validation the curriculum's state" in found.fix


def test_validation_loss_is_the_sum_of_raw_values(finding, monkeypatch):
    true = DistillationModule.log_dict

    def log_dict(self, figures, *args, **kwargs):
        if "val/loss" in figures:
            parts = [figures[f"val/{name}"] for name in WEIGHT_KEY if f"val/{name}" in figures]
            figures = figures | {"val/loss": sum(parts)}
        true(self, figures, *args, **kwargs)

    monkeypatch.setattr(DistillationModule, "log_dict", log_dict)
    found = finding("eval bypass")
    assert "its components add up to" in found.evidence[0]


def test_validation_at_another_temperature(finding, monkeypatch):
    true = DistillationModule.losses

    def losses(self, *args, **kwargs):
        state = self.curriculum
        if not self.trainer.training:
            self.curriculum = replace(state, temperature=0.1)
        result = true(self, *args, **kwargs)
        self.curriculum = state
        return result

    monkeypatch.setattr(DistillationModule, "losses", losses)
    found = finding("train/eval gap", "--curriculum.lm", "0.0")
    assert "On the same weighting validation is 0." in found.title
    assert "kd_loss: raw" in found.evidence[0]
    assert "(training: raw" in found.evidence[0]
    assert "temperature" in found.cause


# Sums and sizes


def test_a_total_that_is_not_the_sum(finding, monkeypatch):
    def bug(module, result):
        return replace(result, total=result.total * 1.01) if module.training else result

    plant_losses(monkeypatch, bug)
    found = finding("sum differs")
    assert "Sum of components" in found.evidence[0]
    assert "something is added to the total" in found.cause


def test_accumulation_applied_twice(finding, monkeypatch):
    true = DistillationModule.training_step

    def training_step(self, *args):
        outputs = true(self, *args)
        return outputs | {"loss": outputs["loss"] / self.trainer.accumulate_grad_batches}

    monkeypatch.setattr(DistillationModule, "training_step", training_step)
    found = finding("sum differs", "--trainer.accumulate_grad_batches", "2")
    assert "divided by 2 once more" in found.cause


def test_a_loss_that_is_not_normalised(finding, monkeypatch):
    true = Routing.forward

    def forward(self, *args, **kwargs):
        result = true(self, *args, **kwargs)
        return replace(result, sums={n: v * 412.0 if n == FEATURE else v for n, v in result.sums.items()})

    monkeypatch.setattr(Routing, "forward", forward)
    found = finding("raw scale")
    assert f"The raw value of {FEATURE} dwarfs" in found.title
    assert "normalise the target" in found.fix


# Learning rate and learning


def test_learning_rate_zero(finding, monkeypatch):
    plant_schedule(monkeypatch, factor=0.0)
    found = finding("learning rate zero")
    assert "12 of 12 logged values" in found.title
    assert "step 0: train/lr 0" in found.evidence[0]


@pytest.mark.filterwarnings("ignore:model.warmup_steps")
def test_warm_up_outlasts_the_run(finding):
    found = finding("schedule horizon", "--model.warmup_steps", "500")
    assert "warm-up of 500 steps outlasts the run of 12" in found.title


@pytest.mark.parametrize(
    ("times", "title"),
    [(4.0, "at step 11 of 12 it is still"), (0.25, "it is at its floor from step")],
    ids=["horizon", "stepping"],
)
def test_schedule_counted_in_micro_batches(finding, monkeypatch, times, title):
    plant_schedule(monkeypatch, times)
    found = finding("schedule horizon", "--trainer.accumulate_grad_batches", "4", "--trainer.val_check_interval", "48")
    assert title in found.title
    assert "counted in micro-batches: accumulate_grad_batches is 4" in found.cause
    assert "count optimizer steps" in found.fix


def test_a_student_that_does_not_learn(finding, config):
    config["trainer"] |= {"max_steps": 24, "val_check_interval": 12}
    found = finding("loss flat", "--model.learning_rate", "1e-9")
    assert "val/kl_div_T1" in found.title
    assert "raise model.learning_rate" in found.fix


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


# Numbers that are not finite


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


# Healthy runs


def test_six_components_in_three_phases(fit, capsys):
    run = fit()
    capsys.readouterr()
    assert main([run]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{run}: healthy\n")
    assert "Curriculum working: where feature, attention" in text
    assert "wait for more steps" in " ".join(text.split())
    assert "Sum of components = total in every TRAIN DEBUG block (3)." in text
    assert "Validation weighs like training in every evaluation (2)." in text
    assert "The learning rate is above zero and fits the run: 2.687e-04 to 1.000e-02." in text
    assert "Not judged" not in text


def test_kd_alone_with_accumulation_and_warm_up(fit, config):
    config["model"]["routing"] = None
    run = fit(*["--trainer.accumulate_grad_batches", "2", "--model.warmup_steps", "4", "--model.lm_loss", "false"])
    assert names(diagnose(run)) == []


def test_a_moe_teacher_with_slow_schedules(fit, config, assets):
    config["model"] |= {"teacher": str(assets / "qwen3_moe"), "routing": {"teacher_layers": 1}}
    config["curriculum"] = {"temperature": [[0.0, 4.0], [1.0, 1.0]], "top_k_experts": [[0.0, 2.0], [1.0, 4.0]]}
    assert names(diagnose(fit())) == []


def test_a_run_that_is_still_going_is_healthy_at_every_moment(fit, config, tmp_path):
    config["trainer"]["val_check_interval"] = 3
    run = Path(fit())
    blocks = re.split(r"(?<=\n)\n(?=\n)", (run / "training.log").read_text())
    header, *rows = (run / "metrics.csv").read_text().splitlines(keepends=True)
    step = header.rstrip().split(",").index("step")
    part = tmp_path / "part"
    part.mkdir()
    (part / "config.yaml").write_text((run / "config.yaml").read_text())
    assert len(blocks) > 30
    for number in range(1, len(blocks) + 1):
        text = "\n".join(blocks[:number])
        last = max(int(found) for found in re.findall(r"Step (\d+)", text))
        (part / "training.log").write_text(text)
        (part / "metrics.csv").write_text(header + "".join(r for r in rows if int(r.split(",")[step]) <= last))
        assert names(diagnose(str(part))) == [], number


# Quoted lines and the earlier trainer's log


def judge(text, tmp_path):
    path = tmp_path / "quoted.log"
    path.write_text(text)
    return diagnose(str(path))


@pytest.mark.parametrize(
    "text",
    [
        "CURRICULUM says\n[CURRICULUM] Progress 2.7% (Phase 1)\n[TRAIN DEBUG] routing_feature_matching_loss: 41.22",
        "[TRAIN DEBUG] Total: 56.7\n  routing_feature_matching_loss: 41.22\n[CURRICULUM] Step 2500\n  feature: 0.0000",
        "feature_matching_loss: Weight: 0.0000, Scaled: 41.2200\n",
        "2024-05-01 10:00:00 INFO [CURRICULUM] Step 2500, Progress 3.3%\n2024-05-01 INFO   feature: 0.0000\n"
        "2024-05-01 INFO [TRAIN DEBUG] Step 2600, Batch 2600\n2024-05-01 INFO   routing_feature_matching_loss: 41.2200",
    ],
    ids=["phase", "block", "routing line", "logger"],
)
def test_routing_bypass_in_the_forms_that_people_quote(tmp_path, text):
    diagnosis = judge(text, tmp_path)
    assert names(diagnosis) == ["routing bypass"]
    assert FEATURE in diagnosis.findings[0].title
    assert "skip components of weight zero" in diagnosis.findings[0].fix


@pytest.mark.parametrize(
    "text",
    [
        "[CURRICULUM] Progress 2.7% (Phase 1)\nfeature_matching_loss: Weight: 0.0000, Scaled: 0.0000\n"
        "[TRAIN DEBUG] Total: 15.5\n[Eval] loss: 95.86\n",
        "[TRAIN DEBUG] Step 2400, Total: 15.5\n[Eval] Step 2500, loss: 95.86\n",
        "[CURRICULUM] Step 2500, Progress 3.3%\n  kd: 0.7000\n  feature: 0.0000\n\n[Eval] Step 2500, loss: 56.6\n"
        "    kd_loss: 14.6\n    routing_feature_matching_loss: 41.22\n",
    ],
    ids=["short", "steps", "components"],
)
def test_eval_bypass_in_the_forms_that_people_quote(tmp_path, text):
    diagnosis = judge(text, tmp_path)
    assert names(diagnosis) == ["eval bypass"]
    assert "give validation the curriculum's state" in diagnosis.findings[0].fix


def test_curriculum_working_in_the_forms_that_people_quote(tmp_path):
    text = "[CURRICULUM] Progress 2.7% (Phase 1)\nfeature_matching_loss: Weight: 0.0000, Scaled: 0.0000\n"
    diagnosis = judge(text + "[TRAIN DEBUG] Total: 15.5\n[Eval] loss: 19.86\n", tmp_path)
    assert names(diagnosis) == []
    assert "wait for more steps" in diagnosis.healthy[0]


def test_the_example_blocks(tmp_path):
    bypass = judge(EXAMPLE, tmp_path)
    assert names(bypass) == ["routing bypass", "raw scale"]
    assert "412.2341" in bypass.findings[1].title
    working = EXAMPLE.replace("412.2341", "1.2341")
    for name in ("feature_matching", "expert_importance", "load_balancing"):
        working = "\n".join(line for line in working.split("\n") if f"    routing_{name}_loss" not in line)
    working = working.replace("15.4521", "14.7234")
    assert names(judge(working, tmp_path)) == []
    evaluated = working + "\n[Eval] Step 2500, loss: 95.8600\n    kd_loss: raw 20.9, weight 0.7, scaled 14.63\n"
    assert names(judge(evaluated, tmp_path)) == ["eval bypass"]


def test_a_weight_that_rises_between_two_blocks_is_no_bypass(tmp_path):
    later = EXAMPLE.replace("[CURRICULUM] Step 2500, Progress 3.3%", "[CURRICULUM] Step 20, Progress 30.0%")
    later = later.replace("Step 2100", "Step 36").replace("412.2341", "1.2341").replace("Step 2500", "Step 20")
    assert names(judge(later, tmp_path)) == []


def test_a_bar_that_shows_a_rate_of_zero(tmp_path):
    bars = "\n".join(f"Epoch 0: 1%| {step}/75000 [v_num=0, loss=15.5, lr=0.00e+00]" for step in range(3))
    assert names(judge(bars, tmp_path)) == ["learning rate zero"]
    assert names(judge(bars + " lr=7.960e-06", tmp_path)) == []


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


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("{routing: null, attention: null, layerwise: {}, contrastive: null}", "where layerwise weigh"),
        ("{routing: {}, layerwise: null}", "where feature, attention weigh"),
        ("{routing: null}", ""),
        (None, "where feature, attention, layerwise, contrastive weigh"),
    ],
)
def test_components_that_a_run_does_not_have_are_not_spoken_of(tmp_path, model, said):
    (tmp_path / "training.log").write_text(EXAMPLE[EXAMPLE.index("[CURRICULUM]") : EXAMPLE.index("[KD LOSS]")])
    if model is not None:
        (tmp_path / "config.yaml").write_text(f"model: {model}\n")
    sentences = diagnose(str(tmp_path)).healthy
    assert [sentence.split(" 0.0000")[0] for sentence in sentences if "Curriculum working" in sentence] == (
        [f"Curriculum working: {said}"] if said else []
    )


def test_what_was_suspicious_at_the_start_is_a_finding(tmp_path):
    sentence = "teacher: its perplexity on the data is 9,9.0, worse than counting tokens (7.0): its weights are random"
    diagnosis = judge(f"Suspicious: {sentence}\n{EXAMPLE[EXAMPLE.index('[CURRICULUM]') :]}", tmp_path)
    assert names(diagnosis)[0] == "preflight"
    assert diagnosis.findings[0].title == sentence
    assert diagnosis.findings[0].evidence == [f"quoted.log line 1: Suspicious: {sentence}"]


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


@pytest.mark.parametrize(
    ("ratio", "first", "rate_of"),
    [
        (0.0, 180, lambda step: 1e-3 * (1 - step / 220)),  # resumed, so that the peak is not to be seen
        (0.5, 0, lambda step: 1e-3 * (0.5 + 0.5 * (1 - step / 200))),
    ],
)
def test_a_rate_that_ends_high_for_a_reason_is_in_order(tmp_path, ratio, first, rate_of):
    rows = [f"0,{step},{3 - step / 200},{rate_of(step)},2.0" for step in range(first + 2, 200, 2)]
    header = "epoch,step,train/kd_loss,train/lr,val/kl_div_T1\n"
    (tmp_path / "metrics.csv").write_text(header + "\n".join(rows) + "\n")
    options = f"model: {{warmup_steps: 0, min_learning_rate_ratio: {ratio}}}\n"
    (tmp_path / "config.yaml").write_text("trainer: {max_steps: 200}\n" + options)
    assert "schedule horizon" not in names(diagnose(str(tmp_path)))
    assert ("loss flat" in names(diagnose(str(tmp_path)))) == (first == 0)  # resumed runs are not judged


# The command


def test_json_from_standard_input(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("[TRAIN DEBUG] Total: 15.5\n[Eval] loss: 95.86\n"))
    assert main(["-", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert [found["name"] for found in document["findings"]] == ["eval bypass"]
    assert document["findings"][0]["evidence"][1].startswith("stdin line 2, [Eval]: [Eval] loss: 95.86")
    assert set(document) == {"source", "findings", "healthy", "not_judged"}
    assert "diagnose" in COMMANDS


@pytest.mark.parametrize(
    ("files", "source", "message"),
    [
        ({}, "absent", "absent does not exist"),
        ({"training.log": "nothing of ours\n"}, "training.log", r"no block of a training\.log"),
        ({"metrics.csv": "epoch,loss\n0,1\n"}, ".", "no column step"),
        ({"metrics.csv": "epoch,step,loss\n0,1,one\n"}, ".", r"metrics\.csv line 2 is not numbers"),
        ({"training.log": "[Eval] loss: 1\n", "config.yaml": "a: [\n"}, ".", "is no YAML"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, files, source, message):
    monkeypatch.chdir(tmp_path)
    for name, text in files.items():
        Path(name).write_text(text)
    with pytest.raises(UserError, match=message):
        diagnose(source)


def test_a_wrong_argument_is_one_line():
    with pytest.raises(UserError, match=r"unrecognized arguments: --jsn; see distill diagnose --help"):
        main(["run", "--jsn"])
