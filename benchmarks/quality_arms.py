"""The arms of quality.py: each says in a few keys how it differs, everything else is the same for all.

The weights are the defaults' own: 0.7 KD + 0.3 LM at temperature 2, other losses at the height that the three-phase
curriculum ends with, where their gradients are a hundredth to a tenth of KD's; so each is tried at ten times that too.
A loss that only helps at yet another weight counts as a null here.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from distill.losses.attention import AttentionTransfer
from distill.losses.contrastive import Contrastive
from distill.losses.engine.divergence import KDLoss
from distill.losses.layerwise import Layerwise
from distill.losses.routing import Routing
from distill.teachers.targets import DenseTargets, TopKTargets, top_k_targets

OFF = {"feature": 0.0, "attention": 0.0, "layerwise": 0.0, "contrastive": 0.0}
ON = {"feature": 0.1, "attention": 0.1, "layerwise": 0.05, "contrastive": 0.05}  # where the three phases end
REVERSED = {
    "feature": [[0.4, 0.1], [0.7, 0.0]],
    "attention": [[0.4, 0.1], [0.7, 0.0]],
    "layerwise": [[0.0, 0.05], [0.4, 0.0]],
    "contrastive": [[0.0, 0.05], [0.4, 0.0]],
}
LOSSES = {"routing": Routing, "attention": AttentionTransfer, "layerwise": Layerwise, "contrastive": Contrastive}
BYTES = 32  # of stored targets per token: 2 an id, 2 a log-probability, 1 a count
TOP_K = BYTES // 4
DRAWN = (BYTES - 2) // 3  # distinct ids; two bytes are the entropy


@dataclass(frozen=True)
class Arm:
    """How an arm differs.

    Args:
        model: keys of the module; losses that learn as options, since each run needs modules of its own.
        curriculum: keys of the curriculum.
        learns_from: makes a false teacher of the true one's last hidden state [B, L, D], in training only.
        patches: name in the program -> what stands there instead, for what the program refuses to offer.
        rate: whose learning rate it has, `ce` or `kd`.
    """

    model: dict[str, Any] = field(default_factory=dict)
    curriculum: dict[str, Any] = field(default_factory=dict)
    learns_from: Callable[[Tensor], Tensor] | None = None
    patches: dict[str, Callable[..., Any]] = field(default_factory=dict)
    rate: str = "kd"


def shifted(hidden_BLD: Tensor) -> Tensor:
    """What the teacher expects one position earlier."""
    return hidden_BLD.roll(1, dims=1)


def shuffled(hidden_BLD: Tensor) -> Tensor:
    """What the teacher expects in another row."""
    return hidden_BLD.roll(1, dims=0)


def top_k_renormalised(targets: DenseTargets, k: int, temperature: float, shared_vocab: int) -> TopKTargets:
    """Top-k targets whose k probabilities are made to sum to one, so that there is no tail."""
    found = top_k_targets(targets, k, temperature, shared_vocab)
    logprobs_NK = found.logprobs_NK.log_softmax(-1)
    return replace(found, logprobs_NK=logprobs_NK, log_tail_N=torch.full_like(found.log_tail_N, -torch.inf))


def both_renormalised(
    kd: KDLoss,
    student_RS: Tensor,
    ids_RK: Tensor,
    logprobs_RK: Tensor,
    log_tail_R: Tensor,
    temperature: float,
    buffers: Any,
    gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Forward KL of two softmaxes over the k ids alone, in the place of the engine's `top_k_rows`."""
    log_q = (student_RS.gather(1, ids_RK) / temperature).log_softmax(-1)
    log_p = logprobs_RK.to(log_q.dtype).log_softmax(-1)
    value_R = (log_p.exp() * (log_p - log_q)).sum(-1)
    return value_R, torch.zeros_like(student_RS).scatter_(1, ids_RK, log_q.exp() - log_p.exp())


def routing(*names: str, **options: Any) -> dict[str, Any]:
    """Options of `Routing` with some losses, all four without names."""
    losses = {f"{name}_loss": 1.0 for name in names} or None
    return {"routing": {"losses": losses, "teacher_layers": 2, **options}}


def single(key: str, model: dict[str, Any], times: float = 1.0) -> Arm:
    """KD and one more loss, at the weight where the three phases end or so many times that."""
    return Arm(model, OFF | {key: times * ON[key]})


def feature(**options: Any) -> Arm:
    """KD and routed feature matching."""
    return single("feature", routing("feature_matching", **options))


def sparse(patches: dict[str, Callable[..., Any]] | None = None, **options: int) -> Arm:
    """KD alone at temperature 1, so that nothing but the targets teaches."""
    alone = OFF | {"kd": 1.0, "lm": 0.0, "temperature": 1.0}
    return Arm({"kd_loss": KDLoss(**options)}, alone, patches=patches or {})


def moe_arms(draws: int) -> dict[str, Arm]:
    """Name -> arm of the small MoE teacher; `draws` fill the sampled targets' bytes."""
    kd = Arm(curriculum=OFF)
    aware, every = {"tau": 1.0}, {"teacher_top_k": "all"}
    every_loss = routing() | {"attention": {}, "layerwise": {}, "contrastive": {}}
    arms = {
        "ce": Arm({"kd_loss": None}, OFF | {"lm": 1.0}, rate="ce"),
        "kd": kd,
        "kd, teacher shifted": replace(kd, learns_from=shifted, rate="ce"),
        "kd, teacher shuffled": replace(kd, learns_from=shuffled, rate="ce"),
        "kd + feature matching": feature(),
        "kd + expert importance": single("feature", routing("expert_importance")),
        "kd + load balancing": single("feature", routing("load_balancing")),
        "kd + attention alignment": single("attention", routing("attention_alignment")),
        "kd + attention": single("attention", {"attention": {}}),
        "kd + layerwise": single("layerwise", {"layerwise": {}}),
        "kd + contrastive": single("contrastive", {"contrastive": {}}),
        "kd + 10 x feature matching": single("feature", routing("feature_matching"), 10),
        "kd + 10 x expert importance": single("feature", routing("expert_importance"), 10),
        "kd + 10 x attention alignment": single("attention", routing("attention_alignment"), 10),
        "kd + 10 x attention": single("attention", {"attention": {}}, 10),
        "kd + 10 x layerwise": single("layerwise", {"layerwise": {}}, 10),
        "kd + 10 x contrastive": single("contrastive", {"contrastive": {}}, 10),
        "all constant": Arm(every_loss, ON),
        "three phases": Arm(every_loss),
        "reversed phases": Arm(every_loss, REVERSED),
        "kd without lm": Arm(curriculum=OFF | {"kd": 1.0, "lm": 0.0}),
        "temperature 4 to 1": Arm(curriculum=OFF | {"temperature": [[0.0, 4.0], [1.0, 1.0]]}),
        "temperature 1 to 4": Arm(curriculum=OFF | {"temperature": [[0.0, 1.0], [1.0, 4.0]]}),
        "full": sparse(),
        "top-k + tail": sparse(top_k=TOP_K),
        "sampled": sparse(samples=draws),
        "top-k renormalised": sparse({"distill.teachers.online.top_k_targets": top_k_renormalised}, top_k=TOP_K),
        "both renormalised": sparse({"distill.teachers.targets.top_k_rows": both_renormalised}, top_k=TOP_K),
        "top-2, feature, tau 1": feature(**aware),
        "all experts": Arm(every, OFF),
        "all experts, feature": replace(feature(), model=feature().model | every),
        "all experts, feature, tau 1": replace(feature(**aware), model=feature(**aware).model | every),
    }
    return arms


def smol_arms() -> dict[str, Arm]:
    """Name -> arm of the package's SmolLM2-135M."""
    return {
        "ce": Arm({"kd_loss": None}, OFF | {"lm": 1.0}, rate="ce"),
        "kd": Arm(curriculum=OFF),
        "three phases": Arm(routing() | {"attention": {}, "layerwise": {}, "contrastive": {}}),
    }


def keys_of(arm: Arm) -> dict[str, Any]:
    """The module's keyword arguments, with losses of the run's own."""
    return {key: LOSSES[key](**value) if key in LOSSES else value for key, value in arm.model.items()}
