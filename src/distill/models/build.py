"""Teacher and student of a run, loaded, checked and ready to be placed; everything that can refuse them does so here.

A student that is cut from its teacher, and a teacher that is quantised, are whole in memory first.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.errors import UserError
from distill.models import load
from distill.models.cut import most_important_layers
from distill.models.head import check_lm_head, lm_head_of
from distill.models.precision import teacher_dtype


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
    teacher = load.load_model(module.teacher_source, dtype=loaded, key="model.teacher", **options)
    if module.student_layers_by == "importance" and isinstance(count := sources["student_layers"], int):
        sources = sources | {"student_layers": most_important_layers(teacher, count, calibration_ids(data))}
    student = load.build_student(teacher, module.teacher_source, **sources, **options)
    check_lm_head(teacher, lm_head_of(teacher))
    check_lm_head(student, lm_head_of(student))
    if getattr(data, "packing", False):
        load.check_packing(teacher, "model.teacher")
        load.check_packing(student, "model.student")
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
