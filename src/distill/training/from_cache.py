"""What a run needs of a teacher whose targets come from a cache, and what of its options contradicts the cache."""

import math
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_info
from transformers import GenerationConfig, PreTrainedModel

from distill.errors import UserError
from distill.models import load
from distill.models.digests import weights_digest
from distill.models.skeleton import KNOWN, skeleton
from distill.teachers.cache_files import Manifest, read_manifest, trouble
from distill.teachers.cached_states import NO_ATTENTION
from distill.training.options import ModelOptions


def check_options(options: ModelOptions, manifest: Manifest) -> None:
    """Refuses what the cache cannot serve, or was made otherwise.

    Raises:
        UserError: names the key.
    """
    for key in options.components if not manifest.states else ():
        raise UserError(
            f"model.{key}: looks at the teacher's layers, of which the cache {options.teacher} holds nothing; leave "
            "it out, give a live teacher, or build with --states true"
        )
    check_components(options)
    for key in ("top_k", "quantization"):
        wanted, made = getattr(options, f"teacher_{key}"), manifest.teacher[key]
        if wanted != made:
            raise UserError(
                f"model.teacher_{key}: {wanted}, but the cache {options.teacher} was made with {made}; set it to that, "
                "or build it anew"
            )
    if options.teacher_dtype not in ("auto", manifest.teacher["dtype"]):
        raise UserError(
            f"model.teacher_dtype: {options.teacher_dtype}, but the cache {options.teacher} was made in "
            f"{manifest.teacher['dtype']}; set it to that or auto, or build it anew"
        )


def check_components(options: ModelOptions) -> None:
    """Refuses losses on layers that no cache can serve, before a teacher without weights is asked for its layers.

    Raises:
        UserError: names the key.
    """
    if options.attention is not None:
        raise UserError(f"model.attention: {NO_ATTENTION}")
    if options.routing is not None and options.routing.tau < math.inf:
        raise UserError(
            f"model.routing.tau: {options.routing.tau} asks every expert of the teacher, of which no cache holds one; "
            "set it to inf, or give a live teacher"
        )


def absent_teacher(options: ModelOptions, manifest: Manifest) -> PreTrainedModel:
    """The cached teacher on the meta device, with its own defaults for writing."""
    config = load.load_config(options.teacher, trust_remote_code=options.trust_remote_code)
    model = skeleton(config, getattr(torch, manifest.teacher["dtype"]), options.trust_remote_code)
    setattr(model, KNOWN, manifest.teacher.get("embeddings"))
    folder = Path(options.teacher).expanduser()
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def teacher_to_cut(options: ModelOptions) -> PreTrainedModel:
    """The weights that the cache was made of, for a student that is cut from them; dropped once it is.

    Raises:
        UserError: they are not at hand, or others.
    """
    folder, manifest = Path(options.teacher).expanduser(), read_manifest(Path(options.teacher).expanduser())
    source, remedy = manifest.teacher["source"], "put it there, or give model.student instead of student_layers"
    rank_zero_info(f"The student is cut from {source}, which leaves the memory again.")
    try:
        model = _read(source, torch.float32, options)
    except UserError as error:
        raise trouble(folder, f"is of the teacher {source!r}, which a cut needs ({error})", remedy) from error
    dtype = getattr(torch, manifest.teacher["dtype"])
    known = model if dtype == torch.float32 else _read(source, dtype, options)
    if weights_digest(known) != manifest.teacher["weights"]:
        raise trouble(folder, f"is of another teacher than the one that {source!r} is now", remedy)
    return model


def _read(source: str, dtype: torch.dtype, options: ModelOptions) -> PreTrainedModel:
    return load.load_model(source, dtype=dtype, key="model.teacher", **options.load_options)
