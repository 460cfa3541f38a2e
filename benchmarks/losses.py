"""What the routing, attention, layerwise and contrastive losses, alone and together, add to the quickstart's KD step.

The quickstart's own models and text, the program's own objective. There is one module with every component; an arm is a
step with some of them, at the weights of the default curriculum's end, so "KD only" is also what the first phase costs
in a run that has everything configured. One step of each arm in turn, so that a drifting speed of the machine hits all
alike; CPU seconds on one thread, medians. What loaders, loggers and Lightning's loop cost is left out on both sides;
that makes the ratio larger, not smaller. Needs 3 GB and takes about seven minutes on one core.

    python benchmarks/losses.py [--rounds 15]
"""

import argparse
import itertools
import logging
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import yaml

from distill.commands.quiet import quieten
from distill.curriculum import WEIGHT_KEY
from distill.data.datamodule import DistillationDataModule
from distill.losses.attention import AttentionTransfer
from distill.losses.contrastive import Contrastive
from distill.losses.layerwise import Layerwise
from distill.losses.routing import Routing
from distill.training.callbacks.curriculum import Curriculum
from distill.training.module import DistillationModule
from distill.training.optim import configure
from distill.training.trainer import DistillTrainer

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
KD_ONLY, ROUTED, EVERYTHING = "KD only", "KD + LM + four routing losses", "phase 3, everything on"
# Arm -> components of weight above zero.
ARMS = {
    KD_ONLY: ["kd_loss"],
    ROUTED: [name for name in WEIGHT_KEY if name in ("kd_loss", "lm_loss") or name.startswith("routing_")],
    "KD + attention (relations)": ["kd_loss", "attention_loss"],
    "KD + layerwise (4 pairs)": ["kd_loss", "layerwise_loss"],
    "KD + contrastive": ["kd_loss", "contrastive_loss"],
    "KD + attention + layerwise + contrastive": ["kd_loss", "attention_loss", "layerwise_loss", "contrastive_loss"],
    EVERYTHING: list(WEIGHT_KEY),
}
WARM = 2
TARGETS = {ROUTED: ("routing_step_over_kd_only_step", 1.25), EVERYTHING: ("phase_3_step_over_kd_only_step", 1.5)}


def build(config: dict[str, Any]) -> DistillationModule:
    """The quickstart's module with all nine components."""
    torch.manual_seed(0)
    options = config["model"] | {"routing": Routing(**config["model"]["routing"]), "student_fit": None}
    others = {"attention": AttentionTransfer(), "layerwise": Layerwise(), "contrastive": Contrastive()}
    module = DistillationModule(**options | others)
    module.trainer = DistillTrainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module.configure_model()
    module.curriculum = Curriculum().state_at(1, 1)
    assert module.components == list(WEIGHT_KEY)
    return module


def step(
    module: DistillationModule, optimizer: torch.optim.Optimizer, batch: dict[str, Any], active: list[str]
) -> float:
    """CPU seconds of losses, backward pass, clipping and update with some components."""
    start = time.process_time()
    result = module.losses(batch, share=1.0, components=active)
    result.total.backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    assert list(result.breakdown.scaled) == active
    return time.process_time() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each arm")
    rounds = parser.parse_args().rounds
    quieten()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    config = yaml.safe_load(QUICKSTART.read_text())
    data = DistillationDataModule(**config["data"], tokenizer=config["model"]["teacher"])
    data.prepare_data()
    data.setup()
    batches = itertools.cycle(list(data.val_dataloader()))
    module = build(config)
    optimizer, _ = configure(module.options, module.student, module.auxiliaries, horizon=100, fused=True)

    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    for round_ in range(WARM + rounds):
        batch = next(batches)
        for name, active in ARMS.items():
            measured = step(module, optimizer, batch, active)
            if round_ >= WARM:
                seconds[name].append(measured)

    base = seconds[KD_ONLY]
    ratio = {
        name: statistics.median(a / b for a, b in zip(times, base, strict=True)) for name, times in seconds.items()
    }
    print(f"{'CPU seconds per step':<42}{'median':>8}{'least':>8}{'most':>8}{'x KD only':>11}")
    for name, times in seconds.items():
        print(f"{name:<42}{statistics.median(times):>8.3f}{min(times):>8.3f}{max(times):>8.3f}{ratio[name]:>11.3f}")
    for arm, (name, target) in TARGETS.items():
        print(f"{name} {ratio[arm]:.3f} {target} {'ok' if ratio[arm] <= target else 'short'}")
    return 0 if all(ratio[arm] <= target for arm, (_, target) in TARGETS.items()) else 1


if __name__ == "__main__":
    sys.exit(main())
