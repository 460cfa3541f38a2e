"""Validation against training: the same weights, and on these no more than 1.5 x apart.

The 1.5 is the behaviour contract's. A validation is compared with the largest training total since the validation
before it, so a gap that is smaller than what training fell in between is not seen.
"""

import math
from typing import TypeVar

from distill.analysis.findings.evidence import Finding, raw_readings, shorten
from distill.analysis.findings.printed import listed, same, total_of, weight_near, weight_there, weights_said
from distill.analysis.findings.weights import UNKNOWN_RAW, bypassing
from distill.analysis.run_files import RunFiles
from distill.analysis.training_log import Block, Figure, weight_key

GAP = 1.5
Entry = TypeVar("Entry")


def eval_bypass(run: RunFiles) -> list[Finding]:
    """Validation that weighs otherwise than training, or whose loss is not the sum of its parts."""
    said, bypasses = weights_said(run), bypassing(run)
    evidence: list[str] = []
    names: list[str] = []
    for block in run.log.of("Eval"):
        scaled: list[Figure] = []
        for name, parts in block.components.items():
            weights = said.get(weight_key(name))
            # Near is good enough for a weight of zero, not for one that may be rising.
            weight = weight_there(weights, block, rank=1) if parts.weight else weight_near(run, weights, block)
            if name in bypasses:
                weight = None
            if parts.weight and weight and not same(parts.weight, weight.value):
                names.append(name)
                evidence += [weight.text, run.quote(block, parts.weight)]
            elif (
                not parts.weight
                and parts.scaled
                and weight
                and weight.value.value == 0
                and abs(parts.scaled.value) > parts.scaled.half + weight.value.half * UNKNOWN_RAW
            ):
                names.append(name)
                evidence += [weight.text, run.quote(block, parts.scaled)]
            if parts.scaled is not None:
                scaled.append(parts.scaled)
        loss = block.figures.get("loss")
        if loss and scaled and whole(block) and not same(loss, total_of(scaled)):
            evidence += [f"{run.quote(block, loss)} (its components add up to {total_of(scaled).value:.4f})"]
        elif (
            loss
            and not (block.components and whole(block))
            and (train := training_total(run, block))
            and loss.value > GAP * train[0]
        ):
            evidence += [train[1], f"{run.quote(block, loss)} ({loss.value / train[0]:.1f} x the training total)"]
    if not evidence:
        return []
    which = f": {', '.join(dict.fromkeys(names))} weigh otherwise there" if names else ""
    return [
        Finding(
            "eval bypass",
            f"Evaluation bypasses the curriculum{which}.",
            shorten(evidence),
            "validation weighs otherwise than training did, or uses another sparsity or mask",
            "give validation the curriculum's state: the same weights, temperature, masks and sparse targets as the "
            "training step before it, through the same function",
        )
    ]


def train_eval_gap(run: RunFiles) -> list[Finding]:
    """The last validation and the training before it on the same weighting, as totals and told by component.

    Lower than the training it counts only where training was read at least three times, lately: losses fall.
    """
    raw = raw_readings(run)
    for block in reversed(run.log.of("Eval")):
        step = -1 if block.step is None else block.step
        parts, latest = [], step
        for name, values in block.components.items():
            readings = since(run, block, raw.get(name, [])) if step >= 0 else []
            weight = values.weight.value if values.weight else 0.0
            if weight > 0 and values.raw is not None and math.isfinite(values.raw.value) and readings:
                parts.append((weight, values.raw, readings))
                latest = min(latest, max((at for at, _ in raw[name] if at <= step), default=-1))
        if not parts:
            continue
        validation = sum(weight * figure.value for weight, figure, _ in parts)
        high, low = (sum(weight * pick(readings) for weight, _, readings in parts) for pick in (max, min))
        many = min(len(readings) for _, _, readings in parts) >= 3 and latest >= 0.9 * step
        if not (validation > GAP * high or (many and validation * GAP < low)):
            return []
        pick, training = (max, high) if validation > high else (min, low)
        return [
            Finding(
                "train/eval gap",
                f"On the same weighting validation is {validation / training:.1f} x training "
                f"({validation:.4f} against {training:.4f}) at step {step}.",
                shorten([f"{run.quote(block, figure)} (training: raw {pick(seen):.4f})" for _, figure, seen in parts]),
                "the weights agree, so validation measures otherwise (another temperature, sparsity or mask), or the "
                "data differ, or the student has learned the training text by heart",
                "look at the component with the largest gap: give validation the training step's temperature, targets "
                "and masks; if these agree, take more data or stop at the best val/kl_div_T1",
            )
        ]
    return []


def training_total(run: RunFiles, evaluation: Block) -> tuple[float, str] | None:
    """The largest training total since the evaluation before, else the nearest; with the line that says so."""
    entries = [
        (block.step, block.line, figure.value, run.quote(block, figure))
        for block in run.log.of("TRAIN DEBUG")
        if (figure := block.figures.get("total") or block.figures.get("sum") or listed(block)) is not None
    ]
    entries += [(p.step, 0, p.value, run.say("train/loss", p)) for p in run.metrics.get("train/loss", [])]
    if evaluation.step is None or all(entry[0] is None for entry in entries):
        near = min(
            (entry for entry in entries if entry[1]), key=lambda entry: abs(entry[1] - evaluation.line), default=None
        )
        return near and (near[2], near[3])
    window = since(run, evaluation, [(entry[0], entry) for entry in entries if entry[0] is not None])
    worst = max(window, key=lambda entry: entry[2], default=None)
    return worst and (worst[2], worst[3])


def since(run: RunFiles, evaluation: Block, entries: list[tuple[int, Entry]]) -> list[Entry]:
    """Those of `(step, entry)` after the evaluation before and up to this one; else the last before, else the first."""
    step = evaluation.step or 0
    previous = max((b.step for b in run.log.of("Eval") if b.step is not None and b.step < step), default=-1)
    window = [entry for at, entry in entries if previous < at <= step]
    if window or not entries:
        return window
    earlier = [pair for pair in entries if pair[0] <= step]
    return [max(earlier, key=lambda pair: pair[0])[1] if earlier else min(entries, key=lambda pair: pair[0])[1]]


def whole(block: Block) -> bool:
    """Whether an [Eval] line is followed by all of its components in full; a quoted one may leave some out."""
    return all(
        figure is not None and (figure.half < 1e-4 or not math.isfinite(figure.value))
        for parts in block.components.values()
        for figure in (parts.raw, parts.weight, parts.scaled)
    )
