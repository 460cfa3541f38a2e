"""What a run is meant for, and its parts before they are built: devices, models without memory, shape of a micro-batch.

They are read from configurations alone, so that a run for other machines can be planned on this one; the module's rules
for dtypes are therefore known here too.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from transformers import PreTrainedModel

from distill.data.datamodule import DistillationDataModule
from distill.models import load
from distill.models.precision import student_dtype, teacher_dtype
from distill.models.skeleton import skeleton
from distill.preflight.live_bytes import Shape
from distill.training.options import ModelOptions
from distill.training.start import student_skeleton

GIB = 2**30


@dataclass
class Plan:
    """What a run is asked to be, wherever it will run.

    Args:
        devices: data-parallel ranks.
        sharded: whether the strategy is FSDP2.
        accelerated: whether the devices are something else than CPUs.
        weights: whether models are loaded.
        device_memory_gib: of each device; None = this one's.
        tflops: that a device reaches, in 10^12 operations per second; None = measured.
    """

    devices: int = 1
    sharded: bool = False
    accelerated: bool = False
    weights: bool = True
    device_memory_gib: float | None = None
    tflops: float | None = None

    @staticmethod
    def asked_by(trainer: Mapping[str, Any]) -> dict[str, Any]:
        """`devices`, `sharded` and `accelerated` from the keyword arguments of a trainer."""
        strategy, accelerator = trainer.get("strategy"), trainer.get("accelerator") or "auto"
        sharded = strategy == "fsdp2" or isinstance(strategy, ModelParallelStrategy)
        accelerated = accelerator != "cpu" and (accelerator != "auto" or torch.cuda.is_available())
        devices = trainer.get("devices") or "auto"
        if isinstance(devices, str) and "," in devices:
            devices = [index for index in devices.split(",") if index.strip()]
        if isinstance(devices, list):
            count = len(devices)
        elif devices in ("auto", -1, "-1"):
            count = torch.cuda.device_count() if accelerated else 1
        else:
            count = int(devices)
        return {
            "devices": max(1, count) * int(trainer.get("num_nodes") or 1),
            "sharded": sharded,
            "accelerated": accelerated,
        }


def head_size(model: PreTrainedModel) -> int:
    """Ids of a model's head."""
    return int(model.get_output_embeddings().weight.shape[0])


def skeletons(
    options: ModelOptions, precision: str, device: str, own_ids: int | None = None
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Teacher and student without memory, in the dtypes that a run gives them.

    Args:
        options: of the run.
        precision: of the trainer.
        device: cpu, cuda, ...
        own_ids: of the student's tokenizer, where it is another than the teacher's.
    """
    learns, frozen = student_dtype(precision), teacher_dtype(options.teacher_dtype, precision, device)
    config = load.load_config(options.teacher, trust_remote_code=options.trust_remote_code)
    teacher = skeleton(config, frozen, options.trust_remote_code)
    student = student_skeleton(options, config, own_ids or head_size(teacher), learns)
    if options.lora is not None:
        options.lora.add_to(student)
    return teacher, student


def shape_of(options: ModelOptions, data: DistillationDataModule, precision: str, on_cpu: bool) -> Shape:
    """What a device sees at a time."""
    return Shape(
        data.per_device_batch_size,
        data.sequence_length,
        autocast={"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision),
        on_cpu=on_cpu,
        chunk_size=options.chunk_size,
        packed=data.packing,
        checkpointing=options.gradient_checkpointing,
    )


def device_gib(device: torch.device) -> float:
    """Memory of a device; of a CPU that of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / GIB
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB


def matmul_tflops(device: torch.device, size: int = 1024) -> float:
    """10^12 operations per second of a fp32 matrix product."""
    square = torch.ones(size, size, device=device)
    square @ square
    start = time.perf_counter()
    (square @ square).sum().item()
    return 2 * size**3 / (time.perf_counter() - start) / 1e12
