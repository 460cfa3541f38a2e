"""The options of `model:`, checked before anything is loaded."""

from collections.abc import Mapping
from typing import Any

from distill.errors import UserError
from distill.losses.attention import AttentionTransfer
from distill.losses.contrastive import Contrastive
from distill.losses.engine.divergence import KDLoss
from distill.losses.layerwise import Layerwise
from distill.losses.routing import Routing
from distill.models.lora import LoRA


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
