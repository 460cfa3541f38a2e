"""`distill diagnose`: tells in plain words why a run's loss is what it is, with the lines that show it.

Rules that compare figures which must reconcile come first; those over time follow. The text may be worded otherwise in
a later version: a script should read `--json`, in which the names of findings are stable.
"""

import json
import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass

from distill.analysis.findings import choices, held_out, rates, totals, trends, validation, weights
from distill.analysis.findings.evidence import Finding, load
from distill.analysis.findings.printed import LATER, listed, weights_said
from distill.analysis.run_files import Point, RunFiles
from distill.commands.arguments import Parser

RULES: tuple[Callable[[RunFiles], list[Finding]], ...] = (
    trends.suspected,
    weights.routing_bypass,
    weights.wrong_weight,
    validation.eval_bypass,
    totals.sum_differs,
    totals.rows_differ,
    trends.non_finite,
    rates.learning_rate,
    trends.loss_flat,
    totals.raw_scale,
    trends.jumps,
    validation.train_eval_gap,
    trends.contradicting_gradients,
    choices.features_late,
    choices.random_projection,
    choices.other_rate,
    held_out.sets_disagree,
    held_out.score_falls,
)


@dataclass(frozen=True)
class Diagnosis:
    """What a run shows.

    Args:
        source: what was read.
        findings: what is wrong or explains what looks wrong; none = healthy.
        healthy: sentences on what was checked and is in order.
        not_judged: sentences on what could not be judged, and why.
    """

    source: str
    findings: list[Finding]
    healthy: list[str]
    not_judged: list[str]


def diagnose(source: str) -> Diagnosis:
    """Judges a run by its log and metrics.

    Args:
        source: run directory, training.log, or `-` for standard input.

    Raises:
        UserError: nothing there that could be judged.
    """
    run = load(source)
    found: list[Finding] = []
    for rule in RULES:
        if rule is trends.loss_flat and any(f.name in ("learning rate zero", "schedule horizon") for f in found):
            continue  # explained already
        found += rule(run)
    names = {finding.name for finding in found}
    return Diagnosis(source, found, healthy(run, names), not_judged(run))


def healthy(run: RunFiles, names: set[str]) -> list[str]:
    """What is in order, with the figures that show it; `names` are those of the findings."""
    sentences = []
    debug, evaluations = run.log.of("TRAIN DEBUG"), run.log.of("Eval")
    said = weights_said(run)
    there = configured(run)
    zero = {key for key in there if key in said and any(entry.value.value == 0 for entry in said[key].entries)}
    if zero and "routing bypass" not in names:
        keys = ", ".join(key for key in LATER if key in zero)
        sentences.append(
            f"Curriculum working: where {keys} weigh 0.0000 their losses are scaled to zero"
            + (" and TRAIN DEBUG lists none of them" if debug else "")
            + ". If the evaluation is still high, wait for more steps."
        )
    sums = [block for block in debug if listed(block) is not None]
    if sums and not names & {"sum differs", "routing bypass", "non-finite"}:
        sentences.append(f"Sum of components = total in every TRAIN DEBUG block ({len(sums)}).")
    if evaluations and not names & {"eval bypass", "train/eval gap"}:
        sentences.append(f"Validation weighs like training in every evaluation ({len(evaluations)}).")
    for column, kl in run.metrics.items():
        of_a_set = column.startswith("val/") and column.endswith("/kl_div_T1")
        if of_a_set and fell(kl) and not names & {"loss flat", "non-finite", "validation sets disagree"}:
            sentences.append(f"{column} went from {kl[0].value:.4f} (step {kl[0].step}) to {kl[-1].value:.4f}.")
    rates = run.metrics.get("train/lr", [])
    if rates and not names & {"learning rate zero", "schedule horizon"}:
        sentences.append(
            f"The learning rate is above zero and fits the run: {min(rates, key=lambda p: p.value).value:.3e} to "
            f"{max(rates, key=lambda p: p.value).value:.3e}."
        )
    return sentences


def configured(run: RunFiles) -> list[str]:
    """The weight keys of LATER whose components the run has; all of them where there is no configuration to tell."""
    model = run.setting("model")
    if not isinstance(model, dict):
        return list(LATER)
    routed = model.get("routing") is not None
    has = {key: model.get(key) is not None for key in LATER} | {"feature": routed}
    return [key for key in LATER if has[key] or (key == "attention" and routed)]


def fell(points: list[Point]) -> bool:
    """Whether a metric is lower at the end than at first."""
    return len(points) > 1 and points[-1].value < points[0].value


def not_judged(run: RunFiles) -> list[str]:
    """What is missing for a judgement."""
    sentences = []
    if not run.log.of("TRAIN DEBUG"):
        sentences.append("Sums and routing bypass: there is no TRAIN DEBUG block.")
    if not run.log.of("Eval"):
        sentences.append("Validation against training: there is no [Eval] line.")
    kl = run.metrics.get("val/kl_div_T1", [])
    if len(kl) > 1 and not fell(kl) and kl[-1].step - kl[0].step < trends.ENOUGH:
        sentences.append(
            f"val/kl_div_T1 went from {kl[0].value:.4f} to {kl[-1].value:.4f} in {kl[-1].step - kl[0].step} steps, too "
            "few to say why it did not fall."
        )
    if not run.metrics:
        sentences.append("Temperature, top-k experts and gradients: there is no metrics.csv beside the log.")
    if not run.log.rates and not any("lr" in column for column in run.metrics):
        sentences.append("Learning rate: neither the log nor the metrics show it.")
    return sentences


def render(diagnosis: Diagnosis, width: int = 100) -> str:
    """The diagnosis as text."""
    number = len(diagnosis.findings)
    lines = [f"{diagnosis.source}: " + (f"{number} finding{'s' * (number > 1)}" if number else "healthy")]
    for index, finding in enumerate(diagnosis.findings, start=1):
        lines += ["", *textwrap.wrap(f"{index}. [{finding.name}] {finding.title}", width, subsequent_indent="   ")]
        lines += [f"   | {line}" for line in finding.evidence]
        for label, text in (("cause", finding.cause), ("fix", finding.fix)):
            lines += textwrap.wrap(
                text, width, initial_indent=f"   {label + ':':<7}", subsequent_indent=" " * 10, break_on_hyphens=False
            )
    for heading, sentences in (("In order:", diagnosis.healthy), ("Not judged:", diagnosis.not_judged)):
        if sentences:
            lines += ["", heading]
            for sentence in sentences:
                lines += textwrap.wrap(sentence, width, initial_indent="  - ", subsequent_indent="    ")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Runs `distill diagnose RUN_OR_LOG [--json]`.

    Returns:
        Exit code: 0 healthy, 1 findings.
    """
    parser = Parser(
        prog="distill diagnose",
        description="Tells in plain words why a run's loss is what it is: findings with evidence lines, cause and fix.",
        epilog="Exit code: 0 healthy, 1 findings, 2 nothing there to judge.",
    )
    parser.add_argument("source", metavar="RUN_OR_LOG", help="run directory, training.log, or - for standard input")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of text")
    options = parser.parse_args(arguments)
    diagnosis = diagnose(options.source)
    print(json.dumps(asdict(diagnosis), indent=2) if options.json else render(diagnosis))
    return 1 if diagnosis.findings else 0
