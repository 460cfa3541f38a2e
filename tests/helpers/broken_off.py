"""A run of a module without a model, which notes what it trained on and can be broken off before any batch."""

from contextlib import suppress
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from distill.data.datamodule import DistillationDataModule


class Notes(L.LightningModule):
    """Notes ids and units of every batch that it trained on; its weight depends on their order."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.seen: list[tuple[list[list[int]], dict]] = []

    def training_step(self, batch, batch_idx):
        self.seen.append((batch.student.input_ids.tolist(), batch.units))
        return self.weight**2 * batch.student.input_ids.float().mean() / 1000

    def validation_step(self, batch, batch_idx):
        assert batch.units["micro_batches"] == 1

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.1)


class PowerCut(RuntimeError):
    """What breaks a run off."""


class Break(Callback):
    """Raises before a batch, counted over epochs."""

    def __init__(self, at: int):
        self.at = at

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if len(module.seen) == self.at:
            raise PowerCut


def noted_run(data: dict[str, Any], callbacks: tuple[Callback, ...], ckpt_path: Any, **options: Any) -> Notes:
    """Fits until the end or a power cut, resumed from `ckpt_path` if there is one."""
    module = Notes()
    trainer = L.Trainer(
        accelerator="cpu",
        accumulate_grad_batches=options.pop("accumulate_grad_batches", 2),
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
        callbacks=list(callbacks),
        **options,
    )
    with suppress(PowerCut):
        trainer.fit(module, DistillationDataModule(**data), ckpt_path=ckpt_path, weights_only=True)
    return module
