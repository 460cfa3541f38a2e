"""Teacher and student of a run, loaded, checked and ready to be placed; everything that can refuse them does so here.

The price: a student that is cut or quantised needs its teacher whole in memory first.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill import models
from distill.cut import most_important_layers
from distill.errors import UserError
from distill.lora import LoRA
from distill.losses.attention import AttentionTransfer
from distill.losses.contrastive import Contrastive
from distill.losses.engine import KDLoss
from distill.losses.head import check_lm_head, lm_head_of
from distill.losses.layerwise import Layerwise
from distill.losses.routing import Routing
from distill.precision import teacher_dtype


def check_options(module: Any, lm_loss: bool) -> None:
    """Refuses a DistillationModule's options that cannot be meant, or not together, before anything is loaded.

    Args:
        module: with its options as attributes.
        lm_loss: whether next-token cross-entropy is a component.

    Raises:
        UserError: names the key, the value and the remedy.
    """
    chosen = [key for key, value in module.student_sources.items() if value is not None]
    if len(chosen) != 1:
        raise UserError(
            f"model.student: {len(chosen)} of student, student_layers and student_config are given "
            f"({', '.join(chosen) or 'none'}): give exactly one"
        )
    for key, kind in (
        ("lora", LoRA),
        ("kd_loss", KDLoss),
        ("routing", Routing),
        ("attention", AttentionTransfer),
        ("layerwise", Layerwise),
        ("contrastive", Contrastive),
    ):
        options = getattr(module, key)
        if options is not None and not isinstance(options, kind):
            keys = ", ".join(f"{k}={v!r}" for k, v in options.items()) if isinstance(options, Mapping) else "..."
            what = f"{options!r} is a {type(options).__name__}"
            raise UserError(f"model.{key}: {what}; give distill.{kind.__name__}({keys})")
    others = (module.routing, module.attention, module.layerwise, module.contrastive)
    if module.kd_loss is None and not lm_loss and all(loss is None for loss in others):
        raise UserError("model.kd_loss: null with lm_loss false and no other loss leaves nothing to train: give a loss")
    if module.torch_compile and any(loss is not None for loss in others):
        raise UserError(
            "model.torch_compile: true with losses on layers (routing, attention, layerwise, contrastive), which "
            "watch them from outside: set it to false or leave those losses out"
        )
    for key in ("learning_rate", "router_learning_rate"):
        if not (rate := getattr(module, key)) > 0:
            raise UserError(f"model.{key}: {rate} must be above 0")
    for key in ("warmup_steps", "weight_decay"):
        if (least := getattr(module, key)) < 0:
            raise UserError(f"model.{key}: {least} must be at least 0")
    if isinstance(module.teacher_top_k, int) and module.teacher_top_k < 1:
        raise UserError(f"model.teacher_top_k: {module.teacher_top_k} must be at least 1, native or all")
    if not all(0 <= beta < 1 for beta in module.betas):
        raise UserError(f"model.betas: {list(module.betas)} must lie in [0, 1)")
    if not 0 <= module.min_learning_rate_ratio <= 1:
        raise UserError(f"model.min_learning_rate_ratio: {module.min_learning_rate_ratio} must lie in [0, 1]")
    if module.chunk_size is not None and module.chunk_size < 1:
        raise UserError(f"model.chunk_size: {module.chunk_size} must be at least 1 (null = by a byte budget)")


def build_models(module: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Teacher, in the dtype that `teacher_dtype` means, and student in fp32 and train mode, of a DistillationModule.

    Raises:
        UserError: a model that cannot be had, read, packed or cut as the module's options say.
    """
    data = getattr(module.trainer, "datamodule", None)
    device = module.trainer.strategy.root_device.type
    target = teacher_dtype(module.teacher_dtype, module.trainer.precision, device)
    sources, options = module.student_sources, module.load_options
    loaded = torch.float32 if sources["student_layers"] is not None else target
    teacher = models.load_model(module.teacher_source, dtype=loaded, key="model.teacher", **options)
    if module.student_layers_by == "importance" and isinstance(count := sources["student_layers"], int):
        sources = sources | {"student_layers": most_important_layers(teacher, count, calibration_ids(data))}
    student = models.build_student(teacher, module.teacher_source, **sources, **options)
    check_lm_head(teacher, lm_head_of(teacher))
    check_lm_head(student, lm_head_of(student))
    if getattr(data, "packing", False):
        models.check_packing(teacher, "model.teacher")
        models.check_packing(student, "model.student")
    if module.lora is not None:
        module.lora.add_to(student)
    if module.gradient_checkpointing:
        student.activation_checkpointing_enable()
    return nn.Module.to(teacher, target), student.train()


def calibration_ids(data: Any) -> Tensor:
    """Token ids [B, L] of a datamodule's first training rows.

    Raises:
        UserError: it reads a stream.
    """
    rows = getattr(data, "train_rows", None)
    if rows is None:
        raise UserError("model.student_layers_by: importance is measured on rows of a table; for streams set even")
    first = [torch.as_tensor(rows[index]["input_ids"]) for index in range(min(8, len(rows)))]
    return nn.utils.rnn.pad_sequence(first, batch_first=True)
