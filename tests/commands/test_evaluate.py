"""Evaluation gives the figures of validation, and those of a plain computation on whole logits."""

import importlib.util
import json
import math
import subprocess
import sys
import warnings

import pytest
import torch

from conftest import log_of
from distill.commands import evaluate as command
from distill.commands.evaluate import evaluate
from distill.commands.pair import load_pair, validation_data
from distill.errors import UserError
from distill.evaluation.measure import gap_closed_percent
from distill.evaluation.tasks import open_tasks
from distill.models.load import load_model, load_tokenizer
from helpers import local_task
from helpers.finished_run import finished_run


@pytest.fixture(scope="module")
def run(assets, tmp_path_factory):
    """Checkpoint and metrics of its last validation, by their names in the log."""
    path, cli = finished_run(assets, tmp_path_factory.mktemp("run"))
    metrics = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    assert "[Eval] Step 2" in log_of(cli)
    return path, metrics


@pytest.fixture(scope="module")
def report(run, assets):
    return evaluate(run[0], baselines={"itself": run[0], "teacher again": str(assets / "llama")})


def test_figures_are_those_of_validation(run, report):
    student, teacher = report["models"]["student"], report["models"]["teacher"]
    for ours, theirs in (
        ("nll", "student_nll"),
        ("perplexity", "student_perplexity"),
        ("bits_per_byte", "bits_per_byte"),
        ("ece", "ece"),
        ("entropy", "student_entropy"),
        ("kl_div_T1", "kl_div_T1"),
        ("top1_agreement", "top1_agreement"),
        ("top5_agreement", "top5_agreement"),
        ("acceptance", "acceptance"),
    ):
        assert student[ours] == pytest.approx(run[1][f"val/{theirs}"], rel=1e-6), ours
        assert f"{student[ours]:.4f}" == f"{run[1][f'val/{theirs}']:.4f}"
    assert f"{teacher['perplexity']:.4f}" == f"{run[1]['val/teacher_perplexity']:.4f}"
    assert student["entropy_gap"] == pytest.approx(student["entropy"] - teacher["entropy"])


def test_figures_are_those_of_whole_logits(run, report, assets):
    pair = load_pair(run[0])
    rows = validation_data(pair)
    logprobs = {"teacher": [], "student": []}
    labels = []
    for batch in rows.val_dataloader():
        keep = batch.student.positions
        labels.append(batch.student.labels.flatten()[keep + 1])
        for name, model in (("teacher", pair.teacher.model), ("student", pair.student.model)):
            with torch.no_grad():
                logits = model(batch.student.input_ids).logits  # one document: rows need no position ids
            logprobs[name].append(logits.double().log_softmax(-1).flatten(0, 1)[keep])
    p, q, label = torch.cat(logprobs["teacher"]), torch.cat(logprobs["student"]), torch.cat(labels)
    student, teacher = report["models"]["student"], report["models"]["teacher"]
    nll = {name: -x.gather(1, label[:, None]).mean().item() for name, x in (("teacher", p), ("student", q))}
    assert report["measured_on"]["tokens"] == len(label)
    assert teacher["nll"] == pytest.approx(nll["teacher"], rel=1e-5)
    assert student["nll"] == pytest.approx(nll["student"], rel=1e-5)
    assert student["accuracy"] == pytest.approx((q.argmax(-1) == label).double().mean().item())
    assert teacher["accuracy"] == pytest.approx((p.argmax(-1) == label).double().mean().item())
    assert student["kl_div_T1"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    fives = zip(p.topk(5).indices.tolist(), q.topk(5).indices.tolist(), strict=True)
    shared = sum(len(set(theirs) & set(ours)) for theirs, ours in fives) / 5 / len(label)
    assert student["top5_agreement"] == pytest.approx(shared)
    accepted = torch.minimum(p.exp(), q.exp()).sum(-1).mean().item()
    assert student["acceptance"] == pytest.approx(accepted, abs=1e-6)
    share, drafts = speculative(p.exp(), q.exp(), 20_000)
    assert abs(share - accepted) < 3 * math.sqrt(accepted * (1 - accepted) / drafts)
    entropy = {name: -(x.exp() * x).sum(-1).mean().item() for name, x in (("teacher", p), ("student", q))}
    assert student["entropy_gap"] == pytest.approx(entropy["student"] - entropy["teacher"], abs=1e-5)
    assert student["retention_percent"] == pytest.approx(100 * math.exp(nll["teacher"] - nll["student"]), rel=1e-5)


def speculative(p, q, least: int) -> tuple[float, int]:
    """Share of at least so many drafts x ~ q, as many at each place, taken with probability min(1, p(x) / q(x))."""
    generator = torch.Generator().manual_seed(0)
    drafts = q.multinomial(-(-least // len(q)), replacement=True, generator=generator)
    chance = (p.gather(1, drafts) / q.gather(1, drafts)).clamp(max=1)
    taken = torch.rand(chance.shape, dtype=chance.dtype, generator=generator) < chance
    return taken.double().mean().item(), taken.numel()


def test_baselines_and_sizes(report, assets):
    models = report["models"]
    same = {"tokens_per_s"}
    assert {k: v for k, v in models["itself"].items() if k not in same} == {
        k: v for k, v in models["student"].items() if k not in same
    }
    again = models["teacher again"]
    assert again["kl_div_T1"] == pytest.approx(0, abs=1e-9)
    assert again["top1_agreement"] == again["top5_agreement"] == 1
    assert again["acceptance"] == pytest.approx(1)
    assert again["retention_percent"] == pytest.approx(100)
    assert report["gap_closed_percent"]["itself"] == pytest.approx({"nll": 0.0, "kl_div_T1": 0.0})
    assert report["gap_closed_percent"]["teacher again"] == {"nll": None, "kl_div_T1": None}
    parameters = load_model(str(assets / "llama")).num_parameters()
    assert models["teacher"]["parameters"] == parameters
    assert models["teacher"]["weights_MB"] == pytest.approx(parameters * 4 / 1e6)
    assert models["student"]["tokens_per_s"] > 0
    assert report["peak_memory_MB"] > 100


def test_gap_closed():
    assert gap_closed_percent(4.0, 2.5, goal=2.0) == 75
    assert gap_closed_percent(4.0, 5.0, goal=2.0) == -50


def test_any_model_on_any_text(run, assets, tmp_path):
    text = tmp_path / "other.txt"
    text.write_text("for name in names:\n    print(name)\n" * 50)
    model = str(assets / "qwen3_moe")
    report = evaluate(model, teacher=str(assets / "llama"), text=str(text), data={"sequence_length": 32})
    tokens = len(load_tokenizer(model)(text.read_text())["input_ids"]) + 1  # and the end of the document
    rows = math.ceil(tokens / 32)
    assert report["measured_on"]["rows"] == rows
    assert report["measured_on"]["tokens"] == tokens - rows  # a row's first token has no label
    assert report["models"]["student"]["kl_div_T1"] > 0
    whole = evaluate(run[0], text=str(text), data={"sequence_length": 32})  # whatever the run validated on
    assert whole["measured_on"]["rows"] == rows


def test_command_prints_a_table_or_json(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert command.main(["--data.max_validation_sequences", "2", run[0], "--baseline", f"itself={run[0]}"]) == 0
    out = capsys.readouterr().out
    for line in (
        "NLL (nats per token)",
        "top-5 agreement",
        "retention (%)",
        "KL student closes (%)",
        "tokens per second",
    ):
        assert line in out
    assert "2 rows of at most 32 tokens" in out
    assert command.main([run[0], "--json", "--data.max_validation_sequences=2"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["measured_on"]["rows"] == 2
    assert set(report["models"]) == {"teacher", "student"}


def test_refusals_name_key_and_remedy(run, assets, tmp_path):
    model = str(assets / "llama")
    for arguments, message in (
        ([model], "--teacher: none is given"),
        ([model, "--teacher", model], "--text: none is given"),
        ([run[0], "--baseline", "x"], "--baseline: 'x' is not of the form NAME=MODEL"),
        ([run[0], "--baseline", f"teacher={model}"], "--baseline: 'teacher' is taken"),
        ([run[0], "--baseline", f"x={tmp_path}/none"], "--baseline x: .* does not exist"),
        ([run[0], "--data.sequence_lenth", "3"], "--data.sequence_lenth: there is no such key"),
        ([run[0], "--data.sequence_length", "1"], "data.sequence_length: 1; give 2 or more"),
        ([run[0], "--data.seed"], "--data.seed: no value"),
        ([run[0], "--nonsense"], "--nonsense: there is no such argument; see distill evaluate --help"),
        ([run[0], "--limit", "0"], "--limit: 0; give 1 or more"),
        ([], "the following arguments are required: student"),
    ):
        with pytest.raises(UserError, match=message):
            command.main(arguments)


def test_tasks_say_what_to_install(run, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--tasks: needs lm_eval and accelerate; run `pip install 'student-aware-dis"):
        evaluate(run[0], tasks=["hellaswag"])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra `tasks`")
def test_local_tasks(run, tmp_path):
    local_task.write(tmp_path)
    arguments = [run[0], "--tasks", local_task.NAME, "--task_folder", str(tmp_path), "--json"]
    shown = subprocess.run(
        [sys.executable, "-m", "distill.cli", "evaluate", *arguments], check=True, capture_output=True, text=True
    )
    accuracy = json.loads(shown.stdout)["tasks"][local_task.NAME]
    assert set(accuracy) == {"teacher", "student"}
    pair = load_pair(run[0])
    assert accuracy["student"]["acc"] == pytest.approx(local_task.accuracy(pair.student.model, pair.tokenizers.teacher))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        with pytest.raises(UserError, match=r"'local_chice' is no task; did you mean 'local_choice'\?"):
            open_tasks(["local_chice"], str(tmp_path))
