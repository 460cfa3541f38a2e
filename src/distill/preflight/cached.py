"""The part of `distill check` about a cached teacher: whether it says what the live one says, and what it costs."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from lightning.fabric.utilities import move_data_to_device
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from distill.batch import Batch, Tokens
from distill.curriculum import CurriculumState
from distill.data.datamodule import DistillationDataModule
from distill.data.rows.table import MicroBatch, PackedRows
from distill.errors import UserError
from distill.models import load
from distill.models.digests import weights_digest
from distill.models.head import lm_head_of
from distill.models.trace import Needs, Trace
from distill.preflight.live_bytes import Shape
from distill.preflight.memory import Parts, engine_bytes, size_of, trace
from distill.preflight.tables import show, titled
from distill.teachers.cache_files import is_cache, read_manifest, summary
from distill.teachers.cached import CachedTeacher
from distill.teachers.cached_states import MIXTURE
from distill.teachers.encodings import Encoding, Hidden, Sampled, TopK, described, id_bits
from distill.teachers.find_experts import find_views
from distill.teachers.mapped import MappedTeacher
from distill.teachers.online import OnlineTeacher, quantize
from distill.teachers.targets import DenseTargets, SampledTargets, Targets, TopKTargets, teacher_logprobs
from distill.training.module import DistillationModule
from distill.training.options import ModelOptions

COMPARED_ROWS = 64
SMALLEST = -20.0  # nats; differences below are of probabilities that no loss feels
STATES_TOLERANCE = 0.02  # of their size; bf16 rounds by 0.002
TOLERANCE = 0.05  # nats; rounding of bf16 states and 8-bit distances stays below
ASSUMED_K, ASSUMED_DRAWS = 64, 50


def cache_findings(console: Console, module: DistillationModule, data: DistillationDataModule) -> list[str]:
    """Shows what a cached teacher's targets take and how they compare with the live teacher's; what is wrong there."""
    teacher, rows = module.teacher, data.train_rows
    teacher = teacher.source if isinstance(teacher, MappedTeacher) else teacher
    if not isinstance(teacher, CachedTeacher) or module.options.kd_loss is None or rows is None:
        return []
    show(console, cost_table(teacher, int(rows.units_R["tokens"].sum())))
    findings, line = compare(teacher, module.options, rows, data.per_device_batch_size, module.device)
    console.print(f"\n{line}", soft_wrap=True, markup=False)
    return findings


def cost_table(teacher: CachedTeacher, targets: int) -> Table:
    """Bytes of the cache's training rows, and what other encodings of them would take.

    Args:
        teacher: opened.
        targets: of the run's training rows.
    """
    head, made = teacher.head, teacher.training
    assert head is not None
    width, vocabulary = head.weight.shape[1], head.vocab_size
    here = summary(teacher.manifest)["training"]
    rows: dict[str, float] = {f"{made.name}, as it is": here["bytes_per_target"]}
    others: list[Encoding] = [Hidden(torch.float32), Hidden(torch.bfloat16), TopK(ASSUMED_K, 1.0, vocabulary)]
    for other in others:
        rows.setdefault(_name(other), other.record_bytes(width))
    drawn = Sampled(ASSUMED_DRAWS, 1.0, vocabulary)
    most = -(-ASSUMED_DRAWS * id_bits(vocabulary) // 8)  # no id twice
    rows[f"{_name(drawn)}, at most"] = drawn.record_bytes(width) + most
    rows["bf16 logits"] = 2.0 * vocabulary
    table = titled("Cache: what the training rows take", "encoding", "bytes a target", f"MB for {targets:,} targets")
    for name, each in rows.items():
        table.add_row(name, f"{each:,.1f}", f"{each * targets / 1e6:,.1f}")
    if here["positions"]:
        size = teacher.states.bytes
        table.add_row("states of layers, a position", f"{size:,}", f"{size * here['positions'] / 1e6:,.1f}, all rows")
    return table


def _name(encoding: Encoding) -> str:
    """An encoding in a few words."""
    options = described(encoding)
    return f"{encoding.name} {options.get('dtype') or options.get('k') or options.get('draws')}"


def compare(
    teacher: CachedTeacher, options: ModelOptions, rows: PackedRows, batch_size: int, device: torch.device
) -> tuple[list[str], str]:
    """Compares some training rows of the cache with the live teacher, where that is at hand.

    Returns:
        Findings, and a line that says the largest difference or why there is none.
    """
    made = teacher.manifest.teacher
    dtype = getattr(torch, made["dtype"])
    try:
        model = load.load_model(made["source"], dtype=dtype, key="model.teacher", **options.load_options)
    except UserError as error:
        return [], f"Cache: not compared, its teacher is not at hand ({error})"
    if weights_digest(model) != made["weights"]:
        return [f"model.teacher: {made['source']} is now another model than the one that {teacher.folder} is of"], (
            "Cache: not compared with another teacher."
        )
    layers = teacher.states.layers
    views = find_views(model, layers["routing"], None, None) if layers["routing"] else []
    needs = Needs(hidden=frozenset(layers["hidden"]), recorders=tuple(views))
    live = OnlineTeacher(model, made["top_k"])
    if made["quantization"] is not None:
        quantize(model)
    live.to(device)
    largest, apart, tokens, compared = 0.0, 0.0, 0, 0
    for batch in _some(rows, batch_size):
        moved: Batch = move_data_to_device(batch, device)
        seen = live.trace(moved.teacher, needs)
        whole = DenseTargets(moved.teacher.valid(seen.last_BLD), lm_head_of(model))
        largest = max(largest, difference(teacher.stored(moved), whole))
        stored = teacher(moved, needs, CurriculumState(0, 0.0, {}, 1.0, None), kd=False).trace
        apart = max(apart, states_apart(stored, seen, moved.teacher))
        tokens, compared = tokens + len(moved.teacher.positions), compared + len(moved.rows)
    what = {"hidden": "log-probability", "top_k": "log-probability", "sampled": "entropy"}[teacher.training.name]
    line = (
        f"Cache: {compared:,} training rows ({tokens:,} targets) beside {made['source']} here: largest difference of a "
        f"{what} {largest:.2g} nats"
    )
    line += f", of a layer's states {apart:.2g} of their size." if teacher.states.fields else "."
    name, wrong = f"model.teacher: {teacher.folder} differs from its teacher by", []
    if largest > TOLERANCE:
        wrong.append(f"{name} {largest:.2g} nats")
    if apart > STATES_TOLERANCE:
        wrong.append(f"{name} {apart:.2g} of the size of a layer's states")
    return wrong, line


def _some(rows: PackedRows, batch_size: int) -> Iterator[Batch]:
    """Batches of rows, evenly spaced."""
    count = min(COMPARED_ROWS, len(rows))
    chosen = torch.linspace(0, len(rows) - 1, count, dtype=torch.float64).long().tolist()
    for at in range(0, count, batch_size):
        yield rows.__getitems__(MicroBatch(chosen[at : at + batch_size], {}))


@torch.no_grad()
def states_apart(stored: Trace, live: Trace, tokens: Tokens) -> float:
    """Largest difference of a layer's states or mixtures over the tokens of a batch, as a share of their size."""
    pairs = [(stored.hidden[layer], live.hidden[layer]) for layer in stored.hidden]
    pairs += [(stored.records[layer][MIXTURE], live.records[layer][MIXTURE]) for layer in stored.records]
    real_T, apart = tokens.real_BL.flatten(), 0.0
    for ours, theirs in pairs:
        ours_ND, theirs_ND = (side.reshape(len(real_T), -1)[real_T].float() for side in (ours, theirs))
        apart = max(apart, float((ours_ND - theirs_ND).norm() / theirs_ND.norm()))
    return apart


@torch.no_grad()
def difference(stored: Targets, live: DenseTargets) -> float:
    """Largest difference in nats between what is stored of some tokens and what the live teacher says.

    Args:
        stored: log-probabilities at temperature 1 are compared where they are above -20; of draws the entropies.
        live: of the same tokens.
    """
    if isinstance(stored, SampledTargets):
        logprobs_NV = teacher_logprobs(live, stored.temperature, stored.vocab_size)
        entropy_N = -(logprobs_NV.exp() * logprobs_NV.clamp(min=-1e4)).sum(-1)
        return float((entropy_N - stored.entropy_N).abs().max())
    if isinstance(stored, TopKTargets):
        theirs_NV = teacher_logprobs(live, stored.temperature, stored.vocab_size)
        return _apart(stored.logprobs_NK, theirs_NV.gather(1, stored.ids_NK))
    assert isinstance(stored, DenseTargets)
    vocabulary = live.head.vocab_size
    return _apart(teacher_logprobs(stored, 1.0, vocabulary), teacher_logprobs(live, 1.0, vocabulary))


def _apart(ours: Tensor, theirs: Tensor) -> float:
    return float(torch.where(theirs > SMALLEST, (ours - theirs).abs(), 0.0).max())


def traced(
    options: ModelOptions, student: PreTrainedModel, teacher: PreTrainedModel, shape: Shape
) -> tuple[Parts, PreTrainedModel | None]:
    """What a step keeps alive, and the teacher where a device holds it: of a cached one there is but the head.

    Args:
        options: of the run.
        student, teacher: without memory.
        shape: of a micro-batch.
    """
    if not is_cache(options.teacher):
        return trace(student, teacher, shape), teacher
    encodings = read_manifest(Path(options.teacher).expanduser()).encodings
    parts = trace(student, None, shape)
    engine = engine_bytes(student, teacher if encodings["training"]["name"] == "hidden" else None, shape)
    return replace(parts, engine=engine + size_of([teacher.get_output_embeddings().weight])), None
