"""Every file in configs/ is what its first line says; the MoE recipe runs its whole curriculum on a tiny teacher."""

import csv
import math
import shlex
import shutil
from pathlib import Path

import pytest

from conftest import VOCABULARY, log_of
from distill.commands.fit import DistillCLI, run
from distill.curriculum import round_half_up
from distill.training.callbacks.curriculum import Curriculum
from helpers.tiny import tiny_qwen3_moe
from helpers.training_log import parse
from helpers.two_tokenizers import write_model

CONFIGS = Path(__file__).parent.parent / "configs"
RECIPES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml"))


def command(name: str) -> list[str]:
    """The arguments of the command that a file opens with."""
    words = shlex.split((CONFIGS / name).read_text().splitlines()[0])
    assert words[:4] == ["#", "distill", "fit", "--config"]
    assert words.count(f"configs/{name}") == 1
    return words[2:]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Monkeypatch of the module, in a working directory of its own that has the recipes where the commands expect."""
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "configs").symlink_to(CONFIGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["distill"])
        yield patch


def instantiated(elsewhere, name: str) -> DistillCLI:
    """The program behind a recipe's command, up to the point where it would run."""
    with elsewhere.context() as patch:
        patch.setattr(DistillCLI, "_run_subcommand", lambda self, subcommand: None)
        return run(command(name))


@pytest.mark.parametrize("name", RECIPES)
def test_the_command_of_each_recipe_is_understood(elsewhere, name):
    cli = instantiated(elsewhere, name)
    assert cli.model.components[0] == "kd_loss"
    assert cli.datamodule.dataset
    assert {"Curriculum", "TrainDebug", "LossAudit"} <= {type(callback).__name__ for callback in cli.trainer.callbacks}


def test_curricula_are_what_they_say(elsewhere):
    weights = {}
    for name in ("features_first", "kd_and_layers", "kd_only", "three_phases"):
        schedules = instantiated(elsewhere, f"curricula/{name}.yaml").config_init["fit"]["curriculum"]
        weights[name] = [schedules.state_at(step, 100).weights for step in (0, 29, 30, 100)]
    assert [(w["layerwise"], w["kd"]) for w in weights["features_first"]] == [(1, 0), (1, 0), (1, 1), (1, 1)]
    assert [(w["layerwise"], w["kd"]) for w in weights["kd_and_layers"]] == [(1, 1)] * 4
    assert [(w["layerwise"], w["kd"]) for w in weights["kd_only"]][:3] == [(0, 1)] * 3
    assert weights["three_phases"] == [Curriculum().state_at(step, 100).weights for step in (0, 29, 30, 100)]


def test_the_moe_recipe_has_the_settings_of_the_earlier_trainer(elsewhere):
    cli = instantiated(elsewhere, "moe_to_smollm.yaml")
    model, data, trainer = cli.model, cli.datamodule, cli.trainer
    assert model.teacher_source == "huihui-ai/Huihui-MoE-1B-A0.6B"
    assert (data.per_device_batch_size, trainer.accumulate_grad_batches, data.sequence_length) == (2, 16, 256)
    assert (model.options.learning_rate, model.options.router_learning_rate, model.options.warmup_steps) == (
        3e-5,
        1e-4,
        500,
    )
    assert trainer.max_epochs == 3
    assert model.options.gradient_checkpointing
    coefficients = dict.fromkeys(model.routing.components, 1.0) | {"routing_load_balancing_loss": 0.01}
    assert model.routing.coefficients == coefficients
    (curriculum,) = (callback for callback in trainer.callbacks if isinstance(callback, Curriculum))
    assert curriculum.weights == Curriculum().weights
    assert (curriculum.temperature, curriculum.top_k_experts) == (2.0, [[0, 1], [1, 3]])
    assert model.options.student == "HuggingFaceTB/SmolLM-135M"


@pytest.fixture(scope="module")
def teacher(assets, tmp_path_factory) -> Path:
    """A Qwen3-MoE with 3 experts, one of them per token, like the recipe's."""
    folder = tmp_path_factory.mktemp("moe") / "teacher"
    shutil.copytree(assets / "llama", folder, ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    sizes = {"vocab_size": VOCABULARY, "num_hidden_layers": 4, "num_experts": 3, "num_experts_per_tok": 1}
    tiny_qwen3_moe(**sizes).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    """Of another tokenizer than the teacher's, like the recipe's."""
    folder = tmp_path_factory.mktemp("moe") / "student"
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 3}
    write_model(folder, "byte_bpe", 360, **sizes, num_key_value_heads=1, max_position_embeddings=2048)
    return folder


@pytest.fixture(scope="module")
def moe_run(elsewhere, assets, teacher, student):
    """The recipe's own command, with other models, data and sizes: 7 optimizer steps in each of its 3 epochs."""
    options = {
        "model.teacher": teacher,
        "model.student": student,
        "model.warmup_steps": 2,
        "model.learning_rate": 3e-3,
        "model.router_learning_rate": 3e-3,
        "data.dataset": assets / "text.txt",
        "data.dataset_config": "null",
        "data.validation_split": 0.05,
        "data.sequence_length": 32,
        "data.max_sequences": 7 * 4 * 2,
        "data.max_validation_sequences": 8,
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.accumulate_grad_batches": 4,
        "trainer.log_every_n_steps": 1,
        "train_debug.every_n_batches": 27,
        "progress": "null",
    }
    return run([*command("moe_to_smollm.yaml"), *(f"--{key}={value}" for key, value in options.items())])


def test_the_moe_recipe_runs_its_whole_curriculum(moe_run):
    model, trainer = moe_run.model, moe_run.trainer
    assert (trainer.max_epochs, trainer.global_step) == (3, 21)
    assert (model.num_experts, model.routing.native_k, model.routing.tau) == (3, 1, 1.0)
    student = model.student.config
    assert (student.vocab_size, student.hidden_size) == (360, 24)
    assert model.student.is_activation_checkpointing
    assert model.routing.coefficients["routing_load_balancing_loss"] == 0.01
    rates = {group["initial_lr"] for group in trainer.optimizers[0].param_groups}
    assert rates == {3e-3}

    blocks = parse(log_of(moe_run))
    debug = [block for block in blocks if block.kind == "TRAIN DEBUG"]
    assert [block.step for block in debug] == [0, 6, 7, 13, 14, 20]
    for block in debug:
        named = {name for name in block.values if name.endswith("_loss")}
        late = set() if block.step >= 13 else {"contrastive_loss"}  # from 60% of the run
        assert named == ({"kd_loss", "lm_loss"} if block.step < 7 else set(model.components) - late)
        figures = [block.values[key] for key in ("bar", "sum", "total", "grad")]
        assert max(figures) - min(figures) <= 1e-4
    assert len(model.components) == 7
    routing = [block for block in blocks if block.kind == "ROUTING LOSSES"]
    assert all(block.values["feature_matching_loss.raw"] > 0.1 for block in routing)
    evaluations = [block.values for block in blocks if block.kind == "Eval"]
    assert {key.removesuffix(".raw") for key in evaluations[-1] if key.endswith(".raw")} == set(model.components)
    assert len(evaluations) == 12  # a quarter of an epoch apart, each at the end of an accumulation window
    assert evaluations[-1]["lm_loss.raw"] < evaluations[0]["lm_loss.raw"] - 0.2
    assert evaluations[-1]["routing_expert_importance_loss.raw"] > 0


def test_its_metrics_show_the_experts(moe_run):
    with Path(moe_run.trainer.log_dir, "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["curriculum/top_k_experts"]]
    assert [int(row["step"]) for row in rows] == list(range(21))
    expected = [round_half_up(1 + 2 * step / 21) for step in range(21)]
    assert [float(row["curriculum/top_k_experts"]) for row in rows] == expected
    assert expected[-1] == 3
    for step, row in enumerate(rows):
        assert 0 < float(row["routing/mean_gap"]) < 20
        assert 0 < float(row["routing/gate_entropy"]) <= math.log(3)
        assert 1 / 3 - 1e-6 <= float(row["routing/expert_usage_max"]) <= 1
        importance = float(row["routing/constant_gate_kl"]) - float(row["routing/probe_gain"])
        assert importance > 0  # a KL divergence
        if expected[step] == 3:  # every expert is chosen on every token
            assert float(row["routing/expert_usage_max"]) == pytest.approx(1 / 3, abs=1e-6)
