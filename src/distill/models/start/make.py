"""A student made from its teacher, layer by layer, first to last, each on the states that the student has there.

Of a layer that the student keeps, the target is the teacher's state before the next layer that it keeps, so the layer
learns to stand for those that were dropped as well. FFNs of another width get neurons of the teacher's block chosen and
fitted in closed form; then the layer, or where the depth is the teacher's the FFN alone, is trained for a moment by
itself. One state of each model and one layer's optimizer are all that is held beside the models.

Shapes: R rows, L positions, D width of the student, N counted positions, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.models.blocks import moe_block, moe_layers
from distill.models.layers import decoder_layers
from distill.models.start.ffn import ffn_of, has_constant, read_block, write_ffn
from distill.models.start.fit import STEP_TOKENS, Kept, Tell, batches, train_alone, unexplained
from distill.models.start.narrow import Axes, check_narrowable, ffn_norm, principal_axes, turn
from distill.models.start.neurons import narrow_ffn
from distill.models.start.site import Seen, site_of, watching
from distill.models.start.skeleton import build, copy_shared, student_config
from distill.models.start.walk import Rows, Walk


@dataclass(frozen=True)
class StudentFit:
    """How a student that is cut from its teacher is fitted, layer by layer, before the run.

    Args:
        tokens: calibration tokens, of training rows; auto = 16,384, and 30 for each neuron of an FFN that is chosen.
        steps: optimizer steps of each layer or FFN alone, of 512 tokens; 0 = none, only what has a closed form.
        learning_rate: their peak.
        seed: of the batches' order.
    """

    tokens: int | Literal["auto"] = "auto"
    steps: int = 60
    learning_rate: float = 1e-3
    seed: int = 0


@dataclass(frozen=True)
class Shape:
    """What a student keeps of its teacher.

    Args:
        layers: indices of the teacher's layers, ascending.
        intermediate_size: neurons of each FFN; None = the teacher's blocks.
        hidden_size: width of the residual stream; None = the teacher's.
    """

    layers: list[int]
    intermediate_size: int | None = None
    hidden_size: int | None = None


@dataclass(frozen=True)
class LayerFit:
    """How near a layer of the student came to its target, as `unexplained` says.

    Args:
        layer: of the student.
        teacher_layer: that it was made from.
        trained: what was trained alone: layer, ffn or nothing.
        before: error of the layer as it was cut, or of the closed form where it has one.
        after: error in the end.
    """

    layer: int
    teacher_layer: int
    trained: str
    before: float
    after: float


@dataclass(frozen=True)
class Place:
    """Where layers run.

    Args:
        device: of products.
        autocast: dtype of products there; None = the weights' own.
    """

    device: torch.device
    autocast: torch.dtype | None = None


CPU = Place(torch.device("cpu"))


def make_student(
    teacher: PreTrainedModel,
    shape: Shape,
    rows: Rows,
    fit: StudentFit,
    place: Place = CPU,
    tell: Callable[[int, float], None] = lambda layer, share: None,
) -> tuple[PreTrainedModel, list[LayerFit]]:
    """A student in fp32 and train mode on the CPU, and how near each of its layers came to the teacher.

    Args:
        teacher: in eval mode, left as it is.
        shape: of the student.
        rows: calibration rows.
        fit: how layers are fitted.
        place: where they run.
        tell: told a layer of the student and the share of it that is done.

    Raises:
        UserError: a family that cannot be cut so.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(fit.seed)
        student, axes = _cut(teacher, shape, rows, place)
        made = _Making(teacher, student.eval(), shape, rows.to(place.device), fit, place, axes).run(tell)
    return student.requires_grad_(True).train(), made


def _cut(teacher: PreTrainedModel, shape: Shape, rows: Rows, place: Place) -> tuple[PreTrainedModel, Axes | None]:
    """The student with everything but its FFNs, and its axes where it is narrower."""
    if shape.hidden_size is not None:
        check_narrowable(teacher, shape.hidden_size)
    width = shape.intermediate_size
    student = build(student_config(teacher, shape.layers, width, shape.hidden_size), teacher)
    if shape.hidden_size is None:
        copy_shared(student, teacher, shape.layers)
        return student, None
    axes = principal_axes(Walk(teacher, rows.to(place.device), place.device, place.autocast), shape.hidden_size)
    turn(student, teacher, shape.layers, axes)
    return student, axes


def _tell_layer(tell: Callable[[int, float], None], layer: int, share: float) -> None:
    """Tells the share of a layer's own training as a share of all that is done for it."""
    tell(layer, 0.4 + 0.6 * share)


class _Making:
    """The state between two layers: where teacher and student are on the calibration rows."""

    def __init__(
        self,
        teacher: PreTrainedModel,
        student: PreTrainedModel,
        shape: Shape,
        rows: Rows,
        fit: StudentFit,
        place: Place,
        axes: Axes | None,
    ) -> None:
        self.teacher, self.student, self.shape, self.rows, self.fit, self.place = (
            teacher, student, shape, rows, fit, place,
        )  # fmt: skip
        self.axes = axes
        self.depth = len(decoder_layers(teacher))
        self.cut_deep = len(shape.layers) < self.depth
        self.theirs = Walk(teacher, rows, place.device, place.autocast)
        self.mine = Walk(student, rows, place.device, place.autocast)

    @torch.no_grad()
    def run(self, tell: Callable[[int, float], None]) -> list[LayerFit]:
        """Makes every layer; returns how near they came."""
        kept = self.shape.layers
        teacher_RLD, student_RLD = self.theirs.embed(), self.mine.embed().float()
        start, fits = 0, []
        for layer, index in enumerate(kept):
            stop = kept[layer + 1] if layer + 1 < len(kept) else self.depth
            with watching(decoder_layers(self.teacher)[index]) as seen:
                teacher_RLD = self.theirs.advance(range(start, stop), teacher_RLD)
            tell(layer, 0.3)
            found, student_RLD = self._make_layer(
                layer, index, teacher_RLD, student_RLD, seen, partial(_tell_layer, tell, layer)
            )
            fits.append(found)
            tell(layer, 1.0)
            start = stop
        return fits

    def _make_layer(
        self, layer: int, index: int, teacher_RLD: Tensor, student_RLD: Tensor, seen: "Seen", tell: Tell
    ) -> tuple[LayerFit, Tensor]:
        """Fills and fits one layer; returns how near it came and the student's states behind it."""
        raw_RLD = self._turned(teacher_RLD)
        last = layer + 1 == len(self.shape.layers)
        target_RLD = self._normed(teacher_RLD) if last else raw_RLD
        span, counted = range(layer, layer + 1), self.rows.counted_RL
        chosen = self._fill(layer, index, raw_RLD, student_RLD, seen)
        before = unexplained(self.mine.advance(span, student_RLD, last)[counted], target_RLD[counted])
        after, trained = before, "nothing"
        if self.fit.steps and (chosen or self.cut_deep):
            trained = "layer" if self.cut_deep or self.axes is not None else "ffn"
            kept = Kept(self.mine.layers[layer])
            with self.mine.present(span):
                if trained == "layer":
                    self._train_layer(layer, student_RLD, target_RLD, last, tell)
                else:
                    self._train_ffn(layer, raw_RLD, student_RLD, seen, tell)
            after = unexplained(self.mine.advance(span, student_RLD, last)[counted], target_RLD[counted])
            if not after < before:
                kept.put_back()
                after, trained = before, "nothing"
        return LayerFit(layer, index, trained, before, after), self.mine.advance(span, student_RLD).float()

    def _turned(self, states_RLD: Tensor) -> Tensor:
        """The teacher's states in the student's axes."""
        return states_RLD.float() if self.axes is None else states_RLD.float() @ self.axes.axes_DK.to(states_RLD.device)

    def _normed(self, states_RLD: Tensor) -> Tensor:
        """What the student's final norm should give."""
        if self.axes is None:
            return self.theirs.advance(range(0), states_RLD, normed=True).float()
        states_RLD = states_RLD.float()
        unit_RLD = states_RLD * torch.rsqrt(states_RLD.square().mean(-1, keepdim=True) + 1e-6)
        return self._turned(unit_RLD) / self.axes.scale

    def _fill(self, layer: int, index: int, raw_RLD: Tensor, student_RLD: Tensor, seen: "Seen") -> bool:
        """Gives a layer its FFN; whether it is another than the teacher's."""
        source, target = decoder_layers(self.teacher)[index], ffn_of(self.mine.layers[layer])
        width = self.shape.intermediate_size
        if width is None and self.axes is None and not self.cut_deep:
            return False
        if width is None and moe_block(source) is not None:
            return False
        block = read_block(source)
        neurons = block.neurons.to(self.place.device)
        block = replace(block, neurons=neurons, expert_M=block.expert_M.to(self.place.device))
        if self.axes is None and not self.cut_deep and block.experts is None and len(neurons) == width:
            write_ffn(target, neurons)
            return False
        if self.axes is not None:
            axes = Axes(self.axes.axes_DK.to(self.place.device), self.axes.scale)
            norm_D = ffn_norm(self.teacher, index).to(self.place.device)
            constants = block.constants_ED
            block = replace(
                block,
                neurons=axes.neurons(neurons, norm_D),
                constants_ED=None if constants is None else constants.float() @ axes.axes_DK,
            )
        states_ND, target_ND = self._ffn_task(layer, raw_RLD, student_RLD, seen)
        gates_NE = seen.gates(len(self.rows.counted_RL.flatten()), block)
        gates_NE = None if gates_NE is None else gates_NE[self.rows.counted_RL.flatten()]
        generator = torch.Generator().manual_seed(self.fit.seed + layer)
        chosen = narrow_ffn(
            block,
            states_ND,
            target_ND,
            gates_NE,
            width or len(neurons),
            constant=has_constant(target),
            generator=generator,
        )
        write_ffn(target, chosen)
        return True

    def _ffn_task(self, layer: int, raw_RLD: Tensor, student_RLD: Tensor, seen: "Seen") -> tuple[Tensor, Tensor]:
        """What a layer's FFN reads on the student's states, and what it should write, at the counted positions."""
        counted = self.rows.counted_RL
        site = site_of(self.mine, layer, student_RLD)
        if site.factor is None:  # behind a norm of its own: what the teacher's wrote, before that norm
            target_ND = torch.cat(seen.outputs).flatten(0, 1)[counted.flatten()].float()
        else:
            target_ND = ((raw_RLD - site.without_RLD) / site.factor)[counted]
        return site.inputs_RLD[counted], target_ND

    def _train_layer(self, layer: int, student_RLD: Tensor, target_RLD: Tensor, last: bool, tell: Tell) -> None:
        length = student_RLD.shape[1]
        drawn = batches(
            len(student_RLD), min(len(student_RLD), max(1, round(STEP_TOKENS / length))), self.fit.seed + layer
        )
        counted_RL = self.rows.counted_RL
        scale = target_RLD[counted_RL].var()

        def loss_of(step: int) -> Tensor:
            part = next(drawn).to(self.place.device)
            output_BLD = self.mine.through(range(layer, layer + 1), student_RLD[part], part)[last]
            wrong_BLD = (output_BLD.float() - target_RLD[part]) * counted_RL[part][..., None]
            return wrong_BLD.square().mean() / scale

        train_alone(self.mine.layers[layer], loss_of, self.fit.steps, self.fit.learning_rate, tell)

    def _train_ffn(self, layer: int, raw_RLD: Tensor, student_RLD: Tensor, seen: "Seen", tell: Tell) -> None:
        states_ND, target_ND = self._ffn_task(layer, raw_RLD, student_RLD, seen)
        drawn = batches(len(states_ND), min(len(states_ND), STEP_TOKENS), self.fit.seed + layer)
        module, scale = ffn_of(self.mine.layers[layer]), target_ND.var()

        def loss_of(step: int) -> Tensor:
            part = next(drawn).to(self.place.device)
            with torch.autocast(self.place.device.type, self.place.autocast, enabled=self.place.autocast is not None):
                output: Any = module(states_ND[part][None])
            output_ND = (output[0] if isinstance(output, tuple) else output)[0]
            return (output_ND.float() - target_ND[part]).square().mean() / scale

        train_alone(module, loss_of, self.fit.steps, self.fit.learning_rate, tell)


def calibration_tokens(shape: Shape, fit: StudentFit, teacher: PreTrainedModel) -> int:
    """How many tokens `auto` means."""
    if fit.tokens != "auto":
        return fit.tokens
    chosen = shape.intermediate_size or 0
    if shape.hidden_size is not None and not chosen and not moe_layers(teacher):
        chosen = len(read_block(decoder_layers(teacher)[0]).neurons)
    return max(16_384, 30 * chosen)
