"""Student-aware knowledge distillation of causal language models in one LightningCLI program.

The names below are the library. Each is imported when it is first asked for, since the command answers `--help` without
torch; so they are listed twice, for programs that read types and for Python.
"""

import importlib
from typing import TYPE_CHECKING, Any

from distill.version import __version__ as __version__

if TYPE_CHECKING:
    from distill.checkpoints.students import load_student as load_student
    from distill.data.datamodule import DistillationDataModule as DistillationDataModule
    from distill.errors import AuditError as AuditError
    from distill.errors import RunError as RunError
    from distill.errors import UserError as UserError
    from distill.losses.attention import AttentionTransfer as AttentionTransfer
    from distill.losses.contrastive import Contrastive as Contrastive
    from distill.losses.engine.divergence import KDLoss as KDLoss
    from distill.losses.layerwise import Layerwise as Layerwise
    from distill.losses.routing import Routing as Routing
    from distill.models.lora import LoRA as LoRA
    from distill.models.start.shape import StudentFit as StudentFit
    from distill.training.callbacks.audit import LossAudit as LossAudit
    from distill.training.callbacks.curriculum import Curriculum as Curriculum
    from distill.training.callbacks.evaluation import Evaluation as Evaluation
    from distill.training.callbacks.gradients import Gradients as Gradients
    from distill.training.callbacks.last_checkpoint import LastCheckpoint as LastCheckpoint
    from distill.training.callbacks.resume import ExactResume as ExactResume
    from distill.training.callbacks.step_dumps import (
        CurriculumDump as CurriculumDump,
    )
    from distill.training.callbacks.step_dumps import (
        KDLossDump as KDLossDump,
    )
    from distill.training.callbacks.step_dumps import (
        RoutingLossesDump as RoutingLossesDump,
    )
    from distill.training.callbacks.train_debug import TrainDebug as TrainDebug
    from distill.training.module import DistillationModule as DistillationModule
    from distill.training.trainer import DistillTrainer as DistillTrainer
    from distill.vocabularies.options import VocabularyOptions as VocabularyOptions


_HOME = {
    "LossAudit": "training.callbacks.audit",
    "Curriculum": "training.callbacks.curriculum",
    "Evaluation": "training.callbacks.evaluation",
    "Gradients": "training.callbacks.gradients",
    "LastCheckpoint": "training.callbacks.last_checkpoint",
    "ExactResume": "training.callbacks.resume",
    "CurriculumDump": "training.callbacks.step_dumps",
    "KDLossDump": "training.callbacks.step_dumps",
    "RoutingLossesDump": "training.callbacks.step_dumps",
    "TrainDebug": "training.callbacks.train_debug",
    "DistillationDataModule": "data.datamodule",
    "AuditError": "errors",
    "RunError": "errors",
    "UserError": "errors",
    "LoRA": "models.lora",
    "StudentFit": "models.start.shape",
    "AttentionTransfer": "losses.attention",
    "Contrastive": "losses.contrastive",
    "KDLoss": "losses.engine.divergence",
    "Layerwise": "losses.layerwise",
    "Routing": "losses.routing",
    "DistillationModule": "training.module",
    "load_student": "checkpoints.students",
    "DistillTrainer": "training.trainer",
    "VocabularyOptions": "vocabularies.options",
}
__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'distill' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"distill.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
