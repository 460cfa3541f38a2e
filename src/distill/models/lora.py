"""Low-rank adapters in the student's linear layers, through peft; the rest of the student stays as it was.

The adapters are put into the model itself, which stays the class that it is, so nothing else here knows of them but the
checkpoint's reader, which merges them. A checkpoint holds the frozen weights too, and they are in fp32 like any
student's.
"""

import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, final

from torch import Tensor
from transformers import PreTrainedModel

from distill.errors import UserError
from distill.models.shared import shared_parameters


@final
@dataclass(frozen=True)
class LoRA:
    """Options of the adapters, W + lora_alpha / r * B A [LoRA, arXiv 2106.09685, section 4.1].

    Args:
        r: rank.
        lora_alpha: scale; the adapter's output is multiplied by lora_alpha / r.
        lora_dropout: probability, of the adapter's input.
        target_modules: names of the linear layers that get one; all-linear = all but the head.

    Raises:
        UserError: a rank, scale or probability that cannot be meant.
    """

    r: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserError(f"model.lora.r: {self.r} is not a rank; give 1 or more")
        if not self.lora_alpha > 0:
            raise UserError(f"model.lora.lora_alpha: {self.lora_alpha} must be above 0")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"model.lora.lora_dropout: {self.lora_dropout} must lie in [0, 1)")

    def add_to(self, student: PreTrainedModel) -> None:
        """Puts adapters that start as zero into the student and freezes everything else.

        Raises:
            UserError: peft is not installed; `target_modules` names no layer, the head, or a tensor that is also
                another layer's.
        """
        student.requires_grad_(False)
        self._tuner(student)
        if not any(parameter.requires_grad for parameter in student.parameters()):
            raise UserError(f"model.lora.target_modules: {self.target_modules} names no layer of the student")
        if hasattr(student.get_output_embeddings(), "base_layer"):
            raise UserError(
                f"model.lora.target_modules: {self.target_modules} names the head, whose adapter the losses would not "
                "see; leave it out"
            )

    def _tuner(self, student: PreTrainedModel) -> Any:
        shared = shared_parameters(student)
        try:
            from peft import LoraConfig
            from peft.tuners.lora import LoraModel
        except ImportError as error:
            raise UserError(
                "model.lora: peft is not installed; run pip install 'student-aware-distillation[lora]'"
            ) from error
        try:
            # What it warns of is refused below, put right by itself (transposed weights), or of no concern (experts).
            with warnings.catch_warnings(action="ignore"):
                tuner = LoraModel(student, {"default": LoraConfig(**asdict(self))}, "default")
        except ValueError as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"model.lora.target_modules: {self.target_modules} ({reason}); name linear layers"
            ) from error
        for name in tuner.targeted_module_names:
            if twin := next((found[0] for tensor, found in shared.items() if tensor.startswith(f"{name}.")), None):
                raise UserError(
                    f"model.lora.target_modules: {self.target_modules} names {name}, whose weight is {twin} too: "
                    "merged, the adapter would count in both, and in training in one; leave it out"
                )
        return tuner

    def plain(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of the weights without their adapters, under a plain model's names; merging writes into them."""
        bare = {name: value for name, value in weights.items() if ".lora_" not in name}
        return {re.sub(r"(\.base_layer)+\.", ".", name): value.clone() for name, value in bare.items()}

    def merged(self, student: PreTrainedModel, weights: Mapping[str, Tensor]) -> PreTrainedModel:
        """A plain model again: `weights` with adapters are loaded into it, and each adapter added to its layer.

        Raises:
            UserError: as `add_to`.
        """
        tuner = self._tuner(student)
        student.load_state_dict(weights)
        with warnings.catch_warnings(action="ignore"):  # of heads that were never tied
            model: PreTrainedModel = tuner.merge_and_unload()
        return model
