"""layerwise_loss: chosen student layers, linearly projected, predict the teacher's states at the same depth.

Only the projections and the student learn; the teacher's states are layer-normalised without affine, so a value of 1 is
predicting nothing, whatever their scale. Embeddings and each document's first position take no part: the massive
activations there would be all that a squared error sees. Each pair of layers has a matrix of student width x teacher
width, which is trained and then thrown away; a student that was cut from the teacher speaks its language already, and
is compared as it is: there a random projection made it worse (KL +0.008 at 0.084), none made it better (-0.007).

Shapes: N valid tokens, D width (each side its own).
"""

from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from distill.batch import Batch
from distill.errors import UserError
from distill.losses.component import OneLoss, check_coefficient
from distill.losses.layers import check_layers, same_depth, spread
from distill.losses.states import apply, normalise
from distill.models.precision import full_precision
from distill.models.skeleton import same_embeddings
from distill.models.trace import Needs, Trace

DEFAULT_PAIRS = 4  # or as many as the student has layers


def squared_error(projected_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """Squared error to the layer-normalised teacher state, mean over features [N]; 1 = predicting nothing."""
    return (full_precision(projected_ND) - normalise(teacher_ND)).square().mean(-1)


def cosine_distance(projected_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """1 - cosine with the teacher state [N], in [0, 2]."""
    return 1 - F.cosine_similarity(full_precision(projected_ND), full_precision(teacher_ND), dim=-1)


def plain_error(states_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """Squared error to the teacher state as it is, over the variance of its features, mean over features [N]."""
    target_ND = full_precision(teacher_ND)
    spread_N1 = target_ND.var(-1, correction=0, keepdim=True) + 1e-20
    return ((full_precision(states_ND) - target_ND).square() / spread_N1).mean(-1)


DISTANCES = {"mse": squared_error, "cosine": cosine_distance}
PLAIN_DISTANCES = {"mse": plain_error, "cosine": cosine_distance}


@final
class Layerwise(OneLoss, nn.Module):
    """Matching of hidden states between pairs of layers.

    Args:
        distance: mse (to the layer-normalised teacher state) or cosine (1 - cosine).
        student_layers: a number of layers at even depth fractions, or 0-based indices; null = four of them, or all of
            a student that has fewer; with given teacher_layers those at the same depth fractions. The last layer's
            state is read after the final norm.
        teacher_layers: 0-based, one for each student layer; null = those at the same depth fractions.
        coefficient: constant factor of the raw value.
        projection: linear, or none between states of equal width; auto = none where the student has the teacher's
            embeddings, as one has that was cut from it.

    Raises:
        UserError: a number that cannot be meant.

    Source:
        After FitNets, arXiv 1412.6550, and TinyBERT, arXiv 1909.10351.
    """

    component = "layerwise_loss"
    unit = "queries"  # valid tokens that are not their document's first
    looks_at = "hidden states"

    def __init__(
        self,
        distance: Literal["mse", "cosine"] = "mse",
        student_layers: int | list[int] | None = None,
        teacher_layers: list[int] | None = None,
        coefficient: float = 1.0,
        projection: Literal["auto", "linear", "none"] = "auto",
    ) -> None:
        super().__init__()
        check_coefficient("model.layerwise.coefficient:", coefficient)
        for key, layers in (("student_layers", student_layers), ("teacher_layers", teacher_layers)):
            if layers is not None and (layers if isinstance(layers, int) else len(layers)) < 1:
                raise UserError(f"model.layerwise.{key}: {layers} names no layer; give 1 or more")
        self.distance = distance
        self.student_layers, self.teacher_layers = student_layers, teacher_layers
        self.coefficient, self.projection = coefficient, projection
        self.pairs: list[tuple[int, int]] = []
        self.projections = nn.ModuleList()

    def build(self, teacher: PreTrainedModel, student: PreTrainedModel, rows: int | None = None) -> None:
        """Pairs the layers and makes a projection for each pair.

        Raises:
            UserError: layers that are not there, or not one for one.
        """
        ours, theirs = (model.config.get_text_config(decoder=True) for model in (student, teacher))
        depth, their_depth = ours.num_hidden_layers, theirs.num_hidden_layers
        chosen, targets = self.student_layers, self.teacher_layers
        if targets is not None:
            check_layers("model.layerwise.teacher_layers", targets, their_depth)
        if chosen is None and targets is not None:
            chosen = [same_depth(layer, their_depth, depth) for layer in targets]
        elif chosen is None or isinstance(chosen, int):
            count = min(DEFAULT_PAIRS, depth) if chosen is None else chosen
            if count > depth:
                raise UserError(
                    f"model.layerwise.student_layers: {count} are more than the student's {depth} layers; lower it"
                )
            chosen = spread(count, list(range(depth)))
        check_layers("model.layerwise.student_layers", chosen, depth)
        if targets is None:
            targets = [same_depth(layer, depth, their_depth) for layer in chosen]
        if len(targets) != len(chosen):
            raise UserError(
                f"model.layerwise.teacher_layers: {targets} are not one for each of student_layers {chosen}; match them"
            )
        self.pairs = list(zip(chosen, targets, strict=True))
        self.student_needs, self.teacher_needs = Needs(hidden=frozenset(chosen)), Needs(hidden=frozenset(targets))
        if self.projection == "none" and ours.hidden_size != theirs.hidden_size:
            raise UserError(
                f"model.layerwise.projection: none between states of {ours.hidden_size} and {theirs.hidden_size} "
                "numbers; set auto or linear"
            )
        plain = self.projection == "none" or (self.projection == "auto" and same_embeddings(teacher, student))
        pairs = [] if plain else self.pairs
        self.projections = nn.ModuleList(nn.Linear(ours.hidden_size, theirs.hidden_size) for _ in pairs)

    def settings(self) -> dict[str, Any]:
        """What the projections in a checkpoint depend on, as plain values."""
        plain = {} if self.projections else {"projection": "none"}
        return plain | {
            "distance": self.distance,
            "pairs": [list(pair) for pair in self.pairs],
            "coefficient": self.coefficient,
        }

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        """Sum over non-first valid tokens, averaged over the pairs of layers, times the coefficient, scalar.

        Args:
            student: with what `student_needs` says.
            teacher: detached, with what `teacher_needs` says.
            batch: which both have read.
        """
        assert self.pairs, "build() comes first"
        tokens = batch.compared
        counts_N = tokens.query_N
        values = []
        for index, (ours, theirs) in enumerate(self.pairs):
            states_ND = tokens.valid(student.hidden[ours])
            target_ND = batch.of_teacher(teacher.hidden[theirs].detach())
            if self.projections:
                projected_ND = apply(self.projections[index], normalise(states_ND))
                distance_N = DISTANCES[self.distance](projected_ND, target_ND)
            else:
                distance_N = PLAIN_DISTANCES[self.distance](states_ND, target_ND)
            values.append((distance_N * counts_N).sum())
        return torch.stack(values).mean() * self.coefficient
