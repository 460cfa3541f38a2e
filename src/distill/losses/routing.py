"""Routing losses: what a teacher's experts do with a token, and which of them it asks, for a student to learn from.

Every target is the teacher's and detached; the only things here that learn are projections (student width to teacher
width) and gate probes (student width to experts), so no loss can be lowered by moving its own target. Both read the
student's state layer-normalised without affine, whatever the scale of the residual stream. With `tau: inf` a token's
target is what its native routing already computed and costs nothing; a finite `tau` looks at every expert on every
token, E / k times the routed work, unless `token_subset` bounds it.

Shapes: B rows, L positions, T = B * L, N valid tokens, D width, E experts, K experts per token.
"""

import math
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.batch import Batch, Tokens
from distill.curriculum import WEIGHT_KEY, CurriculumState
from distill.errors import UserError, did_you_mean
from distill.losses.component import Measured, check_coefficient
from distill.losses.layers import check_layers, same_depth, spread
from distill.losses.routing_terms import (
    attention_alignment,
    constant_gate_kl,
    expert_importance,
    feature_matching,
    load_balance,
    student_aware_route,
    usage_stats,
)
from distill.losses.states import apply, normalise
from distill.models.blocks import moe_layers
from distill.models.layers import decoder_layers
from distill.models.precision import full_precision
from distill.models.trace import Needs, Trace
from distill.teachers.experts import Capture, Routed, View
from distill.teachers.find_experts import find_views

UNIT = {
    "routing_feature_matching_loss": "targets",
    "routing_expert_importance_loss": "targets",
    "routing_load_balancing_loss": "micro_batches",
    "routing_attention_alignment_loss": "queries",
}
FEATURE, IMPORTANCE, BALANCE, ALIGNMENT = UNIT


@final
class Routing(nn.Module):
    """The four routing losses over the teacher's experts at chosen layers.

    Args:
        losses: name without the `routing_` prefix -> coefficient, default all four at 1.
        teacher_layers: a number of layers at even depth fractions, or 0-based indices; of a MoE teacher the MoE layers
            are meant.
        student_layers: 0-based, one for each teacher layer; default the same depth fractions.
        num_experts: slices of a dense FFN, default 8; for a MoE teacher None.
        native_top_k: slices per token of a dense FFN, default 2; for a MoE teacher None.
        tau: temperature of student-aware selection; `inf` is the teacher's own gate, bit for bit. At a finite tau a
            selection bias or groups of experts (DeepSeek) do not take part.
        token_subset: with a finite tau, at most so many tokens of a micro-batch and rank are looked at with all
            experts, evenly spaced over the valid ones; the others keep the teacher's own gate. It bounds the cost to
            E * token_subset expert evaluations a layer. Which tokens these are depends on the micro-batch, so the
            loss is then no longer the same for every split of the same tokens.

    Raises:
        UserError: a name, coefficient, temperature or count that cannot be meant.
    """

    def __init__(
        self,
        losses: dict[str, float] | None = None,
        teacher_layers: int | list[int] = 1,
        student_layers: list[int] | None = None,
        num_experts: int | None = None,
        native_top_k: int | None = None,
        tau: float = math.inf,
        token_subset: int | None = None,
    ) -> None:
        super().__init__()
        names = [component.removeprefix("routing_") for component in UNIT]
        losses = dict.fromkeys(names, 1.0) if losses is None else losses
        for name, coefficient in losses.items():
            if name not in names:
                raise UserError(f"model.routing.losses: {name!r} is no routing loss; {did_you_mean(name, names)}")
            check_coefficient(f"model.routing.losses: {name} has coefficient", coefficient)
        if not losses:
            raise UserError("model.routing.losses: {} names no routing loss; name one or leave routing out")
        if not tau > 0:
            raise UserError(
                f"model.routing.tau: {tau} is not a temperature; give a number above 0, or inf for the teacher's gate"
            )
        if tau < math.inf and "feature_matching_loss" not in losses:
            raise UserError(
                f"model.routing.tau: {tau} needs the projection of feature_matching_loss; add that loss or set tau: inf"
            )
        for key, value in (
            ("num_experts", num_experts),
            ("native_top_k", native_top_k),
            ("token_subset", token_subset),
            ("teacher_layers", teacher_layers if isinstance(teacher_layers, int) else len(teacher_layers)),
        ):
            if value is not None and value < 1:
                raise UserError(f"model.routing.{key}: {value} is not a count; give 1 or more")
        if token_subset is not None and tau == math.inf:
            raise UserError(
                f"model.routing.token_subset: {token_subset} bounds a finite tau only; set tau or leave it out"
            )
        self.coefficients = {f"routing_{name}": float(coefficient) for name, coefficient in losses.items()}
        self.components = [component for component in WEIGHT_KEY if component in self.coefficients]
        self.teacher_layers = teacher_layers
        self.student_layers = student_layers
        self.num_experts = num_experts
        self.native_top_k = native_top_k
        self.tau = tau
        self.token_subset = token_subset
        self.projections = nn.ModuleList()
        self.probes = nn.ModuleList()
        self.native_k = 0
        self.routed_experts: int | None = None
        self.teacher_needs, self.student_needs = Needs(), Needs()
        self.student_layer_indices: list[int] = []
        self._views: list[View] = []
        self._warned = False

    @property
    def units(self) -> Mapping[str, str]:
        """The configured losses and their units."""
        return {component: UNIT[component] for component in self.components}

    def build(self, teacher: PreTrainedModel, student: PreTrainedModel, rows: int | None = None) -> None:
        """Finds the teacher's experts and makes the projections and probes that the configured losses need.

        Raises:
            UserError: a layer is out of range or has no experts, or counts differ from the teacher's.
        """
        config = student.config.get_text_config(decoder=True)
        depth, sparse = len(decoder_layers(teacher)), moe_layers(teacher)
        layers = self.teacher_layers
        if isinstance(layers, int):
            layers = spread(layers, sparse or list(range(depth)))
        check_layers("model.routing.teacher_layers", layers, depth)
        chosen = self.student_layers
        if chosen is None:
            chosen = [same_depth(layer, depth, config.num_hidden_layers) for layer in layers]
        check_layers("model.routing.student_layers", chosen, config.num_hidden_layers)
        if len(chosen) != len(layers):
            raise UserError(
                f"model.routing.student_layers: {chosen} are not one for each of teacher_layers {layers}; match them"
            )
        self._views = find_views(teacher, layers, self.num_experts, self.native_top_k)
        self.student_layer_indices = chosen
        self.teacher_needs = Needs(recorders=tuple(self._views))
        self.student_needs = Needs(hidden=frozenset(chosen))
        num_experts, self.native_k = self._views[0].num_experts, self._views[0].native_k
        self.routed_experts = num_experts
        if FEATURE in self.components:
            self.projections = nn.ModuleList(nn.Linear(config.hidden_size, view.width) for view in self._views)
        if IMPORTANCE in self.components or BALANCE in self.components:
            self.probes = nn.ModuleList(nn.Linear(config.hidden_size, num_experts) for _ in self._views)

    def trained_by(self, component: str) -> Iterator[nn.Parameter]:
        """The projections or probes that a component sends gradient to."""
        heads = {FEATURE: self.projections, IMPORTANCE: self.probes, BALANCE: self.probes}
        yield from heads[component].parameters() if component in heads else ()

    def settings(self) -> dict[str, Any]:
        """What heads and targets depend on, as plain values."""
        return {
            "components": self.components,
            "coefficients": [self.coefficients[component] for component in self.components],
            "tau": self.tau,
            "token_subset": self.token_subset,
            "native_top_k": self.native_k,
            "teacher_layers": [view.layer for view in self._views],
            "student_layers": self.student_layer_indices,
            "num_experts": self.routed_experts or 0,
        }

    def figures(self, state: CurriculumState) -> dict[str, float]:
        """The number of experts that tokens are routed to now."""
        return {"curriculum/top_k_experts": float(state.top_k_experts or self.native_k)}

    def reads(self, name: str) -> str:
        """Layers, and experts but where only the student's probe is looked at."""
        layers = [view.layer for view in self._views] or self.teacher_layers
        teacher = f"{layers} teacher layers" if isinstance(layers, int) else f"teacher layers {layers}"
        experts = f"{self.routed_experts} experts" if self.routed_experts else "experts"
        student = f"student layers {self.student_layer_indices or 'at the same depths'}"
        return student if name == BALANCE else f"{experts} of {teacher}, {student}"

    def heads(self, name: str) -> str:
        """Projections or gate probes."""
        return "projections" if name == FEATURE else "gate probes"

    def measure(
        self, names: Collection[str], student: Trace, teacher: Trace, batch: Batch, state: CurriculumState
    ) -> Measured:
        """The losses of `names`, at the number of experts that the curriculum says; statistics as `routing/NAME`."""
        states_BLD = [student.hidden[layer] for layer in self.student_layer_indices]
        theirs_N = None if batch.pairs is None else batch.theirs_M
        found = self(names, states_BLD, teacher.records, batch.compared, state.top_k_experts, theirs_N)
        return Measured(found.sums, {f"routing/{name}": value for name, value in found.stats.items()})

    def forward(
        self,
        names: Collection[str],
        student_states_BLD: list[Tensor],
        records: Mapping[int, Capture],
        tokens: Tokens,
        top_k_experts: int | None = None,
        theirs_N: Tensor | None = None,
    ) -> Measured:
        """The requested components of one micro-batch.

        Args:
            names: components.
            student_states_BLD: outputs of the student's `student_layer_indices`.
            records: what the teacher's blocks did with the same tokens, by layer.
            tokens: of the batch.
            top_k_experts: experts per token, None for the native k.
            theirs_N: the teacher's tokens beside the valid ones; None where both sides have the same.

        Raises:
            UserError: top_k_experts is not between 1 and E.
        """
        assert self._views, "build() comes first"
        assert len(student_states_BLD) == len(self._views)
        wanted = [component for component in self.components if component in names]
        k = self._experts_per_token(top_k_experts)
        sums = {component: full_precision(student_states_BLD[0]).new_zeros(()) for component in wanted}
        stats: list[dict[str, Tensor]] = []
        probe_logits = []
        for i, (view, states_BLD) in enumerate(zip(self._views, student_states_BLD, strict=True)):
            states_BLD = normalise(states_BLD)
            states_ND = tokens.valid(states_BLD)
            if IMPORTANCE in wanted or BALANCE in wanted:
                probe_logits.append(full_precision(apply(self.probes[i], states_ND)))
            if set(wanted) <= {BALANCE}:  # nothing else reads the teacher's experts
                continue
            probe_NE = probe_logits[i] if IMPORTANCE in wanted else None
            sides = (states_BLD, states_ND, probe_NE, records[view.layer], tokens)
            found = self._layer(i, wanted, *sides, k, theirs_N)
            sums |= {component: sums[component] + value for component, value in found.sums.items()}
            stats.append(found.stats)
        if BALANCE in wanted:  # over all ranks, so every rank comes here, with tokens or without
            balance = load_balance(torch.cat(probe_logits), self.native_k, len(self._views))
            sums[BALANCE] = balance * len(self._views)
        scale = {component: self.coefficients[component] / len(self._views) for component in wanted}
        return Measured(
            {component: value * scale[component] for component, value in sums.items()},
            {name: torch.stack([layer[name] for layer in stats]).mean() for name in (stats[0] if stats else ())},
        )

    def _layer(
        self, i: int, wanted: list[str], states_BLD: Tensor, states_ND: Tensor, probe_NE: Tensor | None,
        capture: Capture, tokens: Tokens, k: int, theirs_N: Tensor | None,
    ) -> Measured:  # fmt: skip
        """What the experts of the i-th teacher layer add to the losses, without coefficients, and their statistics.

        Args:
            i: which of the layers.
            wanted: components.
            states_BLD, states_ND: of the student, normalised; those of all tokens and of the valid ones.
            probe_NE: logits of the gate probe, for the importance loss.
            capture: what the teacher's block did.
            tokens: of the batch.
            k: experts per token.
            theirs_N: see `forward`.
        """
        positions_N = tokens.positions
        if ALIGNMENT in wanted and theirs_N is None:  # its keys need not be valid tokens
            rows_R = torch.arange(states_BLD[..., 0].numel(), device=positions_N.device)
            states_RD, valid_N = states_BLD.flatten(0, 1), positions_N
        else:
            rows_R, states_RD = positions_N if theirs_N is None else theirs_N, states_ND
            valid_N = torch.arange(len(positions_N), device=positions_N.device)
        mixture = ALIGNMENT in wanted or FEATURE in wanted
        project = FEATURE in wanted or (mixture and self.tau < math.inf)
        projected_RD = apply(self.projections[i], states_RD) if project else None
        routed = self._route(self._views[i], capture, rows_R, valid_N, projected_RD, k, mixture)
        gates_NE = routed.gates_NE.index_select(0, valid_N)
        sums, stats = {}, usage_stats(routed, gates_NE, valid_N)
        if FEATURE in wanted:
            assert projected_RD is not None
            assert routed.mixture_ND is not None
            target_ND = routed.mixture_ND.index_select(0, valid_N)
            sums[FEATURE] = feature_matching(projected_RD.index_select(0, valid_N), target_ND)
        if probe_NE is not None:
            sums[IMPORTANCE] = expert_importance(probe_NE, gates_NE)
            constant = constant_gate_kl(gates_NE)
            gain = constant - sums[IMPORTANCE].detach() / max(1, len(gates_NE))
            stats |= {"constant_gate_kl": constant, "probe_gain": gain}
        if ALIGNMENT in wanted:
            assert routed.mixture_ND is not None
            mixture_ND = normalise(routed.mixture_ND)
            mixture_BLD = mixture_ND.view(*states_BLD.shape[:2], -1) if theirs_N is None else tokens.laid(mixture_ND)
            sums[ALIGNMENT] = attention_alignment(states_BLD, mixture_BLD, tokens)
        return Measured(sums, stats)

    def _route(
        self, view: View, capture: Capture, rows_R: Tensor, valid_N: Tensor, projected_RD: Tensor | None, k: int,
        mixture: bool,
    ) -> Routed:  # fmt: skip
        """Routing of rows R of the batch, `valid_N` of which are valid tokens: the teacher's own, or student-aware."""
        with torch.autocast(rows_R.device.type, enabled=False):  # as in the teacher's own forward pass
            if self.tau == math.inf or projected_RD is None:
                return view.route(capture, rows_R, k, mixture)
            if self.token_subset is None:
                routed = student_aware_route(view, capture, rows_R, projected_RD, k, self.tau)
                assert routed.gap_NK is not None
                return replace(routed, gap_NK=routed.gap_NK.index_select(0, valid_N))
            some_S = valid_N[:: max(1, math.ceil(len(valid_N) / self.token_subset))]
            own = view.route(capture, rows_R, k, mixture)
            aware = student_aware_route(
                view, capture, rows_R.index_select(0, some_S), projected_RD.index_select(0, some_S), k, self.tau
            )
            assert own.mixture_ND is not None
            assert aware.mixture_ND is not None
            return Routed(
                own.gates_NE,
                own.index_NK.index_copy(0, some_S, aware.index_NK),
                own.mixture_ND.index_copy(0, some_S, aware.mixture_ND.to(own.mixture_ND.dtype)),
                aware.gap_NK,
            )

    def _experts_per_token(self, top_k_experts: int | None) -> int:
        if top_k_experts is None:
            return self.native_k
        if not 1 <= top_k_experts <= (self.routed_experts or 0):
            raise UserError(
                f"curriculum.top_k_experts: {top_k_experts} is not within 1 to {self.routed_experts} experts; change it"
            )
        if top_k_experts < self.native_k and not self._warned:
            self._warned = True
            warnings.warn(
                f"top_k_experts: {top_k_experts} is below the teacher's own {self.native_k} experts per token: "
                "the targets are poorer than what the teacher computes",
                stacklevel=3,
            )
        return top_k_experts
