"""Choices that are allowed and that a comparison of ours has found to harm (docs/quality.md): sentences about each."""

from transformers import PreTrainedModel

from distill.curriculum import WEIGHT_KEY, Schedules, leaves_zero
from distill.training.options import ModelOptions

MUON_LEAST_RATE = 1e-3  # no student that was tried did best with less (docs/quality.md)
ADAMW_MOST_RATE_TIMES_WIDTH = 3.0  # the best of students 96 to 576 wide were 0.1 to 1.6


def choice_findings(options: ModelOptions, schedules: Schedules, student: PreTrainedModel) -> list[str]:
    """What of a configuration is against what was measured.

    Args:
        options: of the run.
        schedules: its curriculum.
        student: on any device, the meta device too.
    """
    width = int(student.config.get_text_config(decoder=True).hidden_size)
    return late_features(options, schedules) + needless_projection(options) + other_rate(options, width)


def late_features(options: ModelOptions, schedules: Schedules) -> list[str]:
    """Losses on layers that begin late although the student has random weights."""
    if options.student_config is None:
        return []
    weighed = {WEIGHT_KEY[name] for component in options.components.values() for name in component.units}
    begins = {key: leaves_zero(schedule) for key, schedule in schedules.weights.items() if key in weighed}
    late = {key: place for key, place in begins.items() if place}
    if not late:
        return []
    when = ", ".join(f"{key} from {place:.0%}" for key, place in late.items())
    return [
        f"curriculum.{next(iter(late))}: {when} on is late for a student with random weights, which learns most "
        "from features first: begin with them, as configs/curricula/features_first.yaml does"
    ]


def needless_projection(options: ModelOptions) -> list[str]:
    """Random matrices between states of one language."""
    cut = options.is_cut and options.student_hidden_size is None
    if not cut or options.layerwise is None or options.layerwise.projection != "linear":
        return []
    return [
        "model.layerwise.projection: linear puts random matrices between a student that is cut and the teacher whose "
        "states it has already, which made it worse: set auto"
    ]


def other_rate(options: ModelOptions, width: int) -> list[str]:
    """AdamW's learning rate for Muon, or Muon's for AdamW."""
    rate = options.learning_rate
    if options.optimizer == "muon" and rate < MUON_LEAST_RATE:
        return [f"model.learning_rate: {rate} is a rate for AdamW; Muon learned best with {MUON_LEAST_RATE} and more"]
    if options.optimizer == "adamw" and options.lora is None and rate * width > ADAMW_MOST_RATE_TIMES_WIDTH:
        return [
            f"model.learning_rate: {rate} is a rate for Muon; AdamW learned best with at most "
            f"{1.6 / width:.1g} at a width of {width:,}"
        ]
    return []
