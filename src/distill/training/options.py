"""The options of `model:`, checked before anything is loaded."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from typing import Any, Literal, get_args, get_type_hints

from distill.curriculum import WEIGHT_KEY
from distill.errors import UserError
from distill.losses.attention import AttentionTransfer
from distill.losses.component import Component
from distill.losses.contrastive import Contrastive
from distill.losses.engine.divergence import KDLoss
from distill.losses.layerwise import Layerwise
from distill.losses.routing import Routing
from distill.models.lora import LoRA
from distill.models.start.shape import StudentFit
from distill.vocabularies.options import VocabularyOptions

WIDTHS = ("student_intermediate_size", "student_hidden_size")


@dataclass(frozen=True, eq=False)
class ModelOptions:
    """What a run distils, into what, with which losses and how: each field is a key of `model:`.

    Args:
        teacher: hub id, folder, GGUF file or `package://name/file` of a causal language model; or the folder of a
            cache of its targets, see `distill cache`.
        student: the same for the student's weights; or leave it out and give one of the next two.
        student_layers: cut the student from the teacher's layers: a number of them or a list of indices.
        student_layers_by: which a number of layers are: evenly spaced ones, or those that change their input most on
            the first training rows.
        student_config: start from random weights: a folder with a config.json, or the config's keys.
        student_intermediate_size: cut FFNs of this many of the teacher's neurons, chosen and fitted on training rows; a
            mixture of experts becomes dense FFNs out of all its experts. Without student_layers every layer is kept.
        student_hidden_size: cut a narrower residual stream, in the principal axes of the teacher's states; the head
            gets weights of its own. Without student_layers every layer is kept.
        student_tokenizer: source of the tokenizer that the student reads with; null = its own where it is a `student`,
            else the teacher's.
        vocabulary: how the teacher's tokens become targets where the two read with different tokenizers; null = that is
            refused.
        student_fit: how a student that is cut by layers or widths is fitted to the teacher, layer by layer, before the
            run; null = not at all, or, where neurons are chosen, in closed form alone.
        lora: low-rank adapters in the student, trained in place of its weights; null = off.
        kd_loss: options of `kd_loss`; null = off.
        lm_loss: whether next-token cross-entropy is a component.
        routing: the routing losses; null = off.
        attention: options of `attention_loss`; null = off, as for the next two.
        layerwise: options of `layerwise_loss`.
        contrastive: options of `contrastive_loss`.
        optimizer: adamw; or muon, on the decoder's matrices, with AdamW on embeddings, norms, heads and projections.
        learning_rate: peak, after warm-up.
        router_learning_rate: peak for projections and gate probes; null = `learning_rate`.
        weight_decay: of AdamW; norms and biases have none.
        betas: of AdamW.
        warmup_steps: optimizer steps of linear warm-up before the cosine.
        min_learning_rate_ratio: where the cosine ends, as a share of the peak.
        teacher_top_k: experts per token of a MoE teacher's forward pass, which makes the target of `kd_loss`: a number,
            native or all. Routing losses read the states of the same pass and choose by the native number all the same.
        teacher_dtype: auto = the trainer's precision where that is 32-true or 64-true, else bfloat16; float32 on a CPU
            without bf16 units.
        teacher_quantization: int8 = the weights of the teacher's linear layers in eight bits (torchao), but the head's;
            products stay in `teacher_dtype`. Experts fused into one tensor stay as they are.
        torch_compile: compile both decoders; with losses on vocabulary alone, since the others watch layers from
            outside.
        gradient_checkpointing: recompute the student's activations in the backward pass.
        matmul_precision: of float32 matrix products (`torch.set_float32_matmul_precision`). On CPUs with bf16 units
            "medium" runs them in bf16 with float32 results; on GPUs "high" is TF32.
        attn_implementation: of both models. varlen = packed rows without a dense mask; auto = that on CUDA where the
            family allows it, else what transformers chooses.
        chunk_size: tokens whose logits exist at one time; null = by a byte budget.
        trust_remote_code: run model code that comes with the weights.
        allow_pickle: load weights that are not safetensors.

    Raises:
        UserError: options that cannot be meant, or not together.
    """

    teacher: str
    student: str | None = None
    student_layers: int | list[int] | None = None
    student_layers_by: Literal["even", "importance"] = "even"
    student_config: str | dict[str, Any] | None = None
    student_intermediate_size: int | None = None
    student_hidden_size: int | None = None
    student_tokenizer: str | None = None
    vocabulary: VocabularyOptions | None = VocabularyOptions()  # noqa: RUF009  (frozen)
    student_fit: StudentFit | None = StudentFit()  # noqa: RUF009  (frozen)
    lora: LoRA | None = None
    kd_loss: KDLoss | None = KDLoss()  # noqa: RUF009  (frozen)
    lm_loss: bool = True
    routing: Routing | None = None
    attention: AttentionTransfer | None = None
    layerwise: Layerwise | None = None
    contrastive: Contrastive | None = None
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-4
    router_learning_rate: float | None = None
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_steps: int = 0
    min_learning_rate_ratio: float = 0.01
    teacher_top_k: int | Literal["native", "all"] = "native"
    teacher_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    teacher_quantization: Literal["int8"] | None = None
    torch_compile: bool = False
    gradient_checkpointing: bool = False
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    attn_implementation: Literal["auto", "varlen", "sdpa", "eager"] = "auto"
    chunk_size: int | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        self._check_kinds()
        chosen = [key for key, value in self.student_sources.items() if value is not None]
        widths = [key for key in WIDTHS if getattr(self, key) is not None]
        if widths and chosen in (["student"], ["student_config"]):
            raise UserError(
                f"model.{widths[0]}: {getattr(self, widths[0])} says how a student is cut from its teacher, but "
                f"{chosen[0]} is given; leave one of them out"
            )
        if len(chosen) != 1 and not (widths and not chosen):
            raise UserError(
                f"model.student: {len(chosen)} of student, student_layers and student_config are given "
                f"({', '.join(chosen) or 'none'}): give exactly one"
            )
        if self.is_cut and self.student_tokenizer is not None:
            raise UserError(
                f"model.student_tokenizer: {self.student_tokenizer!r}, but a student that is cut reads its teacher's "
                "tokens; leave it out, or give model.student or student_config"
            )
        if not self.losses:
            raise UserError(
                "model.kd_loss: null with lm_loss false and no other loss leaves nothing to train: give a loss"
            )
        if self.torch_compile and self.components:
            raise UserError(
                f"model.torch_compile: true with losses on layers ({', '.join(component_keys())}), which "
                "watch them from outside: set it to false or leave those losses out"
            )
        self._check_numbers()

    def _check_kinds(self) -> None:
        """Refuses plain values where an object of ours is meant, which only Python code can give."""
        for key, kind in _kinds().items():
            value = getattr(self, key)
            if value is None or isinstance(value, kind):
                continue
            keys = ", ".join(f"{k}={v!r}" for k, v in value.items()) if isinstance(value, Mapping) else "..."
            what = f"{value!r} is a {type(value).__name__}"
            raise UserError(f"model.{key}: {what}; give distill.{kind.__name__}({keys})")

    def _check_numbers(self) -> None:
        for key, rate in (("learning_rate", self.learning_rate), ("router_learning_rate", self.router_rate)):
            if not rate > 0:
                raise UserError(f"model.{key}: {rate} must be above 0")
        for key in WIDTHS:
            if (width := getattr(self, key)) is not None and width < 1:
                raise UserError(f"model.{key}: {width} must be at least 1")
        for key in ("warmup_steps", "weight_decay"):
            if (least := getattr(self, key)) < 0:
                raise UserError(f"model.{key}: {least} must be at least 0")
        if isinstance(self.teacher_top_k, int) and self.teacher_top_k < 1:
            raise UserError(f"model.teacher_top_k: {self.teacher_top_k} must be at least 1, native or all")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"model.betas: {list(self.betas)} must lie in [0, 1)")
        if not 0 <= self.min_learning_rate_ratio <= 1:
            raise UserError(f"model.min_learning_rate_ratio: {self.min_learning_rate_ratio} must lie in [0, 1]")
        if self.chunk_size is not None and self.chunk_size < 1:
            raise UserError(f"model.chunk_size: {self.chunk_size} must be at least 1 (null = by a byte budget)")

    @property
    def router_rate(self) -> float:
        """Peak learning rate of projections and gate probes."""
        return self.learning_rate if self.router_learning_rate is None else self.router_learning_rate

    @property
    def is_cut(self) -> bool:
        """Whether the student is cut from the teacher, by layers or widths."""
        return any(getattr(self, key) is not None for key in ("student_layers", *WIDTHS))

    @property
    def student_sources(self) -> dict[str, Any]:
        """The three ways to name a student, of which one is given."""
        return {key: getattr(self, key) for key in ("student", "student_layers", "student_config")}

    @property
    def load_options(self) -> dict[str, bool]:
        """What may come with weights."""
        return {"trust_remote_code": self.trust_remote_code, "allow_pickle": self.allow_pickle}

    @property
    def tokenizer_source(self) -> str | None:
        """Where the student's tokenizer comes from; None = it is the teacher's."""
        return self.student_tokenizer or self.student

    @cached_property
    def components(self) -> dict[str, Component]:
        """Key -> the losses on layers that are on, in listing order."""
        return {key: value for key in component_keys() if (value := getattr(self, key)) is not None}

    @cached_property
    def units(self) -> dict[str, str]:
        """Every loss that is on -> the kind of unit that it is a sum over, in listing order."""
        found = {"kd_loss": "targets"} if self.kd_loss is not None else {}
        found |= {"lm_loss": "tokens"} if self.lm_loss else {}
        for component in self.components.values():
            found |= component.units
        return {name: found[name] for name in WEIGHT_KEY if name in found}

    @property
    def losses(self) -> list[str]:
        """Names of the losses that are on, in listing order."""
        return list(self.units)

    def settings(self) -> dict[str, Any]:
        """What a checkpoint's tensors, targets and rates depend on, as plain values."""
        plain = ("student", "student_layers", "student_config", "teacher_top_k", "student_layers_by", "learning_rate")
        found: dict[str, Any] = {"teacher": self.teacher, "lm_loss": self.lm_loss}
        found |= {key: width for key in WIDTHS if (width := getattr(self, key)) is not None}
        found |= {key: getattr(self, key) for key in plain} | {"router_learning_rate": self.router_rate}
        if self.student_tokenizer is not None:
            found["student_tokenizer"] = self.student_tokenizer
        found |= {"optimizer": self.optimizer, "warmup_steps": self.warmup_steps, "weight_decay": self.weight_decay}
        found |= {key: None if (value := getattr(self, key)) is None else asdict(value) for key in ("kd_loss", "lora")}
        found |= {key: self.components[key].settings() if key in self.components else None for key in component_keys()}
        return {f"model.{key}": value for key, value in found.items()}


@cache
def _kinds() -> dict[str, type]:
    """Key -> class, of the options that are an object of ours or null."""
    ours = {}
    for key, hint in get_type_hints(ModelOptions).items():
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]
        if len(kinds) == 1 and isinstance(kinds[0], type) and kinds[0].__module__ != "builtins":
            ours[key] = kinds[0]
    return ours


def component_keys() -> list[str]:
    """The options that are losses on layers, in the order of the fields."""
    return [key for key, kind in _kinds().items() if hasattr(kind, "measure")]
