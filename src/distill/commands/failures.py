"""What stopped a run, as one line: errors of Lightning, torch and the system, by type and a few words of their text.

Another version of them may word it otherwise; its traceback is then shown as it is.
"""

import os
import re

from lightning.fabric.utilities.spike import TrainingSpikeException
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from distill.commands.parser import shorten, told
from distill.errors import RunError, UserError, did_you_mean
from distill.training.horizon import check_validation_interval

RESUME = "go on with --ckpt_path last"


def explained(error: Exception) -> UserError | RunError | None:
    """The sentence for what LightningCLI or the trainer raised; None where there is none."""
    text = " ".join(str(error).split())
    if (unmeasured := _of_monitor(text)) is not None:
        return unmeasured
    if isinstance(error, ValueError | MisconfigurationException):
        return _of_configuration(error)
    if isinstance(error, ImportError):
        return UserError(f"trainer: {text}")
    if isinstance(error, IndexError) and text == "index out of range in self":  # of torch's embeddings
        return UserError(
            "data.tokenizer: it made ids that are none of a model's: it has more tokens than the model has rows; take "
            "the tokens away that were added to it, or give the model rows for them"
        )
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
        if str(error.filename).startswith(os.path.expanduser("~/.cache")):
            return UserError(
                f"HOME: {error.filename} can't be read or written ({error.strerror}); set XDG_CACHE_HOME to a folder "
                "for caches"
            )
        where = error.filename or "a file of the run"
        why = error.strerror or text
        return RunError(f"{where} can't be read or written ({why}); put that right, and {RESUME} where it had begun")
    if not isinstance(error, RuntimeError) or isinstance(error, RunError):
        return None
    if "DataLoader worker" in text:
        return RunError(
            f"data.num_workers: {str(error).splitlines()[0]} Killed from outside, or out of memory: {RESUME}, with "
            "fewer workers if it happens again"
        )
    if "SaveConfig expected" in text:
        return UserError("trainer.logger: its directory holds a run already; leave the version out, or give another")
    if "by peer" in text:  # gloo's words
        return RunError(f"trainer.devices: another process of this run has died, see what it said last; {RESUME}")
    if isinstance(error, TrainingSpikeException):
        return RunError(f"trainer.callbacks: SpikeDetection has stopped the run ({text}); {RESUME}, or leave it out")
    if "out of memory" in text:
        return RunError(
            f"data.per_device_batch_size: out of memory ({text.split('. ')[0]}); lower it and raise "
            "trainer.accumulate_grad_batches, or set model.gradient_checkpointing; `distill check` estimates what a "
            "run needs"
        )
    if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
        return UserError(
            f"model.torch_compile: torch cannot compile here ({str(error).splitlines()[0]}); install a C++ compiler, "
            "or set it to false"
        )
    return None


def _of_monitor(text: str) -> UserError | None:
    """A metric to choose or stop by that was not there; Lightning notices at the end of the first validation."""
    missing = re.search(
        r"(?:stopping conditioned on metric `|ModelCheckpoint\(monitor=')([^`']+).*(?:following: |metrics: \[)(.*)",
        text,
    )
    if missing is None:
        return None
    key = "early_stopping" if text.startswith("Early") else "checkpoint"
    there = re.findall(r"[\w.-]+(?:/[\w.,-]+)+", missing[2])
    measured = [name for name in there if name.startswith(("val/", "tasks/")) and name != missing[1]]
    near = did_you_mean(missing[1], measured) if measured else "nothing is validated, see trainer.limit_val_batches"
    return UserError(f"{key}.monitor: {missing[1]} is not among what this run measures; {near}")


def _of_configuration(error: Exception) -> UserError | None:
    if (ours := told(error)) is not None:
        return ours
    if rare := re.search(r"`val_check_interval` \((\d+)\) must be less .* batches \((\d+)\)", str(error)):
        try:
            check_validation_interval(int(rare[1]), int(rare[2]))
        except UserError as ours:
            return ours
    if seed := re.match(r"(-?\d+) is not in bounds, numpy accepts from (\d+) to (\d+)", str(error)):
        return UserError(f"seed_everything: {seed[1]} is out of range; give {seed[2]} to {seed[3]}")
    if isinstance(error, MisconfigurationException) or re.search("val_check_interval|Does not vali", str(error)):
        return UserError(f"trainer: {shorten(str(error))}")
    return None
