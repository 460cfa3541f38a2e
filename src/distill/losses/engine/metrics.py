"""Weight-free validation metrics: sums from the loss engine, added up over batches and ranks, divided once.

Float64 sums with a single division, so that neither batch sizes nor ranks bend the result; so only what the engine
sums can be a metric.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric

CALIBRATION_BINS = 15


@dataclass(frozen=True, eq=False)
class TokenStats:
    """Weight-free sums over tokens at temperature 1, float64 scalars in nats unless stated.

    Sums about the teacher are None without dense targets. KL, agreement, acceptance and entropies are over the
    shared ids. Where the tokenizers differ there is a KL between the masses of classes of the student's ids, over
    the tokens that have a target.
    """

    tokens: Tensor
    student_nll: Tensor
    student_entropy: Tensor
    calibration_B3: Tensor  # per equal-width bin of confidence: tokens, summed confidence, correct tokens
    kl_div: Tensor | None = None
    teacher_nll: Tensor | None = None
    teacher_entropy: Tensor | None = None
    agreement: Tensor | None = None
    top5_agreement: Tensor | None = None  # share of the teacher's five likeliest ids among the student's, summed
    acceptance: Tensor | None = None  # 1 - total variation between the two distributions, summed
    class_kl: Tensor | None = None
    targets: Tensor | None = None  # tokens that it is summed over


NAMES = (  # of all metrics; those for which there is nothing to divide by are absent
    *("student_nll", "student_perplexity", "student_entropy", "ece", "bits_per_byte", "kl_div_T1", "top1_agreement"),
    *("top5_agreement", "acceptance", "teacher_nll", "teacher_perplexity", "teacher_entropy"),
)
_OF_TEACHER = ("kl_div", "teacher_nll", "teacher_entropy", "agreement", "top5_agreement", "acceptance")


_SUMS = (
    "tokens",
    "student_nll",
    "student_entropy",
    *_OF_TEACHER,
    "tokens_with_teacher",
    "num_bytes",
    "class_kl",
    "targets",
)


class DistillationMetrics(Metric):
    """Accumulates `TokenStats`; a scalar per name, float64.

    Returns of `compute`, in nats per token unless stated:
        kl_div_T1: forward KL to the teacher at T = 1 over the shared ids; where the tokenizers differ, between the
            masses of classes, per token that has a target.
        student_nll, teacher_nll: negative log-likelihood of the labels.
        student_perplexity, teacher_perplexity: its exponential.
        top1_agreement: share of tokens where both models prefer the same id.
        top5_agreement: share of the teacher's five likeliest ids that are among the student's five.
        acceptance: expected share of tokens drafted by the student that the teacher accepts in speculative sampling at
            T = 1, 1 minus the mean total variation (Leviathan et al., https://arxiv.org/abs/2211.17192, theorem 3.5).
        ece: expected calibration error of the student over 15 equal-width bins.
        bits_per_byte: the student's negative log-likelihood in bits per byte of text.
        student_entropy, teacher_entropy: of the next-token distribution.

        Those that need the teacher are absent when no batch had its whole distribution, bits_per_byte when no bytes
        were counted, all of them when no token was.
    """

    is_differentiable = False
    full_state_update = False
    tokens: Tensor
    student_nll: Tensor
    student_entropy: Tensor
    kl_div: Tensor
    teacher_nll: Tensor
    teacher_entropy: Tensor
    agreement: Tensor
    top5_agreement: Tensor
    acceptance: Tensor
    tokens_with_teacher: Tensor
    num_bytes: Tensor
    class_kl: Tensor
    targets: Tensor
    calibration: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in _SUMS:
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("calibration", torch.zeros(CALIBRATION_BINS, 3, dtype=torch.float64), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> "DistillationMetrics":
        """Moves the sums along with the module, but they stay float64 where that becomes half precision."""
        super()._apply(lambda tensor: fn(tensor).to(tensor.dtype), exclude_state)
        return self

    def update(self, stats: TokenStats, num_bytes: int) -> None:
        """Adds one batch.

        Args:
            stats: what the engine returned.
            num_bytes: bytes of text that the batch's tokens stand for.
        """
        self.calibration += stats.calibration_B3
        self.num_bytes += num_bytes
        for name in ("tokens", "student_nll", "student_entropy"):
            setattr(self, name, getattr(self, name) + getattr(stats, name))
        if stats.kl_div is not None:
            self.tokens_with_teacher += stats.tokens
            for name in _OF_TEACHER:
                setattr(self, name, getattr(self, name) + getattr(stats, name))
        if stats.class_kl is not None and stats.targets is not None:
            self.class_kl += stats.class_kl
            self.targets += stats.targets

    def compute(self) -> dict[str, Tensor]:
        """The metrics by name; see the class."""
        counts = torch.stack([self.tokens, self.num_bytes, self.targets, self.tokens_with_teacher])
        tokens, num_bytes, targets, with_teacher = counts.tolist()  # one wait for the device
        if not tokens:
            return {}
        student_nll = self.student_nll / self.tokens
        _, confidence_B, correct_B = self.calibration.unbind(1)
        result = {
            "student_nll": student_nll,
            "student_perplexity": student_nll.exp(),
            "student_entropy": self.student_entropy / self.tokens,
            "ece": (confidence_B - correct_B).abs().sum() / self.tokens,
        }
        if num_bytes:
            result["bits_per_byte"] = self.student_nll / (self.num_bytes * math.log(2))
        if targets:
            result["kl_div_T1"] = self.class_kl / self.targets
        if with_teacher:
            teacher_nll = self.teacher_nll / self.tokens_with_teacher
            result |= {
                "kl_div_T1": self.kl_div / self.tokens_with_teacher,
                "top1_agreement": self.agreement / self.tokens_with_teacher,
                "top5_agreement": self.top5_agreement / self.tokens_with_teacher,
                "acceptance": self.acceptance / self.tokens_with_teacher,
                "teacher_nll": teacher_nll,
                "teacher_perplexity": teacher_nll.exp(),
                "teacher_entropy": self.teacher_entropy / self.tokens_with_teacher,
            }
        return result


def token_stats_of(values: dict[str, Tensor], with_teacher: bool) -> TokenStats:
    """Float64 sums of what `statistics_rows` found."""
    confidence_N, correct_N = values["confidence"].double(), values["correct"].double()
    bin_N = (confidence_N * CALIBRATION_BINS).ceil().long().sub(1).clamp(0, CALIBRATION_BINS - 1)
    calibration_B3 = confidence_N.new_zeros(CALIBRATION_BINS, 3)
    calibration_B3.index_add_(0, bin_N, torch.stack([torch.ones_like(correct_N), confidence_N, correct_N], dim=1))
    names = ("student_nll", "student_entropy", *(_OF_TEACHER if with_teacher else ()))
    sums = {name: values[name].sum(dtype=torch.float64) for name in names}
    return TokenStats(tokens=calibration_B3[:, 0].sum(), calibration_B3=calibration_B3, **sums)
