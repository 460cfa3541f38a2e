"""The learning rate is above zero, and its warm-up and decay fit the run."""

from itertools import pairwise

from distill.analysis.findings.evidence import Finding, shorten
from distill.analysis.run_files import Point, RunFiles


def learning_rate(run: RunFiles) -> list[Finding]:
    """A rate that is zero, or whose warm-up and decay do not fit the run."""
    columns = {
        name: points
        for name, points in run.metrics.items()
        if name in ("train/lr", "lr") or name.startswith(("lr-", "lr/")) or name.endswith("/lr")
    }
    findings: list[Finding] = []
    for name, points in columns.items():
        findings = findings or zero_rate(run, name, points) or warm_up(run) or horizon(run, name, points)
    if not columns and run.log.rates:
        zero = [figure for figure in run.log.rates if figure.value == 0 and figure.half < 1e-6]
        if zero and len(zero) == len(run.log.rates):
            lines = [f"{run.log_name} line {f.line}: {run.log.lines[f.line - 1].strip()[-120:]}" for f in zero]
            findings = [_zero(f"all {len(zero)} that the log shows", lines)]
    return findings or warm_up(run)


def zero_rate(run: RunFiles, name: str, points: list[Point]) -> list[Finding]:
    """Zeros that are neither the first step of a warm-up nor the end of a decay."""
    zeros = [point for point in points if point.value == 0]
    inner = [point for point in zeros if point not in (points[0], points[-1])]
    if not inner and len(zeros) < len(points):
        return []
    if len(zeros) < len(points) and all(point.value == 0 for point in points[points.index(inner[0]) :]):
        return []  # a decay that ends early: a matter of the horizon
    return [_zero(f"{len(zeros)} of {len(points)} logged values", [run.say(name, point) for point in zeros])]


def _zero(what: str, evidence: list[str]) -> Finding:
    return Finding(
        "learning rate zero",
        f"The learning rate is zero in {what}: nothing is learned there.",
        shorten(evidence),
        "the schedule's factor is zero: its horizon or warm-up is counted in the wrong unit, or it is never stepped",
        "count the schedule in optimizer steps and step it once per optimizer step; start warm-up above zero",
    )


def horizon(run: RunFiles, name: str, points: list[Point]) -> list[Finding]:
    """Whether the peak comes where warm-up ends and the floor where the run ends."""
    steps, warmup = run.horizon, run.setting("model.warmup_steps")
    accumulation = run.setting("trainer.accumulate_grad_batches") or 1
    if steps is None or len(points) < 3 or run.begins_late:  # whose peak is not to be seen
        return []
    peak = max(points, key=lambda point: (point.value, -point.step))
    floor, last = min(point.value for point in points[points.index(peak) :]), points[-1]
    spacing = max(b.step - a.step for a, b in pairwise(points))
    what = ""
    # Half of the run still above a quarter of the peak at 90 %: every decay in use (cosine, linear, 1 - sqrt) is far
    # below by then (cosine 0.02). A rate that never falls is a constant schedule, which is no fault.
    lowest = run.setting("model.min_learning_rate_ratio") or 0.0
    still = (lowest + 0.25 * (1 - lowest)) * peak.value
    if last.step >= 0.9 * steps and still < last.value < peak.value * (1 - 1e-6):
        what = f"at step {last.step} of {steps} it is still {last.value / peak.value:.0%} of its peak"
    elif last.step >= 0.9 * steps and last is peak and points[0].value < peak.value:
        what = f"it still rises at step {last.step} of {steps}"
    elif isinstance(warmup, int) and peak.step > warmup + spacing and points[0].value < peak.value:
        what = f"it rises until step {peak.step}, where warm-up should have ended at step {warmup}"
    at_floor = [point for point in points if point.value <= floor * (1 + 1e-6) and point.step > peak.step]
    if not what and len(at_floor) >= 3 and floor < 0.25 * peak.value and at_floor[0].step < 0.8 * steps:
        what = f"it is at its floor from step {at_floor[0].step} of {steps}"
        last = at_floor[0]
    if not what:
        return []
    unit = (
        f"the schedule is counted in micro-batches: accumulate_grad_batches is {accumulation}"
        if accumulation > 1
        else "warm-up and horizon are not counted in the run's optimizer steps (micro-batches, or another run's length)"
    )
    return [
        Finding(
            "schedule horizon",
            f"The learning rate's schedule does not fit the run: {what}.",
            [run.say(name, points[0]), run.say(name, peak), run.say(name, last)],
            unit,
            "count optimizer steps: horizon = trainer.estimated_stepping_batches, and step the schedule once per "
            "optimizer step (interval: step)",
        )
    ]


def warm_up(run: RunFiles) -> list[Finding]:
    """A warm-up that is configured to outlast the run."""
    warmup, steps = run.setting("model.warmup_steps"), run.horizon
    if not isinstance(warmup, int) or steps is None or warmup < steps:
        return []
    return [
        Finding(
            "schedule horizon",
            f"The warm-up of {warmup} steps outlasts the run of {steps}: the learning rate never reaches its peak.",
            [f"config.yaml: model.warmup_steps: {warmup}", f"config.yaml or log: the run has {steps} optimizer steps"],
            "warm-up is counted in optimizer steps, of which the run has fewer (accumulation divides their number)",
            f"set model.warmup_steps well below {steps}, a tenth of it or less, or train longer",
        )
    ]
