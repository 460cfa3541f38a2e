"""The tolerant reader of training.log: what the strict parser reads, and what people paste."""

import math
import subprocess
from pathlib import Path

import pytest

from distill.analysis.training_log import component_name, read, weight_key
from distill.curriculum import WEIGHT_KEY
from helpers.training_log import parse

EXAMPLE = (Path(__file__).parents[1] / "assets" / "quoted.log").read_text()


OURS = "\n".join(["", EXAMPLE.replace("\n\n====", "\n\n\n====").strip("\n"), "", ""])
BAR = "Epoch 0:  3%|  | 100/3000 [00:10<05:00, v_num=0, loss=15.4, kd_loss=14.7]"
EVALUATION = """
[Eval] Step 9, loss: 3.3875
    kd_loss: raw 2.7561, weight 0.7000, scaled 1.9293
    routing_attention_alignment_loss: raw nan, weight 0.0000, scaled 0.0000

"""


def flat(block):
    """Every figure of a tolerant block under the strict parser's key."""
    values = {key: figure.value for key, figure in block.figures.items()}
    for name, parts in block.components.items():
        own = {"raw": parts.raw, "weight": parts.weight, "scaled": parts.scaled}
        if block.kind == "TRAIN DEBUG":
            values[name] = own["scaled"].value
        elif block.kind == "KD LOSS":
            values |= {key: figure.value for key, figure in own.items()}
        else:
            short = name.removeprefix("routing_") if block.kind == "ROUTING LOSSES" else name
            values |= {f"{short}.{key}": figure.value for key, figure in own.items()}
    return values


def grep(text, *options):
    return subprocess.run(["grep", *options], input=text, capture_output=True, text=True, check=True).stdout


def test_reads_what_the_strict_parser_reads():
    strict, blocks = parse(OURS + EVALUATION), read(OURS + EVALUATION).blocks
    assert [(block.kind, block.step) for block in blocks] == [(block.kind, block.step) for block in strict]
    for block, expected in zip(blocks, strict, strict=True):
        wanted = {key: value for key, value in expected.values.items() if key not in ("batch", "progress")}
        assert flat(block) == pytest.approx(wanted, nan_ok=True)
    assert blocks[1].progress == pytest.approx(0.033)


def test_figures_remember_line_and_digits():
    log = read("\n[TRAIN DEBUG] Total: 15.5\n[Eval] loss: 95.86\nlr=7.960e-06 lr=0.00e+00 lr: 3")
    total, loss = log.blocks[0].figures["total"], log.blocks[1].figures["loss"]
    assert (total.line, total.half) == (2, pytest.approx(0.05))
    assert (loss.line, loss.half) == (3, pytest.approx(0.005))
    assert [(rate.value, rate.half) for rate in log.rates] == [
        (7.960e-06, pytest.approx(5e-10)),
        (0.0, 0.0),
        (3.0, 0.5),
    ]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: "".join(f"2024-05-01 10:00:00,123 - INFO - {line}\n" for line in text.split("\n")),
        lambda text: "".join(f"{n}-{line}\n" for n, line in enumerate(text.split("\n")) if line),
        lambda text: text.replace(": ", ": \x1b[36m").replace("\n", "\x1b[0m\n"),
        lambda text: grep(text, "-A", "13", "-E", "CURRICULUM|KD LOSS|ROUTING LOSSES|TRAIN DEBUG"),
        lambda text: text.replace("\n\n\n", f"\n\n{BAR}\n\n"),
    ],
    ids=["crlf", "logger", "grep -n", "colours", "grep -A", "progress bars"],
)
def test_what_surrounds_the_figures_does_not_matter(change):
    plain, changed = read(OURS).blocks, read(change(OURS)).blocks
    assert [block.kind for block in changed] == [block.kind for block in plain]
    assert [flat(block) for block in changed] == [flat(block) for block in plain]


def test_short_forms():
    log = read(
        "[CURRICULUM] Progress 2.7% (Phase 1)\n"
        "feature_matching_loss: Weight: 0.0000, Scaled: 0.0000\n"
        "- `[TRAIN DEBUG] Total: 15.5, routing_feature_matching_loss: 41.22` and [Eval] eval_loss: 95.86\n"
        "    kd_loss: raw inf, weight 0.7, scaled nan\n"
    )
    assert [block.kind for block in log.blocks] == ["CURRICULUM", "ROUTING LOSSES", "TRAIN DEBUG", "Eval"]
    curriculum, routing, debug, evaluation = log.blocks
    assert (curriculum.phase, curriculum.progress) == (1, pytest.approx(0.027))
    parts = routing.components["routing_feature_matching_loss"]
    assert (parts.raw, parts.weight.value, parts.scaled.value) == (None, 0.0, 0.0)
    assert debug.figures["total"].value == 15.5
    assert debug.components["routing_feature_matching_loss"].scaled.value == 41.22
    assert evaluation.figures["loss"].value == 95.86
    assert evaluation.components["kd_loss"].raw.value == math.inf
    assert math.isnan(evaluation.components["kd_loss"].scaled.value)


def test_names_and_keys_are_the_breakdowns():
    assert {name: weight_key(name) for name in WEIGHT_KEY} == WEIGHT_KEY
    for name in WEIGHT_KEY:
        assert component_name(name.removeprefix("routing_")) == name


def test_text_without_blocks_is_empty():
    assert read("loss: 3.2\nkd_loss: 14.7\n[INFO] Step 3\n").blocks == []
