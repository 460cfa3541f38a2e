"""What a metric was measured on, so that a resumed run compares with an earlier best only where it was the same.

Reads: the rows of validation sets, the callbacks that keep a best value.
"""

from typing import Any

import lightning as L
import torch
import xxhash
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from distill.training.lightning_internals import callbacks_of


def measured_on(trainer: L.Trainer) -> dict[str, str]:
    """Monitored metric -> digest of what it is measured on; without those of which nothing is known.

    A change of set, of its order where the name has no set, of `max_validation_sequences` or of `limit_val_batches`
    is another digest.
    """
    data: Any = getattr(trainer, "datamodule", None)
    sets: dict[str, Any] = getattr(data, "held_out", {})
    found = {}
    for one in monitoring(trainer):
        kind, *parts = str(one.monitor).split("/")
        rows = sets.get(parts[0] if len(parts) == 2 else next(iter(sets), "")) if kind == "val" else None
        if rows is not None:
            digest = xxhash.xxh3_64(rows.digests_R2().tobytes())
            digest.update(str(trainer.limit_val_batches).encode())
            found[str(one.monitor)] = digest.hexdigest()
    return found


def monitoring(trainer: L.Trainer) -> list[ModelCheckpoint | EarlyStopping]:
    """The callbacks that keep the best value of a metric."""
    kept: list[ModelCheckpoint | EarlyStopping] = [*callbacks_of(trainer, ModelCheckpoint)]
    return [one for one in kept + callbacks_of(trainer, EarlyStopping) if one.monitor is not None]


def key_of(one: ModelCheckpoint | EarlyStopping) -> str:
    """The section of a configuration that such a callback is of."""
    return "checkpoint" if isinstance(one, ModelCheckpoint) else "early_stopping"


def forget_others(trainer: L.Trainer, before: dict[str, str], now: dict[str, str]) -> set[Callback]:
    """Lets the best begin anew wherever a checkpoint's was measured on something else; those callbacks.

    Args:
        trainer: of a run that is resumed.
        before: what `measured_on` said in the checkpoint, where it said something.
        now: what it says of this run.
    """
    forgotten: set[Callback] = set()
    for one in monitoring(trainer):
        monitor = str(one.monitor)
        if before.get(monitor, now.get(monitor)) == now.get(monitor):
            continue
        worst = torch.tensor(float("-inf") if one.mode == "max" else float("inf"))
        if isinstance(one, ModelCheckpoint):
            one.best_model_path, one.best_model_score = "", None
            one.kth_best_model_path, one.kth_value, one.best_k_models = "", worst, {}
        else:
            one.best_score, one.wait_count = worst, 0
        forgotten.add(one)
        rank_zero_warn(f"{monitor} is measured on other rows than in the checkpoint, so the best of it begins anew.")
    return forgotten
