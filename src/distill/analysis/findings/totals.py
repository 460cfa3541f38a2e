"""One loss from several places is one number, and its parts are of one order of size."""

import math

from distill.analysis.findings.evidence import Finding, shorten
from distill.analysis.findings.printed import RELATIVE, listed, same
from distill.analysis.findings.weights import hidden
from distill.analysis.run_files import Point, RunFiles
from distill.analysis.training_log import weight_key

NORMALISED = ("routing_feature_matching_loss", "layerwise_loss")  # 1 = predicting nothing, whatever the teacher's scale
TIMES = 100.0
CAUSE = {
    "sum": "something is added to the total, or left out of it, that the components do not list",
    "bar": "the progress bar shows another loss than the one that is optimised",
    "grad": "what is back-propagated is not the loss that the step returned",
}


def sum_differs(run: RunFiles) -> list[Finding]:
    """TRAIN DEBUG's figures, which come from different places and must agree."""
    evidence: list[str] = []
    causes: list[str] = []
    for block in run.log.of("TRAIN DEBUG"):
        if hidden(run, block):
            continue
        figures, parts = block.figures, listed(block)
        total = figures.get("total") or figures.get("sum")
        if parts is not None and not same(parts, figures["sum"]):
            evidence.append(f"{run.quote(block, figures['sum'])} (those listed add up to {parts.value:.4f})")
            causes.append("the sum is not that of the components that are listed")
        for key in ("sum", "bar", "grad"):
            figure = figures.get(key)
            if figure is None or total is None or same(figure, total):
                continue
            evidence += [run.quote(block, figure), run.quote(block, total)]
            ratio = total.value / figure.value if figure.value else math.inf
            if key == "grad" and ratio > 1.5 and abs(ratio - round(ratio)) < 1e-3 * ratio:
                causes.append(
                    f"what is back-propagated is the total divided by {round(ratio)} once more: "
                    "accumulate_grad_batches is applied twice, or not multiplied back"
                )
            else:
                causes.append(CAUSE[key])
    if not evidence:
        return []
    return [
        Finding(
            "sum differs",
            "The sum of the components, the total, the bar and the back-propagated loss do not agree.",
            shorten(evidence),
            "; ".join(dict.fromkeys(causes)),
            "make the total the sum of the scaled components, return that from the step, show it in the bar, and leave "
            "the division by accumulate_grad_batches to Lightning alone",
        )
    ]


def rows_differ(run: RunFiles) -> list[Finding]:
    """Rows of metrics.csv whose scaled components do not add up to `train/loss`.

    Lightning hands loggers the last value of each metric until the epoch ends, also of one that is logged no more. A
    component that counts for nothing in such a row is told by its weight there, which is zero, or by its value, which
    is to the digit that of the row before.
    """
    parts: dict[int, dict[str, Point]] = {}
    stale: dict[int, set[str]] = {}
    for column, points in run.metrics.items():
        name = column.removeprefix("train/").removesuffix("_scaled")
        if column != f"train/{name}_scaled":
            continue
        zero = {p.line for p in run.metrics.get(f"curriculum/{weight_key(name)}", []) if p.value == 0}
        before = math.nan
        for point in points:
            parts.setdefault(point.line, {})[name] = point
            if point.value == before or point.line in zero:
                stale.setdefault(point.line, set()).add(name)
            before = point.value
    totals = [point for point in run.metrics.get("train/loss", []) if point.line in parts]
    wrong = [point for point in totals if not adds_up(point, parts[point.line])]
    if not wrong:
        return []
    evidence, names = [], dict.fromkeys(name for point in wrong for name in sorted(stale.get(point.line, ())))
    explained = True
    for total in wrong:
        row, left = parts[total.line], stale.get(total.line, set())
        scaled = sum(point.value for point in row.values())
        evidence.append(f"{run.say('train/loss', total)} (its scaled components add up to {scaled:.6g})")
        evidence += [run.say(f"train/{name}_scaled", row[name]) for name in row if name in left]
        explained = explained and adds_up(total, {name: row[name] for name in row if name not in left})
    title = f"In {len(wrong)} of {len(totals)} rows of metrics.csv train/loss is not the sum of its scaled components"
    if not explained:
        cause = "something is in the total that no component lists, or the other way round"
        fix = "log total and components from one breakdown, so that the total is the sum of the scaled values"
        return [Finding("sum differs", f"{title}.", shorten(evidence), cause, fix)]
    cause = "loggers are given the last value of a component that is logged no more, until the epoch ends"
    fix = (
        "read a component only in rows where its curriculum weight is above zero, or in training.log; the total is "
        "right. A program that logs a component on some steps alone must write what each step had"
    )
    title += f": values of {', '.join(names)} are left over from earlier steps."
    return [Finding("stale metrics", title, shorten(evidence), cause, fix)]


def adds_up(total: Point, parts: dict[str, Point]) -> bool:
    """Whether a row's scaled components are its total; a row that is not finite is another rule's matter."""
    values = [point.value for point in parts.values()]
    apart, size = abs(sum(values) - total.value), max(abs(total.value), sum(map(abs, values)))
    return not math.isfinite(size) or apart <= RELATIVE * size


def raw_scale(run: RunFiles) -> list[Finding]:
    """A component whose raw value dwarfs the others where each was last measured.

    Each component's unit is of order one by construction (nats per token, or 1 = predicting nothing), so the others
    count as at least 1: one that has been learned to zero makes no giant of the rest. A feature matching loss of 10 is
    ten times as bad as predicting nothing, which no normalised target allows for long. KD carries T^2 and is expected
    to lead, so it and the LM loss are compared with the largest of the others, not with their median.
    """
    last: dict[str, tuple[float, str]] = {}
    for block in run.log.of("KD LOSS", "ROUTING LOSSES"):
        for name, parts in block.components.items():
            if parts.raw is not None and math.isfinite(parts.raw.value):
                last[name] = (parts.raw.value, run.quote(block, parts.raw))
    for column, points in run.metrics.items():
        name = column.removeprefix("train/")
        if name != column and name.endswith("_loss") and math.isfinite(points[-1].value):
            last[name] = (points[-1].value, run.say(column, points[-1]))
    giants = []
    for name, (value, _) in last.items():
        others = sorted(other for other_name, (other, _) in last.items() if other_name != name)
        if not others:
            continue
        objective = name in ("kd_loss", "lm_loss")
        typical = others[-1] if objective else others[len(others) // 2]
        if value > TIMES * max(typical, 1.0) or (name in NORMALISED and value > 10.0):
            giants.append(name)
    if not giants:
        return []
    rest = [name for name in last if name not in giants]
    return [
        Finding(
            "raw scale",
            f"The raw value of {', '.join(giants)} dwarfs the others: "
            + ", ".join(f"{name} {last[name][0]:.4f}" for name in [*giants, *rest])
            + ".",
            shorten([last[name][1] for name in [*giants, *rest]]),
            "the loss is not normalised: its size follows the teacher's activations, not the student's error",
            "normalise the target (layer norm without affine, mean over features), so that 1 means predicting nothing; "
            "do not hide it behind a smaller weight",
        )
    ]
