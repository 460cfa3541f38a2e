"""The model card of an exported student: what it was made of, how, what it reached, and under which licences.

Everything comes from the checkpoint and from files at hand; what is not known is called unknown instead of guessed.
"""

import importlib.metadata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.repocard import metadata_load

from distill.checkpoints.students import Student
from distill.curriculum import WEIGHT_KEY
from distill.version import __version__

UNKNOWN = "unknown"
SOURCES = ("model.student", "model.student_layers", "model.student_config")  # of the student's first weights
TITLES = {
    "val/kl_div_T1": "KL to the teacher at T = 1 (nats per token)",
    "val/student_nll": "negative log-likelihood (nats per token)",
    "val/student_perplexity": "perplexity",
    "val/teacher_perplexity": "perplexity of the teacher",
    "val/bits_per_byte": "bits per byte",
    "val/top1_agreement": "share of tokens where both prefer the same one",
    "val/acceptance": "share of its drafts that the teacher would accept at T = 1",
    "val/ece": "expected calibration error (15 bins)",
}


def model_card(name: str, student: Student) -> str:
    """README.md of an exported student, with the hub's metadata on top.

    Args:
        name: title.
        student: from a checkpoint.
    """
    settings: Mapping[str, Any] = student.checkpoint["settings"]
    run: Mapping[str, Any] = student.checkpoint["run"]
    teacher, start = settings["model.teacher"], settings["model.student"]
    named = [part["dataset"] for part in run["data"].get("sources", [])]
    sources = [str(source) for names in named for source in (names if isinstance(names, list) else [names])]
    parts = [("teacher", teacher, licence_of(teacher))]
    if start is not None:
        parts.append(("student's first weights", start, licence_of(start)))
    lineage = [*parts, *(("data", source, licence_of(source, repo_type="dataset")) for source in sources)]
    models = {licence for _, _, licence in parts}
    base = start or teacher
    metadata = ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["knowledge-distillation"],
        license=models.pop() if len(models) == 1 and UNKNOWN not in models else None,
        base_model=base if is_hub_id(base) else None,
        datasets=[source for source in sources if is_hub_id(source)] or None,
    )
    parameters = sum(parameter.numel() for parameter in student.model.parameters())
    metrics = [(title, f"{run['metrics'][key]:.4f}") for key, title in TITLES.items() if key in run["metrics"]]
    step = student.checkpoint["global_step"]
    losses = [(loss, run["curriculum"].get(WEIGHT_KEY[loss], UNKNOWN)) for loss in run["components"]]
    data = list(_data(run["data"]))
    sections = [
        f"---\n{metadata.to_yaml()}\n---\n\n# {name}",
        f"A {type(student.model).__name__} of {parameters:,} parameters, distilled from `{teacher}` with "
        f"student-aware-distillation {__version__}, after {step:,} optimizer steps. It needs transformers "
        "alone:",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n```',
        "## Data",
        table(("key", "value"), data) if data else UNKNOWN,
        "## Recipe",
        f"The student started from {_beginning(settings, run)}.",
        table(("loss", "weight"), losses),
        "A weight is a number, or a list of [progress, value] knots with straight lines between them.",
        table(("key", "value"), _training(settings, run)),
        "## Metrics",
        "On the run's validation rows, at the last validation before the checkpoint:",
        table(("metric", "value"), metrics) if metrics else f"{UNKNOWN}: the checkpoint was written before any.",
        "## Licences",
        "As far as they are known here; the student inherits obligations from each.",
        table(("part", "source", "licence"), lineage),
    ]
    return "\n\n".join(sections) + "\n"


def _data(data: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """The parts of the data and what was done to them; null is left out."""
    for part in data.get("sources", []):
        yield "source", _listed(part)
    chat = data.get("chat", {})
    shown = {key: value for key, value in data.items() if key not in ("dataset", "sources", "chat")}
    shown["completion_only_loss"] = chat.get("completion_only_loss")
    shown["chat_template"] = "one of the run's own, exported with the tokenizer" if chat.get("template") else None
    yield from ((key, value) for key, value in shown.items() if value is not None)


def _listed(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items() if value is not None)


def _beginning(settings: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    weights, layers, config = (settings[key] for key in SOURCES)
    width, hidden = (settings.get(f"model.student_{key}_size") for key in ("intermediate", "hidden"))
    if layers is None and width is None and hidden is None:
        return f"`{weights}`" if config is None else f"random weights (`{config}`)"
    if layers is None:
        parts = "all of the teacher's layers"
    else:
        parts = f"layers {layers} of the teacher" if isinstance(layers, list) else f"{layers} of the teacher's layers"
    if width is not None:
        parts += f", their FFNs made of {width} of its neurons"
    if hidden is not None:
        parts += f", in {hidden} principal axes of its states"
    if (made := run.get("student_fit")) is None:
        return parts
    errors = [layer["after"] for layer in made["layers"]]
    return (
        f"{parts}, fitted layer by layer on {made['tokens']:,} tokens; the layers left {min(errors):.3f} to "
        f"{max(errors):.3f} of their targets unexplained"
    )


def _training(settings: Mapping[str, Any], run: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Everything else that the result depends on; null is left out."""
    shown = {key: run["curriculum"].get(key) for key in ("temperature", "top_k_experts")}
    for key, value in settings.items():
        if key.startswith("model.") and key not in ("model.teacher", "model.lm_loss", *SOURCES):
            shown[key.removeprefix("model.")] = value
    for key, value in (shown | run["trainer"]).items():
        if value is not None:
            yield key, _listed(value) if isinstance(value, dict) else value


def table(headings: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    """A Markdown table."""
    lines = [headings, ("---",) * len(headings), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines)


def is_hub_id(source: Any) -> bool:
    """Whether a source can only be a name on the hub."""
    return isinstance(source, str) and "://" not in source and source.count("/") <= 1 and not Path(source).exists()


def licence_of(source: str, repo_type: str = "model") -> str:
    """Licence of a model or data source, by its own card or its package's metadata, or `unknown`.

    Args:
        source: as in the configuration.
        repo_type: model or dataset, for names on the hub.
    """
    if source.startswith("package://"):
        return _package_licence(source.removeprefix("package://").partition("/")[0])
    card = Path(source, "README.md")
    if is_hub_id(source):
        try:
            card = Path(huggingface_hub.hf_hub_download(source, "README.md", repo_type=repo_type, etag_timeout=5))
        except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError):
            return UNKNOWN
    if not card.is_file():
        return UNKNOWN
    licence = (metadata_load(card) or {}).get("license")
    return str(licence) if licence else UNKNOWN


def _package_licence(package: str) -> str:
    """What the distribution that installed a package says, in the hub's spelling."""
    for distribution in importlib.metadata.packages_distributions().get(package, []):
        metadata = importlib.metadata.metadata(distribution)
        for field in ("License-Expression", "License"):
            if field in metadata and "\n" not in metadata[field]:
                return metadata[field].lower()
    return UNKNOWN
