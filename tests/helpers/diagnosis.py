"""What tests of `distill diagnose` share: names of findings, judging of quoted text, and faults planted in a fit."""

from pathlib import Path

from torch.optim.lr_scheduler import LambdaLR

import distill.training.optim
from distill.commands.diagnose import diagnose
from distill.training.module import DistillationModule

EXAMPLE = (Path(__file__).parents[1] / "assets" / "quoted.log").read_text()
FEATURE = "routing_feature_matching_loss"


def names(diagnosis):
    return [finding.name for finding in diagnosis.findings]


def judge(text, tmp_path):
    path = tmp_path / "quoted.log"
    path.write_text(text)
    return diagnose(str(path))


def plant_losses(monkeypatch, bug):
    """Replaces the module's losses by `bug(module, result)` of the true ones."""
    true = DistillationModule.losses
    monkeypatch.setattr(DistillationModule, "losses", lambda self, *a, **k: bug(self, true(self, *a, **k)))


def plant_schedule(monkeypatch, times=1.0, factor=None):
    """Another unit for the schedule's steps, or a constant factor instead of it."""
    true = distill.training.optim.warmup_cosine

    def schedule(optimizer, warmup, horizon, floor):
        if factor is not None:
            return LambdaLR(optimizer, lambda step: factor)
        return true(optimizer, int(warmup * times), int(horizon * times), floor)

    monkeypatch.setattr(distill.training.optim, "warmup_cosine", schedule)
