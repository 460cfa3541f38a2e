"""A student on its own: what its checkpoint must say of it, and how export, evaluation and prediction load one.

A checkpoint carries the student's configuration and the source of its tokenizer as plain values, so that neither the
teacher nor the run's directory is needed later. A folder, a hub id, a GGUF file and `package://name/file` load just as
well.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from distill.checkpoints import contents
from distill.checkpoints.proof import prove
from distill.errors import UserError
from distill.models import load
from distill.models.lora import LoRA
from distill.models.quiet import quiet_transformers


@dataclass(frozen=True)
class Student:
    """A causal language model with its tokenizer.

    Args:
        model: in eval mode.
        tokenizer: with the chat template where there is one.
        checkpoint: the `distill` entry and `global_step` of the checkpoint that it came from, empty for other sources.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    checkpoint: dict[str, Any]


def is_checkpoint(source: str) -> bool:
    """Whether a source names a checkpoint of a run rather than a model.

    Raises:
        UserError: it is the directory of a run, or a sharded checkpoint.
    """
    path = Path(source)
    if path.is_dir() and (path / ".metadata").exists():
        raise UserError(
            f"student: {source!r} is a sharded checkpoint; make one file of it with "
            f"`python -m lightning.pytorch.utilities.consolidate_checkpoint {source}` and give that"
        )
    if path.is_dir() and (path / "checkpoints").is_dir() and not (path / "config.json").exists():
        found = sorted(item.name for item in (path / "checkpoints").iterdir())
        raise UserError(f"student: {source!r} is a run's directory; give one of its checkpoints: {', '.join(found)}")
    return path.suffix == ".ckpt"


def load_student(
    source: str | Path,
    *,
    tokenizer: str | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    key: str = "student",
) -> Student:
    """The student of a checkpoint, or any model.

    Args:
        source: a run's `.ckpt` file, or what `models.load.load_model` takes.
        tokenizer: source of the tokenizer; by default the checkpoint's, or the model's own.
        dtype: of the weights; by default as a checkpoint has them, and float32 for other sources.
        trust_remote_code: run code that comes with the model or tokenizer.
        allow_pickle: accept `pytorch_model.bin`.
        key: what error messages call the source.

    Raises:
        UserError: no such source; a checkpoint that is truncated, of another program, of a newer format, sharded,
            without what its student needs, or whose student returns as another model; a tokenizer that cannot be had.
    """
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    source = str(source)
    if not is_checkpoint(source):
        loaded = load.load_model(source, dtype=dtype or torch.float32, allow_pickle=allow_pickle, key=key, **options)
        return Student(loaded, load.load_tokenizer(tokenizer or source, key=key, **options), {})
    checkpoint = contents.read(source, key)
    described = checkpoint["distill"]
    its_tokenizer: Any = load.load_tokenizer(
        tokenizer or described["student"]["tokenizer"], key=f"{key}: tokenizer", **options
    )
    if template := described["run"]["data"].get("chat", {}).get("template"):
        its_tokenizer.chat_template = template  # what the run's data set in place of the tokenizer's own
    model = restore(described["student"], checkpoint["state_dict"], dtype, key)
    if (expected := described["student"].get("proof")) is not None:  # earlier versions wrote none
        prove(model, expected, key)
    if described["settings"].get("model.student_config") is not None:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # the config's defaults mean other tokens
            setattr(model.config, name, getattr(its_tokenizer, name))
    return Student(model, its_tokenizer, {"global_step": checkpoint["global_step"], **described})


def restore(
    described: Mapping[str, Any], state: Mapping[str, Tensor], dtype: torch.dtype | None = None, key: str = "student"
) -> PreTrainedModel:
    """A student in eval mode, from what its checkpoint says of it; projections stay behind.

    Args:
        described: the `student` entry of `record`.
        state: the checkpoint's state_dict, with the student under `student.`.
        dtype: of the weights; as they are when None.
        key: what error messages call the source.

    Raises:
        UserError: a model that this transformers does not know, or weights that do not fit it.
    """
    config = _config(described["config"], key)
    weights = {name.removeprefix("student."): value for name, value in state.items() if name.startswith("student.")}
    floating = next((value.dtype for value in weights.values() if value.is_floating_point()), torch.float32)
    with quiet_transformers(), torch.device("meta"):
        kind = type(AutoModelForCausalLM.from_config(config))

    def built(state: Mapping[str, Tensor], dtype: torch.dtype) -> PreTrainedModel:
        # Unlike load_state_dict this leaves tensors apart that a configuration ties and the run did not.
        with quiet_transformers():
            model, info = kind.from_pretrained(
                None, config=config, state_dict=dict(state), dtype=dtype, output_loading_info=True
            )
        if wrong := sorted(info["missing_keys"]) + sorted(info["unexpected_keys"]) + sorted(info["mismatched_keys"]):
            raise UserError(
                f"{key}: {len(wrong)} weights do not fit {kind.__name__}, {wrong[0]} first; give another file"
            )
        return model

    if described.get("lora") is not None:
        lora = LoRA(**described["lora"])
        weights = lora.merged(built(lora.plain(weights), floating), weights).state_dict()
    model = built(weights, dtype or floating)
    generation: Any = GenerationConfig.from_dict(dict(described["generation_config"]))
    generation.use_cache = None if generation.use_cache is False else generation.use_cache  # as below
    generation._original_object_hash = hash(generation)  # as it was found: only so transformers writes back odd values
    model.generation_config = generation
    model.config.use_cache = True  # training switched it off, and generation wants it
    return model.eval()


def _config(values: Mapping[str, Any], key: str) -> PreTrainedConfig:
    kind = values["model_type"]
    if "auto_map" in values or kind not in CONFIG_MAPPING:
        raise UserError(
            f"{key}: a student of type {kind!r} brings its own code or is unknown to this transformers; "
            "use the version that it was trained with, or a student of a known type"
        )
    return CONFIG_MAPPING[kind].from_dict(dict(values))
