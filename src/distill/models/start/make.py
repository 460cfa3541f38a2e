"""A student made from its teacher, layer by layer, first to last, each on the states that the student has there.

Of a layer that the student keeps, the target is the teacher's state before the next layer that it keeps, so the layer
learns to stand for those that were dropped as well. FFNs of another width get neurons of the teacher's block chosen and
fitted in closed form; then the layer, or where the depth is the teacher's the FFN alone, is trained for a moment by
itself. Beside the models a few states of all rows and one layer's optimizer are held. Closed forms are computed in fp32
whatever `model.matmul_precision` says: in bf16 the layers of a small teacher left 3 to 6% more unexplained.

Shapes: R rows, L positions, D width of the student, N counted positions, E experts.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.models.cut import cut_layers
from distill.models.layers import decoder_layers
from distill.models.precision import whole_products
from distill.models.start.experts import refit_experts
from distill.models.start.ffn import Block, ffn_of, has_constant, is_known, read_block, write_experts, write_ffn
from distill.models.start.fit import (
    RATE_TIMES_WIDTH,
    STEP_TOKENS,
    Goal,
    Kept,
    Tell,
    batches,
    token_weights,
    train_alone,
)
from distill.models.start.narrow import Axes, check_narrowable, ffn_norm, principal_axes, turn
from distill.models.start.neurons import Task, narrow_ffn
from distill.models.start.shape import LayerFit, Shape, StudentFit
from distill.models.start.site import Seen, reading_gain, site_of, watching, writing_factor
from distill.models.start.skeleton import build, copy_shared, student_config
from distill.models.start.walk import Rows, Walk


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


@whole_products()
def _cut(teacher: PreTrainedModel, shape: Shape, rows: Rows, place: Place) -> tuple[PreTrainedModel, Axes | None]:
    """The student with everything but its FFNs, and its axes where it is narrower."""
    if shape.hidden_size is not None:
        check_narrowable(teacher, shape.hidden_size, experts=shape.intermediate_size is None)
    width = shape.intermediate_size
    if width is None and shape.hidden_size is None:
        return cut_layers(teacher, shape.layers).float(), None
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
        self.axes = None if axes is None else Axes(axes.axes_DK.to(place.device), axes.scale)
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
            with self._watching(layer, index, student_RLD) as seen:
                teacher_RLD = self.theirs.advance(range(start, stop), teacher_RLD)
            tell(layer, 0.3)
            goal = self._goal(teacher_RLD, stop)
            found, student_RLD = self._make_layer(
                layer, index, goal, student_RLD, seen, partial(_tell_layer, tell, layer)
            )
            fits.append(found)
            tell(layer, 1.0)
            start = stop
        return fits

    def _watching(self, layer: int, index: int, student_RLD: Tensor) -> AbstractContextManager[Seen | None]:
        """Records what a teacher's block does; of one that is unknown here and stays as it is, nothing."""
        theirs = decoder_layers(self.teacher)[index]
        if self.shape.intermediate_size is None and self.axes is None and not is_known(theirs):
            return nullcontext()
        return watching(theirs, writing_factor(self.mine, layer, student_RLD))

    def _goal(self, teacher_RLD: Tensor, stop: int) -> Goal:
        """What a layer is to reach: the teacher's states before its layer `stop`."""
        raw_RLD, counted_RL = self._turned(teacher_RLD), self.rows.counted_RL
        weight_RL = token_weights(raw_RLD, counted_RL)
        if stop < self.depth:
            gain_D = reading_gain(decoder_layers(self.teacher)[stop], teacher_RLD) if self.axes is None else None
            return Goal(raw_RLD, weight_RL, raw_RLD, weight_RL, gain_D, False)
        return Goal(raw_RLD, weight_RL, self._normed(teacher_RLD), counted_RL.float(), None, True)

    def _make_layer(
        self, layer: int, index: int, goal: Goal, student_RLD: Tensor, seen: Seen | None, tell: Tell
    ) -> tuple[LayerFit, Tensor]:
        """Fills and fits one layer; returns how near it came and the student's states behind it, or after the norm."""
        span = range(layer, layer + 1)
        task = self._fill(layer, index, goal, student_RLD, seen)
        after_RLD = self.mine.advance(span, student_RLD, goal.last).float()
        before = after = goal.error(after_RLD)
        trained = "nothing"
        if self.fit.steps and (task is not None or self.cut_deep):
            whole = self.cut_deep or self.axes is not None
            kept = Kept(self.mine.layers[layer])
            with self.mine.present(span):
                if whole or task is None:
                    self._train_layer(layer, student_RLD, goal, tell)
                else:
                    self._train_ffn(layer, task, tell)
            fitted_RLD = self.mine.advance(span, student_RLD, goal.last).float()
            after = goal.error(fitted_RLD)
            if after < before:
                after_RLD, trained = fitted_RLD, "layer" if whole else "ffn"
            else:
                kept.put_back()
                after = before
        return LayerFit(layer, index, trained, before, after), after_RLD

    def _turned(self, states_RLD: Tensor) -> Tensor:
        """The teacher's states in the student's axes."""
        return states_RLD.float() if self.axes is None else states_RLD.float() @ self.axes.axes_DK

    def _normed(self, states_RLD: Tensor) -> Tensor:
        """What the student's final norm should give."""
        if self.axes is None:
            return self.theirs.advance(range(0), states_RLD, normed=True).float()
        states_RLD = states_RLD.float()
        unit_RLD = states_RLD * torch.rsqrt(states_RLD.square().mean(-1, keepdim=True) + 1e-6)
        return self._turned(unit_RLD) / self.axes.scale

    @whole_products()
    def _fill(self, layer: int, index: int, goal: Goal, student_RLD: Tensor, seen: Seen | None) -> Task | None:
        """Gives a layer its FFN; returns what that is to do, None where it is the teacher's own."""
        if seen is None:
            return None
        target = ffn_of(self.mine.layers[layer])
        width = self.shape.intermediate_size
        if width is None and self.axes is None and not self.cut_deep:
            return None
        block = self._block(index)
        if self.axes is None and not self.cut_deep and block.experts is None and len(block.neurons) == width:
            write_ffn(target, block.neurons)
            return None
        counted_RL = self.rows.counted_RL
        if self.axes is not None and width is None and block.experts is not None:
            write_experts(target, {expert: block.of(expert) for expert in block.expert_M.unique().tolist()})
        task, mine_seen = self._task(layer, goal, student_RLD, seen)
        if width is None and block.experts is not None:
            mine = read_block(self.mine.layers[layer])
            gates_TE = mine_seen.gates(counted_RL.numel(), mine)
            assert gates_TE is not None
            refit_experts(self._elsewhere(mine), task, gates_TE[counted_RL.flatten()])
            return task
        gates_TE = seen.gates(counted_RL.numel(), block)
        chosen = narrow_ffn(
            block,
            task,
            None if gates_TE is None else gates_TE[counted_RL.flatten()],
            width or len(block.neurons),
            constant=has_constant(target),
            generator=torch.Generator().manual_seed(self.fit.seed + layer),
        )
        write_ffn(target, chosen)
        return task

    def _task(self, layer: int, goal: Goal, student_RLD: Tensor, seen: Seen) -> tuple[Task, Seen]:
        """What an FFN is to do on the student's states, and what the one that is there did."""
        counted_RL = self.rows.counted_RL
        site = site_of(self.mine, layer, student_RLD)
        if seen.factor is None:  # behind a norm of its own: what the teacher's wrote, before that norm
            target_ND = torch.cat(seen.outputs).flatten(0, 1)[counted_RL.flatten()].float()
        else:
            without_RLD = site.without_RLD
            target_ND = torch.sub(goal.raw_RLD, without_RLD, out=without_RLD).div_(seen.factor)[counted_RL]
        return Task(site.inputs_ND, target_ND, goal.raw_weight_RL[counted_RL]), site.seen

    def _block(self, index: int) -> Block:
        """The neurons of a teacher's layer, on the device; in fp32 and the student's axes where it has its own."""
        block = read_block(decoder_layers(self.teacher)[index])
        if self.axes is None:
            return self._elsewhere(block, block.neurons.inward_PMD.dtype)
        block = self._elsewhere(block)
        constants_ED = None if block.constants_ED is None else block.constants_ED @ self.axes.axes_DK
        neurons = self.axes.neurons(block.neurons, ffn_norm(self.teacher, index).to(self.place.device))
        return replace(block, neurons=neurons, constants_ED=constants_ED)

    def _elsewhere(self, block: Block, dtype: torch.dtype = torch.float32) -> Block:
        """A block with its neurons on the device."""
        device, constants_ED = self.place.device, block.constants_ED
        return replace(
            block,
            neurons=block.neurons.to(device, dtype),
            expert_M=block.expert_M.to(device),
            constants_ED=None if constants_ED is None else constants_ED.to(device, torch.float32),
        )

    def _train_layer(self, layer: int, student_RLD: Tensor, goal: Goal, tell: Tell) -> None:
        rows, length = student_RLD.shape[:2]
        drawn = batches(rows, min(rows, max(1, round(STEP_TOKENS / length))), self.fit.seed + layer)
        root_RL = goal.weight_RL.sqrt() / goal.weight_RL[self.rows.counted_RL].mean().sqrt()
        scale = (goal.shown_RLD[self.rows.counted_RL].var(0) * (1.0 if goal.gain_D is None else goal.gain_D**2)).mean()

        def loss_of(step: int) -> Tensor:
            part = next(drawn).to(self.place.device)
            output_BLD = self.mine.through(range(layer, layer + 1), student_RLD[part], part)[goal.last]
            wrong_BLD = (output_BLD.float() - goal.shown_RLD[part]) * root_RL[part][..., None]
            return (wrong_BLD if goal.gain_D is None else wrong_BLD * goal.gain_D).square().mean() / scale

        self._train(self.mine.layers[layer], loss_of, tell)

    def _train_ffn(self, layer: int, task: Task, tell: Tell) -> None:
        drawn = batches(len(task.states_ND), min(len(task.states_ND), STEP_TOKENS), self.fit.seed + layer)
        module, scale = ffn_of(self.mine.layers[layer]), task.target_ND.var()
        weight_N = task.weight_N / task.weight_N.mean()

        def loss_of(step: int) -> Tensor:
            part = next(drawn).to(self.place.device)
            with torch.autocast(self.place.device.type, self.place.autocast, enabled=self.place.autocast is not None):
                output: Any = module(task.states_ND[part][None])
            output_ND = (output[0] if isinstance(output, tuple) else output)[0]
            wrong_ND = output_ND.float() - task.target_ND[part]
            return (wrong_ND.square() * weight_N[part, None]).mean() / scale

        self._train(module, loss_of, tell)

    def _train(self, module: nn.Module, loss_of: Callable[[int], Tensor], tell: Tell) -> None:
        rate = self.fit.learning_rate or RATE_TIMES_WIDTH / self.student.config.hidden_size
        train_alone(module, loss_of, self.fit.steps, rate, tell)
