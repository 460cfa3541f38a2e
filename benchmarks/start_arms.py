"""The arms of start.py: each makes a student of a teacher on calibration rows, as a function of the two and a seed.

What the program does is called; what it is compared with is written out here: a random start, the best-scored experts
side by side with their outputs averaged, as the published recipe has it (arXiv 2605.28207, by its description), the
same experts with a least-squares read-out, and neurons chosen on the teacher's own states rather than the student's.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from distill.models.cut import cut_layers
from distill.models.layers import decoder_layers
from distill.models.start.ffn import Block, ffn_of, read_block, write_ffn
from distill.models.start.make import make_student
from distill.models.start.neurons import Task, fitted, narrow_ffn
from distill.models.start.shape import Shape, StudentFit
from distill.models.start.skeleton import build, copy_shared, student_config
from distill.models.start.walk import Rows

Make = Callable[[Any, Rows, int], Any]
WIDTH = 256  # neurons of a dense FFN of the small teacher: two of its eight experts
NARROW, NARROW_WIDTH = 96, 192
SMOL_KEPT = [0, 3, 6, 10, 13, 16, 19, 23, 26, 29]


@dataclass(frozen=True)
class Arm:
    """How a student starts.

    Args:
        make: the student.
        equal_s: whether its steps are so many fewer as its start took time for.
        rate: whose learning rate it has: of start.py's RATES.
    """

    make: Make
    equal_s: bool = False
    rate: str = "made"


@dataclass(frozen=True, eq=False)
class Seen:
    """What a teacher's block did on calibration rows: input and output [N, D], gates [N, E]."""

    block: Block
    states_ND: Tensor
    output_ND: Tensor
    gates_NE: Tensor

    @property
    def task(self) -> Task:
        """To give the same output, every token counting alike."""
        return Task(self.states_ND, self.output_ND, self.states_ND.new_ones(len(self.states_ND)))


@torch.no_grad()
def seen_by(teacher: Any, rows: Rows) -> list[Seen]:
    """Every block on the teacher's own states."""
    kept: list[dict[str, list[Tensor]]] = [{} for _ in decoder_layers(teacher)]
    handles = []
    for found, layer in zip(kept, decoder_layers(teacher), strict=True):

        def after(module: Any, args: Any, output: Tensor, found: dict[str, list[Tensor]] = found) -> None:
            states, index, weights = args[:3]
            gates = torch.zeros(len(states), module.num_experts).scatter(1, index, weights)
            for name, value in (("states", states), ("output", output), ("gates", gates)):
                found.setdefault(name, []).append(value)

        handles.append(ffn_of(layer).experts.register_forward_hook(after))  # type: ignore[union-attr]
    for part in rows.parts():
        teacher.get_decoder()(rows.ids_RL[part], position_ids=None, use_cache=False)
    for handle in handles:
        handle.remove()
    counted_N = rows.counted_RL.flatten()
    return [
        Seen(read_block(layer), *(torch.cat(found[name])[counted_N] for name in ("states", "output", "gates")))
        for layer, found in zip(decoder_layers(teacher), kept, strict=True)
    ]


def random_ffns(teacher: Any, rows: Rows, seed: int) -> Any:
    """Everything but the FFNs copied, those random."""
    torch.manual_seed(seed)
    kept = list(range(len(decoder_layers(teacher))))
    student = build(student_config(teacher, kept, WIDTH, None), teacher)
    copy_shared(student, teacher, kept)
    return student


def best_experts(seen: Seen) -> Tensor:
    """Indices of the neurons of the experts with the largest mean gated output."""
    block, size = seen.block, len(seen.block.neurons) // seen.gates_NE.shape[1]
    scores = []
    for expert in range(seen.gates_NE.shape[1]):
        norms_N = block.of(expert).output(seen.states_ND).norm(dim=1)
        scores.append((norms_N * seen.gates_NE[:, expert]).mean())
    best = torch.stack(scores).topk(WIDTH // size).indices.sort().values
    return (best[:, None] * size + torch.arange(size)).flatten()


def of_experts(least_squares: bool) -> Make:
    """The best experts side by side: each one's output over their number, or a least-squares read-out."""

    def make(teacher: Any, rows: Rows, seed: int) -> Any:
        student = random_ffns(teacher, rows, seed)
        for layer, seen in zip(decoder_layers(student), seen_by(teacher, rows), strict=True):
            chosen = seen.block.neurons[best_experts(seen)]
            count = WIDTH * seen.gates_NE.shape[1] // len(seen.block.neurons)
            chosen = replace(chosen, outward_MD=chosen.outward_MD / count)
            write_ffn(ffn_of(layer), fitted(chosen, seen.task, False) if least_squares else chosen)
        return student

    return make


def greedy(teacher: Any, rows: Rows, seed: int) -> Any:
    """Neurons chosen over all experts and fitted on the teacher's own states, each layer for itself."""
    student = random_ffns(teacher, rows, seed)
    for layer, seen in zip(decoder_layers(student), seen_by(teacher, rows), strict=True):
        write_ffn(ffn_of(layer), narrow_ffn(seen.block, seen.task, seen.gates_NE, WIDTH))
    return student


def made(steps: int, width: int | None = WIDTH, hidden: int | None = None, layers: list[int] | None = None) -> Make:
    """What the program makes."""

    def make(teacher: Any, rows: Rows, seed: int) -> Any:
        kept = layers or list(range(len(decoder_layers(teacher))))
        return make_student(teacher, Shape(kept, width, hidden), rows, StudentFit(steps=steps, seed=seed))[0]

    return make


def from_scratch(teacher: Any, rows: Rows, seed: int) -> Any:
    """A narrower student with random weights throughout."""
    torch.manual_seed(seed)
    config = student_config(teacher, list(range(len(decoder_layers(teacher)))), NARROW_WIDTH, NARROW)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.to_dict()), dtype=torch.float32)


def plain_cut(layers: list[int]) -> Make:
    """Layers copied and left as they are."""
    return lambda teacher, rows, seed: cut_layers(teacher, layers)


CLOSED, FITTED = made(0), made(60)
MOE = {
    "random": Arm(random_ffns, rate="random"),
    "best experts / k": Arm(of_experts(least_squares=False), rate="published"),
    "best experts, least squares": Arm(of_experts(least_squares=True)),
    "greedy": Arm(greedy),
    "sequential": Arm(CLOSED),
    "fitted": Arm(FITTED),
    "fitted, 200 steps": Arm(made(200)),
    "sequential, equal seconds": Arm(CLOSED, equal_s=True),
    "fitted, equal seconds": Arm(FITTED, equal_s=True),
    "narrow, random": Arm(from_scratch, rate="random"),
    "narrow, principal axes": Arm(made(60, NARROW_WIDTH, NARROW)),
    "two layers, cut": Arm(plain_cut([0, 3]), rate="published"),
    "two layers, fitted": Arm(made(60, None, None, [0, 3])),
}
SMOL_CLOSED, SMOL_FITTED = (made(steps, None, None, SMOL_KEPT) for steps in (0, 10))
SMOL = {
    "cut": Arm(plain_cut(SMOL_KEPT), rate="cut"),
    "fitted": Arm(SMOL_FITTED),
    "fitted, equal seconds": Arm(SMOL_FITTED, equal_s=True),
    "closed form": Arm(SMOL_CLOSED),
    "closed form, equal seconds": Arm(SMOL_CLOSED, equal_s=True),
}
