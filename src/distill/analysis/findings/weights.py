"""Every component is weighed as the curriculum says: none contributes at weight zero, and scaled = raw x weight."""

from functools import lru_cache
from itertools import zip_longest

from distill.analysis.findings.evidence import Finding, shorten
from distill.analysis.findings.printed import listed, product, same, weight_near, weight_there, weights_said
from distill.analysis.run_files import RunFiles
from distill.analysis.training_log import Block, Figure, weight_key

UNKNOWN_RAW = 1000.0  # a raw value that was not printed is taken to be at most this


def routing_bypass(run: RunFiles) -> list[Finding]:
    """Components that the curriculum weighs with zero and that contribute all the same."""
    found = bypassing(run)
    if not found:
        return []
    return [
        Finding(
            "routing bypass",
            f"Routing bypasses the curriculum: losses of weight 0 are part of the total ({', '.join(found)}).",
            shorten([line for lines in zip_longest(*found.values()) for line in lines if line]),
            "they are added to the total without their curriculum weight",
            "skip components of weight zero, and add each other one as weight x raw: take the weights from the "
            "curriculum's state (pl_module.curriculum); `distill fit` stops such a run where `audit` is on",
        )
    ]


@lru_cache(maxsize=1)  # several rules ask
def bypassing(run: RunFiles) -> dict[str, list[str]]:
    """Components that bypass a weight of zero, each with the lines that show it."""
    said = weights_said(run)
    found: dict[str, list[str]] = {}
    for block in run.log.of("TRAIN DEBUG"):
        for name, parts in block.components.items():
            weight = weight_near(run, said.get(weight_key(name)), block)
            if parts.scaled is None or weight is None or weight.value.value != 0:
                continue
            raw = raw_near(run, name, block)
            allowed = weight.value.half * (abs(raw.value) if raw else UNKNOWN_RAW) + parts.scaled.half
            if abs(parts.scaled.value) > allowed:
                found.setdefault(name, []).extend([weight.text, run.quote(block, parts.scaled)])
        if suspect := hidden(run, block):
            lines = [run.quote(block, block.figures[key]) for key in ("sum", "total")]
            found.setdefault(suspect[0], []).extend([*lines, *suspect[1:]])
    for block in run.log.of("ROUTING LOSSES", "KD LOSS"):
        for name, parts in block.components.items():
            weight = weight_there(said.get(weight_key(name)), block, rank=0)
            if parts.weight and weight and weight.value.value == 0 and not same(parts.weight, weight.value):
                found.setdefault(name, []).extend([weight.text, run.quote(block, parts.weight)])
            if parts.weight and parts.weight.value == 0 and parts.scaled:
                expected = product(parts.raw, parts.weight) if parts.raw else Figure(0.0, 0, 0.0)
                if not same(parts.scaled, expected):
                    lines = [run.quote(block, figure) for figure in (parts.weight, parts.scaled)]
                    found.setdefault(name, []).extend(lines)
    return found


def wrong_weight(run: RunFiles) -> list[Finding]:
    """Parts that are not raw x weight, or are weighed otherwise than CURRICULUM says, at weights above zero."""
    said, bypasses = weights_said(run), bypassing(run)
    found: dict[str, list[str]] = {}
    for block in run.log.of("ROUTING LOSSES", "KD LOSS", "Eval"):
        for name, parts in block.components.items():
            if parts.weight is None or parts.weight.value == 0 or name in bypasses:
                continue
            if parts.raw and parts.scaled and not same(parts.scaled, product(parts.raw, parts.weight)):
                lines = dict.fromkeys(run.quote(block, figure) for figure in (parts.raw, parts.weight, parts.scaled))
                found.setdefault(name, []).extend(lines)
            weight = weight_there(said.get(weight_key(name)), block, rank=0)
            if weight and block.kind != "Eval" and not same(weight.value, parts.weight):
                found.setdefault(name, []).extend([weight.text, run.quote(block, parts.weight)])
    if not found:
        return []
    return [
        Finding(
            "wrong weight",
            f"A component is not weighed as the curriculum says: {', '.join(found)}.",
            shorten([line for lines in found.values() for line in lines]),
            "the weight that was applied is not the curriculum's at that step",
            "compute scaled = raw x weight in one place, with the weights of the curriculum's state",
        )
    ]


def hidden(run: RunFiles, block: Block) -> tuple[str, str] | None:
    """The component of weight zero whose raw value is what the total has above the sum of its parts, and its line."""
    total, parts = block.figures.get("total"), listed(block)
    if total is None or parts is None or same(total, parts):
        return None
    gap = total.value - parts.value
    for other in run.log.of("ROUTING LOSSES", "KD LOSS"):
        for name, values in other.components.items():
            if other.step != block.step or values.raw is None or values.weight is None or values.weight.value != 0:
                continue
            if abs(values.raw.value - gap) <= 1e-3 * abs(gap) + total.half + parts.half + values.raw.half:
                return name, run.quote(other, values.raw)
    return None


def raw_near(run: RunFiles, component: str, block: Block) -> Figure | None:
    """The component's raw value as printed at the block's step, or in the log around a block without a step."""
    found = [
        (abs(other.line - block.line), parts.raw)
        for other in run.log.of("KD LOSS", "ROUTING LOSSES")
        if other.step == block.step and (parts := other.components.get(component)) and parts.raw is not None
    ]
    return min(found)[1] if found else None
