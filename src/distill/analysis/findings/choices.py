"""Choices of the configuration that a comparison of ours has found to harm, see docs/quality.md.

`distill check` says the same before the first step; where the log has it already, nothing is said here.
"""

from typing import Any

from distill.analysis.findings.evidence import Finding
from distill.analysis.findings.trends import SUSPICIOUS
from distill.analysis.run_files import RunFiles
from distill.curriculum import WEIGHT_KEYS, leaves_zero

COMPONENTS = {  # curriculum key -> keys of the model whose losses it weighs
    "feature": ("routing",),
    "attention": ("routing", "attention"),
    "layerwise": ("layerwise",),
    "contrastive": ("contrastive",),
}
MUON_LEAST_RATE, ADAMW_MOST_RATE_TIMES_WIDTH = 1e-3, 3.0  # as in preflight/choices.py, which torch comes with
CUTS = ("student_layers", "student_intermediate_size")


def features_late(run: RunFiles) -> list[Finding]:
    """Losses on layers that begin late although the student has random weights."""
    if run.setting("model.student_config") is None:
        return []
    late = {}
    for key in WEIGHT_KEYS:
        schedule = run.setting(f"curriculum.{key}")
        there = any(run.setting(f"model.{of}") is not None for of in COMPONENTS.get(key, ()))
        if there and _is_schedule(schedule) and (place := leaves_zero(schedule)):
            late[key] = (place, schedule)
    if not late or said(run, *(f"curriculum.{key}:" for key in late)):
        return []
    return [
        Finding(
            "features late",
            "A student with random weights gets the teacher's features late: "
            + ", ".join(f"{key} from {place:.0%} of the run on" for key, (place, _) in late.items())
            + ".",
            [
                "config.yaml: model.student_config is given",
                *(f"config.yaml: curriculum.{key}: {schedule}" for key, (_, schedule) in late.items()),
            ],
            "features teach random weights most where they come first, and KD refines what is there",
            "begin with them and let KD follow, as configs/curricula/features_first.yaml does",
        )
    ]


def random_projection(run: RunFiles) -> list[Finding]:
    """A projection between the states of a student that was cut and its teacher's."""
    cut = [key for key in CUTS if run.setting(f"model.{key}") is not None]
    linear = run.setting("model.layerwise.projection") == "linear"
    narrower = run.setting("model.student_hidden_size") is not None
    if not cut or not linear or narrower or said(run, "model.layerwise.projection:"):
        return []
    return [
        Finding(
            "random projection",
            "Random matrices stand between a student's states and those of the teacher that it is cut from.",
            [f"config.yaml: model.{key}: {run.setting(f'model.{key}')}" for key in cut]
            + ["config.yaml: model.layerwise.projection: linear"],
            "both have the same width and the same language, and the student first unlearns it for the matrices' sake",
            "set model.layerwise.projection to auto, which compares such states as they are",
        )
    ]


def other_rate(run: RunFiles) -> list[Finding]:
    """AdamW's learning rate for Muon, or Muon's for AdamW where the student's width is known."""
    optimizer, rate = run.setting("model.optimizer"), run.setting("model.learning_rate")
    width = run.setting("model.student_hidden_size") or run.setting("model.student_config.hidden_size")
    if not isinstance(rate, int | float) or said(run, "model.learning_rate:"):
        return []
    most = ADAMW_MOST_RATE_TIMES_WIDTH / width if isinstance(width, int) and width > 0 else float("inf")
    if optimizer == "muon" and rate < MUON_LEAST_RATE:
        other, fix = "AdamW", f"raise model.learning_rate, to {MUON_LEAST_RATE:g} or more"
    elif optimizer == "adamw" and run.setting("model.lora") is None and rate > most:
        other, fix = "Muon", f"lower model.learning_rate, to {most / 2:.1g} or less at this width"
    else:
        return []
    return [
        Finding(
            "other optimizer's rate",
            f"The learning rate of {rate:g} is one for {other}, and model.optimizer is {optimizer}.",
            [f"config.yaml: model.optimizer: {optimizer}", f"config.yaml: model.learning_rate: {rate}"],
            "updates of both have one size, and Muon bears more of it: its best rates were up to four times AdamW's",
            fix,
        )
    ]


def said(run: RunFiles, *keys: str) -> bool:
    """Whether the start of the run has said it, which is a finding already."""
    return any(line.startswith(tuple(SUSPICIOUS + key for key in keys)) for line in run.log.lines)


def _is_schedule(value: Any) -> bool:
    """Whether a value of a configuration is a number or knots."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(knot, list) and len(knot) == 2 for knot in value)
    return isinstance(value, int | float)
