"""How strongly each component pulls, and whether with or against KD, on the last student layer that all of them reach.

The loss engine keeps one combined gradient of KD and LM loss, so each component is run by itself, on the micro-batch
that is about to be trained on. A step on which it is due costs one to a few steps more (1.5 with KD and LM loss, 3.3
with all nine components, on the small MoE teacher of benchmarks/quality.py), and two more sets of the student's
gradients.

Reads: the batch, `pl_module.losses`. Logs: `gradients/<component>_norm`, `gradients/<component>_cosine`,
`gradients/layer`.
"""

from typing import Any, final

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

from distill.batch import Batch
from distill.errors import UserError
from distill.models.layers import decoder_layers
from distill.training.lightning_internals import loggers_step
from distill.training.module import DistillationModule, distilled

KD = "kd_loss"


@final
class Gradients(Callback):
    """Logs each component's gradient norm and its cosine with the gradient of `kd_loss`; changes no bit of a run.

    Norms are of the weighted component, as it enters the step, over the parameters of one decoder layer; they and the
    cosines are of the step's first micro-batch on rank zero. Without `kd_loss` there are no cosines.

    Args:
        every_n_steps: distance in optimizer steps, from step 0 on.

    Raises:
        UserError: no count; later, in `setup`, a strategy that shards the student.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        if every_n_steps < 1:
            raise UserError(f"gradients.every_n_steps: {every_n_steps}; give at least 1, or null on gradients itself")
        self.every_n_steps = every_n_steps

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if isinstance(trainer.strategy, ModelParallelStrategy | FSDPStrategy):
            raise UserError(
                f"gradients: {type(trainer.strategy).__name__} shards the student, whose layers' gradients exist "
                "nowhere in one piece; set gradients to null"
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        module = distilled(pl_module)
        opens_step = batch_idx % trainer.accumulate_grad_batches == 0
        if not opens_step or trainer.global_step % self.every_n_steps:
            return
        figures = gradient_figures(trainer, module, batch)
        step = loggers_step(trainer)
        for logger in trainer.loggers:  # past `log`, which drops what is not due on one of the loggers' own steps
            logger.log_metrics({f"gradients/{name}": float(value) for name, value in figures.items()}, step)


def gradient_figures(trainer: L.Trainer, module: DistillationModule, batch: Batch) -> dict[str, Tensor]:
    """Norm and cosine of every component of weight above zero on the last decoder layer that all of them reach.

    Random state and buffers are left as they were, and no `.grad` is touched.

    Args:
        trainer: gives accumulation, world size and precision.
        module: with the curriculum's state of this step.
        batch: of this step.

    Returns:
        `<component>_norm` of the weighted loss, `<component>_cosine` with `kd_loss`, and `layer`, 0-based; empty where
        no layer is reached by all of them.
    """
    assert module.student is not None
    layers = [[p for p in layer.parameters() if p.requires_grad] for layer in decoder_layers(module.student)]
    active = [name for name, weight in module.component_weights().items() if weight > 0]
    share = trainer.accumulate_grad_batches * trainer.world_size
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    kd: list[Tensor | None] = []
    norms: dict[str, list[Tensor | None]] = {}
    dots: dict[str, list[Tensor | None]] = {}
    for name in active:
        devices = [module.device.index or 0] if module.device.type == "cuda" else []
        with torch.random.fork_rng(devices), trainer.precision_plugin.train_step_context():
            total = module.losses(batch, share, components=[name]).total
        gradients = _by_layer(total, layers)
        if name == KD:
            kd = gradients
        norms[name] = [None if g is None else torch.linalg.vector_norm(g) for g in gradients]
        dots[name] = [None if g is None or h is None else g @ h for g, h in zip(gradients, kd, strict=False)]
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
    shared = [i for i in range(len(layers)) if all(norms[name][i] is not None for name in active)]
    if not active or not shared:
        return {}
    layer = shared[-1]
    at: dict[str, Any] = {name: values[layer] for name, values in norms.items()}
    figures: dict[str, Tensor] = {f"{name}_norm": norm for name, norm in at.items()}
    for name in active if kd else ():
        if name != KD:
            dot: Any = dots[name][layer]
            figures[f"{name}_cosine"] = dot / (at[name] * at[KD])
    return figures | {"layer": torch.tensor(float(layer))}


def _by_layer(total: Tensor, layers: list[list[nn.Parameter]]) -> list[Tensor | None]:
    """Gradient of a loss with respect to each layer as one vector, None for a layer that it does not reach."""
    flat = [parameter for layer in layers for parameter in layer]
    if not total.requires_grad:
        return [None] * len(layers)
    found = iter(torch.autograd.grad(total, flat, allow_unused=True))
    result: list[Tensor | None] = []
    for layer in layers:
        parts = [(parameter, next(found)) for parameter in layer]
        reached = any(gradient is not None for _, gradient in parts)
        whole = [p.new_zeros(p.numel()) if g is None else g.flatten() for p, g in parts]
        result.append(torch.cat(whole) if reached else None)
    return result
