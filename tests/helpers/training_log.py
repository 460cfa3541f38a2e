"""A strict parser of `training.log`: every line must belong to a block of the documented format."""

import re
from dataclasses import dataclass, field

RULE = "=" * 60
NUMBER = r"-?\d+\.\d{4}"
COMPONENTS = (
    "kd_loss|lm_loss|routing_feature_matching_loss|routing_expert_importance_loss|routing_load_balancing_loss|"
    "routing_attention_alignment_loss|attention_loss|layerwise_loss|contrastive_loss"
)


@dataclass
class Block:
    kind: str
    step: int
    values: dict[str, float] = field(default_factory=dict)
    line: int = 0


def _take(lines: list[str], index: int, pattern: str) -> re.Match[str]:
    match = re.fullmatch(pattern, lines[index])
    assert match, f"line {index + 1}: {lines[index]!r} does not match {pattern!r}"
    return match


def parse(text: str) -> list[Block]:
    """Blocks in order; raises AssertionError at the first line that is not of the format."""
    assert text.endswith("\n")
    lines = text[:-1].split("\n")
    blocks: list[Block] = []
    if stopped := re.search(r"\n\nStopped early at step \d+ of \d+: .+\n$", text):  # the last line
        lines = text[: stopped.start()].split("\n")
    i = 0
    while lines[i].startswith("Suspicious: "):  # what was found before the first step
        i += 1
    while i < len(lines):
        assert lines[i] == "", f"line {i + 1}: a block must be preceded by an empty line, got {lines[i]!r}"
        i += 1
        start = i
        if lines[i] == RULE:
            block, i = _ruled(lines, i)
        else:
            block, i = _evaluation(lines, i)
        block.line = start
        assert lines[i] == "", f"line {i + 1}: a block must be followed by an empty line, got {lines[i]!r}"
        i += 1
        blocks.append(block)
    return blocks


def _ruled(lines: list[str], i: int) -> tuple[Block, int]:
    heading = lines[i + 1]
    assert lines[i + 2] == RULE
    i += 3
    if match := re.fullmatch(r"\[TRAIN DEBUG\] Step (\d+), Batch (\d+)", heading):
        block = Block("TRAIN DEBUG", int(match[1]), {"batch": float(match[2])})
        block.values["bar"] = float(_take(lines, i, rf"  Progress bar loss: ({NUMBER})")[1])
        assert lines[i + 1] == ""
        assert lines[i + 2] == "  Raw loss components:"
        i += 3
        while lines[i]:
            match = _take(lines, i, rf"    ({COMPONENTS}): ({NUMBER})")
            block.values[match[1]] = float(match[2])
            i += 1
        for offset, (key, label) in enumerate(
            [
                ("sum", "Sum of components"),
                ("total", r"Total loss \(outputs\['loss'\]\)"),
                ("grad", "Scaled for grad accum"),
            ]
        ):
            block.values[key] = float(_take(lines, i + 1 + offset, rf"  {label}: ({NUMBER})")[1])
        i += 4
    elif match := re.fullmatch(r"\[CURRICULUM\] Step (\d+), Progress (\d+\.\d)%", heading):
        block = Block("CURRICULUM", int(match[1]), {"progress": float(match[2])})
        assert lines[i] == "  Curriculum weights:"
        i += 1
        for key in ("kd", "feature", "attention", "layerwise", "contrastive"):
            block.values[key] = float(_take(lines, i, rf"    {key}: ({NUMBER})")[1])
            i += 1
        if lines[i] != RULE:
            block.values["lm"] = float(_take(lines, i, rf"    lm: ({NUMBER})")[1])
            i += 1
    elif match := re.fullmatch(r"\[KD LOSS\] Step (\d+)", heading):
        block = Block("KD LOSS", int(match[1]))
        for key, label in (("raw", "Raw KD loss"), ("weight", "Curriculum weight"), ("scaled", "Weighted KD loss")):
            block.values[key] = float(_take(lines, i, rf"  {label}: ({NUMBER})")[1])
            i += 1
    else:
        match = re.fullmatch(r"\[ROUTING LOSSES\] Step (\d+)", heading)
        assert match, f"unknown heading {heading!r}"
        block = Block("ROUTING LOSSES", int(match[1]))
        names = "feature_matching|expert_importance|load_balancing|attention_alignment"
        while lines[i] != RULE:
            name = _take(lines, i, rf"  ((?:{names})_loss):")[1]
            for offset, label in enumerate(("Raw", "Weight", "Scaled")):
                value = _take(lines, i + 1 + offset, rf"    {label}: ({NUMBER})")[1]
                block.values[f"{name}.{label.lower()}"] = float(value)
            i += 4
    assert lines[i] == RULE, f"line {i + 1}: {lines[i]!r} where the block should end"
    return block, i + 1


def _evaluation(lines: list[str], i: int) -> tuple[Block, int]:
    match = _take(lines, i, rf"\[Eval\] Step (\d+), loss: ({NUMBER})")
    block = Block("Eval", int(match[1]), {"loss": float(match[2])})
    i += 1
    while lines[i]:
        match = _take(lines, i, rf"    ({COMPONENTS}): raw ({NUMBER}|nan), weight ({NUMBER}), scaled ({NUMBER})")
        block.values |= {f"{match[1]}.{key}": float(match[n]) for n, key in ((2, "raw"), (3, "weight"), (4, "scaled"))}
        i += 1
    return block, i
