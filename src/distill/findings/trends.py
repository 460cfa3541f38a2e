"""What goes wrong over the course of a run: flat losses, jumps, contradicting gradients, lost steps.

Where a threshold is needed its reason stands beside it. The price of asking for enough points before judging is that
a run is not called flat before there is something to see.
"""

import math
from statistics import fmean, median, variance

from distill.findings.evidence import Finding, Run, raw_readings, shorten

CONTRADICTING = -0.3  # cosine below which a step along one gradient undoes about a third of the other's
LEARNED = 0.05  # a fall of the loss that a run must be able to show
ENOUGH = 10  # points for a judgement by statistics


def loss_flat(run: Run) -> list[Finding]:
    """A loss of which the run could have shown a fall of 5 % and did not.

    The means of its first and last third are compared: flat means that even two standard errors above the observed
    fall are below 5 %. Resumed runs, and runs within warm-up or their first tenth, are not judged.
    """
    steps = run.horizon
    temperature = {point.value for point in run.metrics.get("curriculum/temperature", [])}
    readings = raw_readings(run)
    name = "kd_loss" if "kd_loss" in readings and len(temperature) <= 1 else "lm_loss"
    points = readings.get(name, [])
    if steps is None or len(points) < ENOUGH or points[0][0] > 0.05 * steps:
        return []
    if points[-1][0] < max(ENOUGH + (run.setting("model.warmup_steps") or 0), 0.1 * steps):
        return []
    third = max(len(points) // 3, 2)
    first, last = [value for _, value in points[:third]], [value for _, value in points[-third:]]
    fall = fmean(first) - fmean(last)
    error = math.sqrt((variance(first) + variance(last)) / third)
    if fall + 2 * error >= LEARNED * fmean(first):
        return []
    return [
        Finding(
            "loss flat",
            f"{name} does not fall: {fmean(first):.4f} on average at first, {fmean(last):.4f} at last.",
            [f"{name} raw at step {step}: {value:.4f}" for step, value in (points[0], points[len(points) // 2])]
            + [f"{name} raw at step {points[-1][0]}: {points[-1][1]:.4f}"],
            "nothing that matters to this loss is trained: frozen or detached student, too small a learning rate, "
            "weights at zero, or labels that do not fit the text",
            "check that the student has gradients (train/grad_norm above 0), raise the learning rate, and see that the "
            "component's weight is above zero",
        )
    ]


def jumps(run: Run) -> list[Finding]:
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


def jump(run: Run, control: str, column: str) -> tuple[str, list[str]] | None:
    """The first change of `control` at which `column` moves at least four times as much as it usually does.

    Levels are medians of up to three points on either side, so that one odd batch is no jump; below 10 % nobody sees
    one. Four times the median of the other moves is what noise hardly reaches.
    """
    set_to = {point.step: point for point in run.metrics.get(control, [])}
    points = [point for point in run.metrics.get(column, []) if point.step in set_to and point.value > 0]
    if len(points) < 6:
        return None
    moves = []
    for i in range(1, len(points)):
        before, after = points[max(i - 3, 0) : i], points[i : i + 3]
        move = math.log(median(p.value for p in after) / median(p.value for p in before))
        changed = set_to[points[i - 1].step].value != set_to[points[i].step].value
        moves.append((i, move, changed))
    quiet = [abs(move) for i, move, _ in moves if not any(changed for j, _, changed in moves if abs(i - j) <= 3)]
    for i, move, changed in moves:
        if changed and quiet and abs(move) > max(4 * median(quiet), 0.1):
            old, new = set_to[points[i - 1].step], set_to[points[i].step]
            title = (
                f"{column} jumps at step {points[i].step} ({points[i - 1].value:.4f} -> {points[i].value:.4f}) because "
                f"{control.removeprefix('curriculum/')} changes from {old.value:g} to {new.value:g}."
            )
            lines = [run.say(control, old), run.say(control, new)]
            return title, [*lines, run.say(column, points[i - 1]), run.say(column, points[i])]
    return None


def contradicting_gradients(run: Run) -> list[Finding]:
    """Components whose gradient points against KD's most of the time."""
    findings = []
    for column, points in run.metrics.items():
        if not (column.startswith("gradients/") and column.endswith("_cosine")):
            continue
        values = [point.value for point in points if math.isfinite(point.value)]
        recent = values[len(values) // 2 :]
        # Persistently: at least three readings, the median of all and of the later half below the line.
        if len(values) < 3 or not max(median(values), median(recent)) < CONTRADICTING:
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


def non_finite(run: Run) -> list[Finding]:
    """nan and inf anywhere but in what was not measured, and steps that were skipped because of them."""
    evidence = []
    for block in run.log.blocks:
        figures = list(block.figures.values())
        for parts in block.components.values():
            unmeasured = block.kind == "Eval" and parts.weight is not None and parts.weight.value == 0
            figures += [f for f in (parts.raw, parts.weight, parts.scaled) if f is not None and not unmeasured]
        evidence += [run.quote(block, figure) for figure in figures if not math.isfinite(figure.value)]
    for column, points in run.metrics.items():
        if column.startswith(("train/", "val/", "curriculum/", "lr")):
            evidence += [run.say(column, point) for point in points if not math.isfinite(point.value)]
    if "nonfinite_batch.pt" in run.files:
        evidence.insert(0, "nonfinite_batch.pt: the batch at which the run was stopped")
    findings = []
    if evidence:
        findings.append(
            Finding(
                "non-finite",
                "A loss, gradient or metric is nan or infinite.",
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
