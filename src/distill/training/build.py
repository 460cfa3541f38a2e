"""Teacher and student of a run, loaded, checked and ready to be placed; everything that can refuse them does so here.

A student that is cut from its teacher needs the teacher whole in memory first.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.curriculum import WEIGHT_KEYS, Schedules
from distill.data.datamodule import DistillationDataModule
from distill.errors import UserError
from distill.losses.component import Component
from distill.models import load
from distill.models.attention import settle_attention
from distill.models.experts import cast_experts
from distill.models.first_rank import deal_out, made_by_first_rank
from distill.models.fsdp2 import check_strategy, policy_of, shard
from distill.models.head import check_lm_head, lm_head_of
from distill.models.precision import cast, check_experts, student_dtype, teacher_dtype
from distill.models.trace import Needs
from distill.teachers.cache_files import is_cache, read_manifest
from distill.teachers.cached import CachedTeacher
from distill.teachers.mapped import MappedTeacher
from distill.teachers.online import OnlineTeacher, quantize
from distill.teachers.source import ReadData, Run, TargetSource
from distill.training.from_cache import absent_teacher, check_options, teacher_to_cut
from distill.training.lightning_internals import callbacks_of
from distill.training.options import ModelOptions
from distill.training.start import first_rank_makes, start_student
from distill.vocabularies.pair import VocabularyPair

Checked = tuple[PreTrainedModel, TargetSource, dict[str, Any] | None, list[Component]]


def build(options: ModelOptions, trainer: L.Trainer) -> tuple[PreTrainedModel, TargetSource, dict[str, Any] | None]:
    """Student and opened teacher of a run, with the components built, sharded and compiled where that is asked for.

    The third is how the student was made, None where it was not.

    Raises:
        UserError: what `build_models`, a component's `build` or the teacher's `open` refuses.
    """
    strategy = trainer.strategy
    if options.optimizer == "muon" and isinstance(strategy, ModelParallelStrategy):
        raise UserError("model.optimizer: muon needs whole matrices, which fsdp2 shards: set it to adamw, or use ddp")
    check_strategy(strategy)
    torch.set_float32_matmul_precision(options.matmul_precision)
    if isinstance(strategy, ModelParallelStrategy):
        student, source, made = _sharded(options, trainer, strategy)
    else:
        student, source, made, _ = _checked(options, trainer)
    if options.torch_compile:
        student.get_decoder().compile()
        if not is_cache(options.teacher):
            source.model.get_decoder().compile()
    return student, source, made


def _checked(options: ModelOptions, trainer: L.Trainer) -> Checked:
    """Student, opened teacher, how the student was made, and the components, built; all of it whole on this rank."""
    teacher, student, made = build_models(options, trainer)
    components = list(options.components.values())
    rows = getattr(data_of(trainer), "per_device_batch_size", None)
    for component in components:
        component.build(teacher, student, rows)
    cached = is_cache(options.teacher)
    source: TargetSource = (
        CachedTeacher(options.teacher, teacher) if cached else OnlineTeacher(teacher, options.teacher_top_k)
    )
    if (vocabularies := vocabularies_of(trainer)) is not None:
        assert options.vocabulary is not None
        source = MappedTeacher(source, vocabularies, looks_ahead(options, trainer), options.vocabulary.method)
    curriculum = curriculum_of(trainer)
    source.open(
        Run(
            options.kd_loss,
            teacher_needs(options.components),
            lm_head_of(student).vocab_size,
            curriculum.temperature,
            curriculum.top_k_experts,
            read_data(trainer),
        )
    )
    if options.teacher_quantization is not None and not cached:
        quantize(teacher)
    if isinstance(trainer.strategy, ModelParallelStrategy):  # else Lightning does, but not with shards
        cast(student, student_dtype(str(trainer.precision)))
    return student, source, made, components


def _sharded(
    options: ModelOptions, trainer: L.Trainer, strategy: ModelParallelStrategy
) -> tuple[PreTrainedModel, TargetSource, dict[str, Any] | None]:
    """The same with each rank's share of the weights; the first rank alone has read them, where that can be."""
    mesh, components = strategy.device_mesh["data_parallel"], list(options.components.values())
    cached = is_cache(options.teacher)
    shared = first_rank_makes(options, strategy) and not cached
    weights: list[Tensor] = []
    if shared:
        checked, weights = made_by_first_rank(lambda: _checked(options, trainer), _models)
        for mine, first in zip(components, checked[3], strict=True):
            vars(mine).update(vars(first))
    else:
        checked = _checked(options, trainer)
    student, teacher = _models(checked)
    modules = [component for component in components if isinstance(component, nn.Module)]
    shard(mesh, None if cached else teacher, student, modules, policy_of(str(trainer.precision)))
    if shared:
        deal_out([student, teacher], weights, mesh, strategy.root_device)
    return checked[:3]


def _models(checked: Checked) -> list[PreTrainedModel]:
    return [checked[0], checked[1].model]


def build_models(
    options: ModelOptions, trainer: L.Trainer
) -> tuple[PreTrainedModel, PreTrainedModel, dict[str, Any] | None]:
    """Teacher, in the dtype that `teacher_dtype` means, student, in fp32 and train mode, and how that was made.

    A teacher whose targets are cached is on the meta device, in the dtype that the cache was made in.

    Raises:
        UserError: a model that cannot be had, read, packed or cut as the options say.
    """
    if is_cache(options.teacher):
        manifest = read_manifest(Path(options.teacher).expanduser())
        check_options(options, manifest)
        absent = absent_teacher(options, manifest)
        student, made = new_student(options, trainer, teacher_to_cut(options) if options.is_cut else absent)
        return absent, prepared_student(options, trainer, student), made
    target = teacher_dtype(options.teacher_dtype, str(trainer.precision), trainer.strategy.root_device.type)
    on_cpu = trainer.strategy.root_device.type == "cpu"
    loaded: torch.dtype | None = target
    if options.student_layers is not None:  # which is cut from the weights as they are, rather than in `target`
        computes = options.student_layers_by == "importance" or (options.student_fit is not None and on_cpu)
        loaded = torch.float32 if computes else None
    teacher = load.load_model(options.teacher, dtype=loaded, key="model.teacher", **options.load_options)
    student, made = new_student(options, trainer, teacher)
    return prepared_teacher(options, trainer, teacher, target), prepared_student(options, trainer, student), made


def new_student(
    options: ModelOptions, trainer: L.Trainer, teacher: PreTrainedModel
) -> tuple[PreTrainedModel, dict[str, Any] | None]:
    """The student as its source has it, and how it was made, None where it was not.

    Args:
        options: of the run.
        trainer: of the run.
        teacher: whole where the student is cut from it; else its shapes are enough.
    """
    if options.is_cut:
        return start_student(teacher, options, trainer, data_of(trainer))
    named: dict[str, Any] = {"student": options.student, "student_config": options.student_config}
    data = data_of(trainer)
    if vocabularies_of(trainer) is not None:
        assert isinstance(data, DistillationDataModule)
        named["own_tokenizer"] = data.tokenizer
    return load.build_student(teacher, options.teacher, **(named | options.load_options)), None


def prepared_teacher(
    options: ModelOptions, trainer: L.Trainer, teacher: PreTrainedModel, dtype: torch.dtype
) -> PreTrainedModel:
    """The same in a dtype, once it is sure that its head, experts and packed rows are read rightly.

    Raises:
        UserError: says which would not be.
    """
    check_experts(teacher, dtype)
    cast(teacher, dtype)
    check_lm_head(teacher, lm_head_of(teacher))
    settle_attention(teacher, options.attn_implementation, trainer.strategy.root_device.type, "model.teacher")
    if getattr(data_of(trainer), "packing", False):
        load.check_packing(teacher, "model.teacher")
    return teacher


def prepared_student(options: ModelOptions, trainer: L.Trainer, student: PreTrainedModel) -> PreTrainedModel:
    """The same in fp32 and train mode, with adapters where they are asked for.

    Raises:
        UserError: its head, experts or packed rows would be misread.
    """
    check_experts(student, student_dtype(str(trainer.precision)))
    cast(student, torch.float32)
    check_lm_head(student, lm_head_of(student))
    device = trainer.strategy.root_device.type
    settle_attention(student, options.attn_implementation, device, "model.student")
    if device != "cpu":
        cast_experts(student)
    if getattr(data_of(trainer), "packing", False):
        load.check_packing(student, "model.student")
    if options.lora is not None:
        options.lora.add_to(student)
    if options.gradient_checkpointing:
        student.activation_checkpointing_enable()
    return student.train()


def vocabularies_of(trainer: L.Trainer) -> VocabularyPair | None:
    """Teacher's and student's tokenizer as bytes; None where one serves both."""
    data = data_of(trainer)
    tokenizers = data.tokenizers if isinstance(data, DistillationDataModule) else None
    return None if tokenizers is None else tokenizers.vocabularies


def looks_ahead(options: ModelOptions, trainer: L.Trainer) -> bool:
    """Whether targets across tokenizers follow the teacher along the text; says so where that was left open."""
    assert options.vocabulary is not None
    if options.vocabulary.look_ahead is not None or options.vocabulary.method != "first_token":
        return bool(options.vocabulary.look_ahead)
    weight = curriculum_of(trainer).lm
    values = [knot[1] for knot in weight] if isinstance(weight, list) else [weight]
    learns = options.lm_loss and any(value > 0 for value in values)
    if not learns:
        rank_zero_info(
            "model.vocabulary.look_ahead: on, since lm_loss has no weight in this run: nothing else would teach the "
            "student its tokens that are longer than the teacher's."
        )
    return not learns


def teacher_needs(components: Mapping[str, Component]) -> dict[str, Needs]:
    """What built components look at, by the key of `model:` that chooses the teacher's layers."""
    found = {}
    for key, component in components.items():
        own = next((name for name in ("teacher_layers", "teacher_layer") if hasattr(component, name)), None)
        found[f"model.{key}.{own}" if own else f"model.{key}"] = component.teacher_needs
    return found


def curriculum_of(trainer: L.Trainer) -> Schedules:
    """What changes over the whole run: weights of 1 at temperature 1 without a curriculum."""
    from distill.training.callbacks.curriculum import Curriculum  # which knows the module, which knows this

    found = callbacks_of(trainer, Curriculum)
    return found[0].schedules if found else Schedules(**dict.fromkeys(WEIGHT_KEYS, 1.0), temperature=1.0)


def read_data(trainer: L.Trainer) -> ReadData | None:
    """What the trainer's datamodule reads, None of another's."""
    data = data_of(trainer)
    return data.read_data() if isinstance(data, DistillationDataModule) and data.tokenizer is not None else None


def data_of(trainer: L.Trainer) -> L.LightningDataModule | None:
    """The datamodule that a trainer was given, if it was."""
    data: L.LightningDataModule | None = getattr(trainer, "datamodule", None)
    return data


def max_context(options: ModelOptions) -> int | None:
    """The shorter of the two models' contexts, in tokens, from their configurations; None = unlimited."""
    sources = [options.teacher, options.student or options.student_config]
    remote = options.trust_remote_code
    configs = [load.load_config(source, trust_remote_code=remote) for source in sources if source is not None]
    return min((length for config in configs if (length := load.max_context(config)) is not None), default=None)
