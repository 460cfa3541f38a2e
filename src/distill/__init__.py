"""Student-aware knowledge distillation of causal language models in one LightningCLI program.

The names below are the library. Each is imported when it is first asked for, since the command answers `--help` without
torch; the price is that they are listed twice, for programs that read types and for Python.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill.callbacks.audit import LossAudit as LossAudit
    from distill.callbacks.curriculum import Curriculum as Curriculum
    from distill.callbacks.evaluation import Evaluation as Evaluation
    from distill.callbacks.gradients import Gradients as Gradients
    from distill.callbacks.last_checkpoint import LastCheckpoint as LastCheckpoint
    from distill.callbacks.resume import ExactResume as ExactResume
    from distill.callbacks.step_dumps import (
        CurriculumDump as CurriculumDump,
    )
    from distill.callbacks.step_dumps import (
        KDLossDump as KDLossDump,
    )
    from distill.callbacks.step_dumps import (
        RoutingLossesDump as RoutingLossesDump,
    )
    from distill.callbacks.train_debug import TrainDebug as TrainDebug
    from distill.data.datamodule import DistillationDataModule as DistillationDataModule
    from distill.errors import AuditError as AuditError
    from distill.errors import RunError as RunError
    from distill.errors import UserError as UserError
    from distill.lora import LoRA as LoRA
    from distill.losses.attention import AttentionTransfer as AttentionTransfer
    from distill.losses.contrastive import Contrastive as Contrastive
    from distill.losses.divergence import KDLoss as KDLoss
    from distill.losses.layerwise import Layerwise as Layerwise
    from distill.losses.routing import Routing as Routing
    from distill.module import DistillationModule as DistillationModule
    from distill.students import load_student as load_student
    from distill.trainer import DistillTrainer as DistillTrainer

__version__ = "0.1.0"

_HOME = {
    "LossAudit": "callbacks.audit",
    "Curriculum": "callbacks.curriculum",
    "Evaluation": "callbacks.evaluation",
    "Gradients": "callbacks.gradients",
    "LastCheckpoint": "callbacks.last_checkpoint",
    "ExactResume": "callbacks.resume",
    "CurriculumDump": "callbacks.step_dumps",
    "KDLossDump": "callbacks.step_dumps",
    "RoutingLossesDump": "callbacks.step_dumps",
    "TrainDebug": "callbacks.train_debug",
    "DistillationDataModule": "data.datamodule",
    "AuditError": "errors",
    "RunError": "errors",
    "UserError": "errors",
    "LoRA": "lora",
    "AttentionTransfer": "losses.attention",
    "Contrastive": "losses.contrastive",
    "KDLoss": "losses.divergence",
    "Layerwise": "losses.layerwise",
    "Routing": "losses.routing",
    "DistillationModule": "module",
    "load_student": "students",
    "DistillTrainer": "trainer",
}
__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'distill' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"distill.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
