"""What a training.log says, as figures that remember their line and how many digits were printed.

The reader is tolerant: it takes our blocks, the earlier trainer's, what `grep -A` leaves of them, lines with a logger's
prefix, and the short forms in which people quote them (`[TRAIN DEBUG] Total: 15.5`). A line that it cannot place is
passed over in silence; the strict parser of our own format is `tests/helpers/training_log.py`.
"""

import re
from dataclasses import dataclass, field
from typing import NamedTuple

NUMBER = r"([-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+|nan|inf(?:inity)?))(?![\w%])"
VALUE = rf"\s*[:=]?\s*{NUMBER}"
FLAGS = re.IGNORECASE

HEADING = re.compile(r"\[(CURRICULUM|KD(?: LOSS)?|ROUTING(?: LOSSES)?|TRAIN DEBUG|EVAL(?:UATION)?)\]", FLAGS)
KIND = {"C": "CURRICULUM", "K": "KD LOSS", "R": "ROUTING LOSSES", "T": "TRAIN DEBUG", "E": "Eval"}
STEP = re.compile(r"\bstep\s*[:=]?\s*(\d+)", FLAGS)
PROGRESS = re.compile(r"\bprogress\s*[:=]?\s*(\d+(?:\.\d+)?)\s*%", FLAGS)
PHASE = re.compile(r"\bphase\s*[:=]?\s*(\d)", FLAGS)
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
RULE = re.compile(r"={10,}\s*$")

COMPONENT = re.compile(r"\b([a-z]\w*_loss)\b['\"`]?", FLAGS)
TOTALS = re.compile(r"\b(?:eval|val|valid|validation|total|train|training)_loss\b", FLAGS)  # no components
PART = re.compile(rf"\b(raw|weighted|weight|scaled)\b(?:\s+kd\s+loss)?{VALUE}", FLAGS)
BARE = re.compile(rf"^{VALUE}", FLAGS)
RATE = re.compile(rf"\blr\s*[:=]\s*{NUMBER}", FLAGS)
FIGURES = {
    "TRAIN DEBUG": {
        "bar": re.compile(rf"\bprogress bar loss{VALUE}", FLAGS),
        "sum": re.compile(rf"\bsum\b(?: of components)?{VALUE}", FLAGS),
        "total": re.compile(rf"\btotal\b(?:[ _]loss)?(?:\s*\([^)]*\))?{VALUE}", FLAGS),
        "grad": re.compile(rf"\bscaled for grad accum\w*{VALUE}", FLAGS),
    },
    "CURRICULUM": {
        key: re.compile(rf"\b{key}\b{VALUE}", FLAGS)
        for key in ("kd", "feature", "attention", "layerwise", "contrastive", "lm")
    },
    "Eval": {"loss": re.compile(rf"\b(?:\w+_)?loss{VALUE}", FLAGS)},
}
ROUTING = ("feature_matching", "expert_importance", "load_balancing", "attention_alignment")


class Figure(NamedTuple):
    """A printed number.

    Args:
        value: as printed.
        line: its line in the log, from 1.
        half: half a unit of its last digit, by which it may differ from what was rounded.
    """

    value: float
    line: int
    half: float


@dataclass
class Parts:
    """What a block says of one component; TRAIN DEBUG's contributions are `scaled`."""

    raw: Figure | None = None
    weight: Figure | None = None
    scaled: Figure | None = None


@dataclass
class Block:
    """One block or quoted line.

    Args:
        kind: heading, one of `KIND`'s values.
        line: of the heading, from 1.
        step: optimizer step, None where the heading has none.
        progress: share of the run in [0, 1], where printed.
        phase: where the heading names one.
        figures: `bar`, `sum`, `total`, `grad` of TRAIN DEBUG, weight keys of CURRICULUM, `loss` of Eval.
        components: full component name -> its parts, in the order of the log.
    """

    kind: str
    line: int
    step: int | None = None
    progress: float | None = None
    phase: int | None = None
    figures: dict[str, Figure] = field(default_factory=dict)
    components: dict[str, Parts] = field(default_factory=dict)


@dataclass
class TrainingLog:
    """A log's text and what was recognised in it.

    Args:
        lines: the text, line 1 first.
        blocks: in the order of the log.
        rates: learning rates that a progress bar left in it.
    """

    lines: list[str]
    blocks: list[Block]
    rates: list[Figure]

    def of(self, *kinds: str) -> list[Block]:
        """Blocks of these kinds, in order."""
        return [block for block in self.blocks if block.kind in kinds]


def component_name(name: str) -> str:
    """The full name of a component, with the `routing_` that ROUTING LOSSES leaves out.

    Example:
        >>> component_name("feature_matching_loss")
        'routing_feature_matching_loss'
    """
    return f"routing_{name}" if name.removesuffix("_loss") in ROUTING else name


def weight_key(component: str) -> str:
    """The curriculum entry that scales a component; also for names that only an earlier trainer had.

    Example:
        >>> weight_key("routing_attention_alignment_loss")
        'attention'
    """
    if component.startswith("routing_attention"):
        return "attention"
    return "feature" if component.startswith("routing_") else component.removesuffix("_loss")


def read(text: str) -> TrainingLog:
    """What is recognised, possibly nothing, in the text of a training.log or of anything that quotes one."""
    log = TrainingLog(COLOUR.sub("", text).split("\n"), [], [])
    reader = _Reader(log)
    for number, line in enumerate(log.lines, start=1):
        headings = _split(HEADING, line)
        for name, rest in headings:
            reader.heading(name, rest, number)
        if not headings:
            reader.line(line, number)
        log.rates += [_figure(match[1], number) for match in RATE.finditer(line)]
    return log


def _split(pattern: re.Pattern[str], text: str) -> list[tuple[str, str]]:
    """What `pattern` names in a text, each with the text up to the next one."""
    matches = list(pattern.finditer(text))
    ends = [match.start() for match in matches[1:]] + [len(text)]
    return [(match[1], text[match.end() : end]) for match, end in zip(matches, ends, strict=False)]


def _figure(text: str, line: int) -> Figure:
    mantissa, _, exponent = text.lower().partition("e")
    digits = len(mantissa.partition(".")[2]) if mantissa[-1:].isdigit() or mantissa.endswith(".") else 0
    value = float(text)
    exact = value == 0 and bool(exponent)  # 0.00e+00 has lost no digit
    return Figure(value, line, 0.0 if exact else 0.5 * 10.0 ** (int(exponent or 0) - digits))


class _Reader:
    """Remembers the block and the component to which the next line belongs."""

    def __init__(self, log: TrainingLog) -> None:
        self.log = log
        self.block: Block | None = None
        self.component: str | None = None

    def heading(self, name: str, rest: str, number: int) -> None:
        block = Block(KIND[name[0].upper()], number)
        if match := STEP.search(rest):
            block.step = int(match[1])
        if match := PROGRESS.search(rest):
            block.progress = float(match[1]) / 100
        if match := PHASE.search(rest):
            block.phase = int(match[1])
        self.block, self.component = block, "kd_loss" if block.kind == "KD LOSS" else None
        self.log.blocks.append(block)
        self._values(rest, number)

    def line(self, text: str, number: int) -> None:
        block = self.block
        if block is not None and RULE.search(text):
            if block.figures or block.components:  # the closing rule; the one below the heading comes before any value
                self.block = self.component = None
        elif not text.strip() or text.strip() == "--":
            if block is not None and (block.kind == "Eval" or text.strip()):
                self.block = self.component = None
        else:
            self._values(text, number)

    def _values(self, text: str, number: int) -> None:
        text = TOTALS.sub(lambda match: match[0].replace("_", " "), text)
        names = _split(COMPONENT, text)
        first = COMPONENT.search(text)
        own = text[: first.start()] if first else text
        if self.block is not None:
            found = False
            for key, pattern in FIGURES.get(self.block.kind, {}).items():
                if match := pattern.search(own):
                    self.block.figures[key] = _figure(match[1], number)
                    found = True
            if not found and self.component is not None and self.block.kind != "TRAIN DEBUG":
                self._parts(self.block, self.component, own, number)
        for name, rest in names:
            self._named(component_name(name), rest, number)

    def _named(self, component: str, text: str, number: int) -> None:
        """A component's name and what follows it up to the next one."""
        parts = PART.search(text)
        if parts and (self.block is None or self.block.kind in ("CURRICULUM", "TRAIN DEBUG", "KD LOSS")):
            last = self.log.blocks[-1] if self.log.blocks else None
            if last is None or last.kind != "ROUTING LOSSES":  # quoted without its heading
                last = Block("ROUTING LOSSES", number, self.block.step if self.block else None)
                self.log.blocks.append(last)
            self._parts(last, component, text, number)
        elif self.block is not None and self.block.kind != "CURRICULUM":
            self.component = component
            if parts:
                self._parts(self.block, component, text, number)
            elif match := BARE.match(text):
                self.block.components.setdefault(component, Parts()).scaled = _figure(match[1], number)

    def _parts(self, block: Block, component: str, text: str, number: int) -> None:
        for match in PART.finditer(text):
            name = "scaled" if match[1].lower() == "weighted" else match[1].lower()
            setattr(block.components.setdefault(component, Parts()), name, _figure(match[2], number))
