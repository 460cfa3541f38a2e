"""What goes wrong over the course of a run: flat losses, jumps, contradicting gradients, lost steps.

Where a threshold is needed its reason stands beside it. A run with too few points is not judged, so that nothing is
called flat before there is something to see.
"""

import math
from itertools import pairwise
from statistics import fmean, median, variance

from distill.analysis.findings.evidence import Finding, raw_readings, shorten
from distill.analysis.run_files import RunFiles

CONTRADICTING = -0.3  # cosine below which a step along one gradient undoes about a third of the other's
UNSEEN = 1e-3  # relative change of a validation metric that nobody would call learning
LEARNED = 0.05  # a fall of the loss that a run must be able to show
SUSPICIOUS = "Suspicious: "  # how preflight's lines in the log begin
ENOUGH = 10  # points for a judgement by statistics


def suspected(run: RunFiles) -> list[Finding]:
    """What was found suspicious before the first step."""
    lines = {line.strip(): number for number, line in enumerate(run.log.lines, start=1) if line.startswith(SUSPICIOUS)}
    return [
        Finding(
            "preflight",
            line.removeprefix(SUSPICIOUS),
            [f"{run.log_name} line {number}: {line}"],
            "this was so before the first step: what the run has learned from it is learned from that",
            "put it right and start anew, unless it is meant; `distill check` shows more about it",
        )
        for line, number in lines.items()
    ]


def loss_flat(run: RunFiles) -> list[Finding]:
    """A run that has learned nothing that can be seen.

    Validation repeats the same tokens, so without sampling noise: flat means that a weight-free metric moved by less
    than a thousandth between two validations; one that rose by more has been made worse. Without validations the means
    of the training loss's first and last third are compared: flat means that even two standard errors above the
    observed fall are below 5 %. Resumed runs, and runs within warm-up or their first tenth, are not judged.
    """
    steps, warmup = run.horizon, run.setting("model.warmup_steps") or 0
    temperature = {point.value for point in run.metrics.get("curriculum/temperature", [])}
    training = raw_readings(run)
    name = "val/kl_div_T1" if "kd_loss" in training else "val/student_nll"
    points = [(p.step, p.value, run.say(name, p)) for p in run.metrics.get(name, []) if math.isfinite(p.value)]
    validated = len(points) > 1
    if not validated:
        name = "kd_loss" if "kd_loss" in training and len(temperature) <= 1 else "lm_loss"
        points = [(at, value, f"step {at}: {name} raw {value:.4f}") for at, value in training.get(name, [])]
    if run.begins_late or steps is None or not points or points[-1][0] < max(warmup + ENOUGH, 0.1 * steps):
        return []
    values = [value for _, value, _ in points]
    if validated:
        first, last = values[0], values[-1]
        flat = points[-1][0] - points[0][0] >= ENOUGH and first - last < UNSEEN * abs(first)
        rises = flat and last - first >= UNSEEN * abs(first)
    else:
        third = max(len(values) // 3, 2)
        if len(values) < ENOUGH or points[0][0] > 0.05 * steps:
            return []
        first, last = fmean(values[:third]), fmean(values[-third:])
        error = math.sqrt((variance(values[:third]) + variance(values[-third:])) / third)
        flat, rises = first - last + 2 * error < LEARNED * first, False
    if not flat:
        return []
    what, how, cause, fix = (
        "loss flat",
        "does not fall",
        "nothing that matters to this loss is trained: frozen or detached student, too small a learning rate, "
        "weights at zero, or labels that do not fit the text",
        "check that the student has gradients (train/grad_norm above 0), raise model.learning_rate, and see that "
        "the component's weight is above zero",
    )
    if rises:
        what, how, cause, fix = (
            "loss rises",
            "rises",
            "the steps make the student worse: too high a learning rate, a teacher or labels that do not fit the "
            "text, or text that it has learned by heart",
            "lower model.learning_rate or lengthen model.warmup_steps, and look at what `distill check` finds; "
            "where it fell at first, take the best checkpoint and more data",
        )
    evidence = [points[0][2], points[len(points) // 2][2], points[-1][2]]
    return [Finding(what, f"{name} {how}: {first:.4f} at first, {last:.4f} at last.", evidence, cause, fix)]


def jumps(run: RunFiles) -> list[Finding]:
    """Changes of temperature or routed experts at which a loss jumps, so that the jump is not taken for learning."""
    temperature = (
        "the value carries T^2 and compares softer distributions: it is measured on another scale, not worse or better",
        "compare val/kl_div_T1, which does not depend on the temperature, or change the temperature slowly",
    )
    experts = (
        "the target is a mixture of another number of experts: the task has changed, not the student",
        "compare val/kl_div_T1, and compare routing losses only at equal top_k_experts",
    )
    findings = []
    for control, losses, (cause, fix) in (
        ("curriculum/temperature", ["train/kd_loss"], temperature),
        ("curriculum/top_k_experts", [c for c in run.metrics if c.startswith("train/routing_")], experts),
    ):
        for column in losses:
            found = jump(run, control, column) if not column.endswith("_scaled") else None
            if found is not None:
                title, evidence = found
                name = "temperature jump" if control.endswith("temperature") else "top-k jump"
                findings.append(Finding(name, title, evidence, cause, fix))
                break
    return findings


def jump(run: RunFiles, control: str, column: str) -> tuple[str, list[str]] | None:
    """The first change of `control` at which `column` moves at least four times as much as it usually does.

    Four times the median of its moves elsewhere is what noise hardly reaches; below 10 % nobody sees a jump. The
    medians of three values on either side must differ as well, so that one odd batch is no jump.
    """
    set_to = {point.step: point for point in run.metrics.get(control, [])}
    points = [point for point in run.metrics.get(column, []) if point.step in set_to and point.value > 0]
    moves = [(a, b, math.log(b.value / a.value)) for a, b in pairwise(points)]
    changed = [set_to[a.step].value != set_to[b.step].value for a, b, _ in moves]
    quiet = [abs(move) for (_, _, move), change in zip(moves, changed, strict=True) if not change]
    if len(quiet) < 3:
        return None
    for i, ((a, b, move), change) in enumerate(zip(moves, changed, strict=True)):
        before, after = points[max(i - 2, 0) : i + 1], points[i + 1 : i + 4]
        levels = math.log(median(p.value for p in after) / median(p.value for p in before))
        if change and abs(move) > max(4 * median(quiet), 0.1) and math.copysign(levels, move) == levels:
            old, new = set_to[a.step], set_to[b.step]
            title = (
                f"{column} jumps from {a.value:.4f} to {b.value:.4f} at step {b.step} because "
                f"{control.removeprefix('curriculum/')} changes from {old.value:g} to {new.value:g}."
            )
            return title, [run.say(control, old), run.say(control, new), run.say(column, a), run.say(column, b)]
    return None


def contradicting_gradients(run: RunFiles) -> list[Finding]:
    """Components whose gradient points against KD's most of the time."""
    findings = []
    for column, points in run.metrics.items():
        if not (column.startswith("gradients/") and column.endswith("_cosine")):
            continue
        values = [point.value for point in points if math.isfinite(point.value)]
        # Persistently: in both halves of at least four readings. Where a run has converged the gradients of its losses
        # cancel, and then only the later half is below the line.
        half = len(values) // 2
        if len(values) < 4 or not max(median(values[:half]), median(values[half:])) < CONTRADICTING:
            continue
        name = column.removeprefix("gradients/").removesuffix("_cosine")
        findings.append(
            Finding(
                "contradicting gradients",
                f"The gradient of {name} points against KD's: cosine {median(values):.2f} in the median of "
                f"{len(values)} readings.",
                shorten([run.say(column, point) for point in points]),
                "what this component rewards is what KD punishes",
                f"lower its weight or leave it out ({name}), or match other layers; val/kl_div_T1 with and without it "
                "decides",
            )
        )
    return findings


def non_finite(run: RunFiles) -> list[Finding]:
    """nan and inf anywhere but in what was not measured, and steps that were skipped because of them."""
    found: list[tuple[int, str]] = []
    for block in run.log.blocks:
        figures = list(block.figures.values())
        for parts in block.components.values():
            unmeasured = block.kind == "Eval" and parts.weight is not None and parts.weight.value == 0
            figures += [f for f in (parts.raw, parts.weight, parts.scaled) if f is not None and not unmeasured]
        found += [(block.step or 0, run.quote(block, figure)) for figure in figures if not math.isfinite(figure.value)]
    scaler = str(run.setting("trainer.precision")).startswith("16")  # it looks for its factor by overflowing gradients
    for column, points in run.metrics.items():
        if column.startswith(("train/", "val/")) and not (scaler and column == "train/grad_norm"):
            found += [(point.step, run.say(column, point)) for point in points if not math.isfinite(point.value)]
    found.sort(key=lambda pair: pair[0])
    evidence = [line for _, line in found]
    first = f", first at step {found[0][0]}" if found else ""
    if "nonfinite_batch.pt" in run.names:
        evidence.insert(0, "nonfinite_batch.pt: a batch whose loss or gradient was not finite")
    findings = []
    if evidence:
        findings.append(
            Finding(
                "non-finite",
                f"A loss, gradient or metric is nan or infinite{first}.",
                shorten(evidence),
                "overflow in half precision, too high a learning rate, a batch without valid tokens, or a division by "
                "zero in a loss",
                "look at the first component that is not finite and at nonfinite_batch.pt; lower the learning rate, "
                "clip gradients (trainer.gradient_clip_val: 1.0), or use bf16-mixed or 32-true instead of 16-mixed",
            )
        )
    skipped = [point for point in run.metrics.get("train/skipped_steps", []) if point.value > 0]
    if skipped:
        findings.append(
            Finding(
                "skipped steps",
                f"Optimizer steps that were not finite were dropped: {max(p.value for p in skipped):g} counted.",
                shorten([run.say("train/skipped_steps", point) for point in skipped]),
                "their loss or gradient was nan or infinite, and the run is set to skip such steps",
                "find the batches (a few in a long fp16 run are harmless), lower the learning rate or clip gradients",
            )
        )
    return findings
