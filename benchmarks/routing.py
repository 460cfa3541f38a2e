"""What the four routing losses on two layers add to the KD-only step of the quickstart.

The quickstart's own models and text, the program's own objective, one step of each arm in turn in one process, so that
a drifting speed of the machine hits all alike; CPU seconds on one thread, medians. Weights are those of the last step
of the default curriculum. What loaders, loggers and Lightning's loop cost is left out on both sides; that makes the
ratio larger, not smaller. Needs 4 GB and takes about three minutes.

    python benchmarks/routing.py [--rounds 15]
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

from distill.callbacks.curriculum import Curriculum
from distill.data.datamodule import DistillationDataModule
from distill.losses.routing import Routing
from distill.module import DistillationModule
from distill.optim import adamw
from distill.program import DistillTrainer, quieten

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
KD_ONLY, ROUTED, AWARE = "KD only", "KD, LM, four routing losses", "the same, tau 1"
WARM = 2
TARGET = 1.25


class Step:
    """One arm's optimizer step on a model of its own.

    Args:
        options: of `DistillationModule`.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        torch.manual_seed(0)
        self.module = DistillationModule(**options)
        self.module.trainer = DistillTrainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        self.module.configure_model()
        self.module.curriculum = Curriculum().state_at(1, 1)
        groups = [(self.module.student, self.module.learning_rate), (self.module.routing, self.module.learning_rate)]
        self.optimizer = adamw(groups, self.module.weight_decay, self.module.betas, fused=True)

    def __call__(self, batch: dict[str, Any]) -> float:
        """CPU seconds of losses, backward pass, clipping and update."""
        start = time.process_time()
        self.module.losses(batch, share=1.0).total.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.process_time() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each arm")
    rounds = parser.parse_args().rounds
    quieten()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    config = yaml.safe_load(QUICKSTART.read_text())
    options, routing = config["model"], config["model"].pop("routing")
    assert routing["teacher_layers"] == 2
    data = DistillationDataModule(**config["data"], tokenizer=options["teacher"])
    data.prepare_data()
    data.setup()
    batches = itertools.cycle(list(data.val_dataloader()))
    arms = {
        KD_ONLY: Step(options | {"lm_loss": False}),
        ROUTED: Step(options | {"routing": Routing(**routing)}),
        AWARE: Step(options | {"routing": Routing(**routing, tau=1.0)}),
    }
    assert len(arms[ROUTED].module.components) == 6
    assert all(weight > 0 for arm in arms.values() for weight in arm.module.component_weights().values())

    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for round_ in range(WARM + rounds):
        batch = next(batches)
        for name, arm in arms.items():
            measured = arm(batch)
            if round_ >= WARM:
                seconds[name].append(measured)

    base = seconds[KD_ONLY]
    ratio = {
        name: statistics.median(a / b for a, b in zip(times, base, strict=True)) for name, times in seconds.items()
    }
    print(f"{'CPU seconds per step':<30}{'median':>8}{'least':>8}{'most':>8}{'x KD only':>11}")
    for name, times in seconds.items():
        print(f"{name:<30}{statistics.median(times):>8.3f}{min(times):>8.3f}{max(times):>8.3f}{ratio[name]:>11.3f}")
    verdict = "ok" if ratio[ROUTED] <= TARGET else "short"
    print(f"routing_step_over_kd_only_step {ratio[ROUTED]:.3f} {TARGET} {verdict}")
    return 0 if verdict == "ok" else 1


if __name__ == "__main__":
    sys.exit(main())
