"""The Lightning module: one function computes the losses of training and validation alike, everybody else reads them.

Each component is a sum over its units divided by their number in the whole optimizer step, which the batch carries; so
any split of a step over micro-batches and ranks has the same gradient, without communication. The price: batches must
come from a datamodule that counts ahead.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.breakdown import LossBreakdown
from distill.checkpoints import contents
from distill.curriculum import WEIGHT_KEY, WEIGHT_KEYS, CurriculumState
from distill.errors import UserError
from distill.losses.attention import AttentionTransfer
from distill.losses.contrastive import Contrastive
from distill.losses.engine.divergence import KDLoss
from distill.losses.engine.metrics import DistillationMetrics
from distill.losses.layerwise import Layerwise
from distill.losses.routing import Routing
from distill.models import load
from distill.models.build import build_models
from distill.models.fsdp2 import check_strategy, local_sum, shard, whole_norm
from distill.models.lora import LoRA
from distill.teachers.online import OnlineTeacher, quantize
from distill.training.callbacks.curriculum import Curriculum
from distill.training.callbacks.resume import ExactResume
from distill.training.horizon import horizon_of
from distill.training.idle import IdleParameters
from distill.training.lightning_internals import validate_between_steps
from distill.training.objective import UNIT, Losses, objective
from distill.training.optim import CONFIGURED, adamw, configuration_wins, warmup_cosine
from distill.training.options import check_options
from distill.training.step_sums import StepSums, Throughput, peak_memory


class DistillationModule(L.LightningModule):
    """Distils a frozen teacher into a student with the losses and weights that the curriculum says.

    Weights and temperature are constant, 1, in a trainer without a `Curriculum()`. The command has that, `LossAudit()`,
    `LastCheckpoint()` and the dumps, and its trainer is `DistillTrainer`; `ExactResume()` comes with the module.

    Args:
        teacher: hub id, folder, GGUF file or `package://name/file` of a causal language model.
        student: the same for the student's weights; or leave it out and give one of the next two.
        student_layers: cut the student from the teacher's layers: a number of them or a list of indices.
        student_layers_by: which a number of layers are: evenly spaced ones, or those that change their input most on
            the first training rows.
        student_config: start from random weights: a folder with a config.json, or the config's keys.
        kd_loss: options of `kd_loss`; null = off.
        lm_loss: whether next-token cross-entropy is a component.
        routing: the routing losses; null = off.
        attention: options of `attention_loss`; null = off, as for the next two.
        layerwise: options of `layerwise_loss`.
        contrastive: options of `contrastive_loss`.
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
        chunk_size: tokens whose logits exist at one time; null = by a byte budget.
        trust_remote_code: run model code that comes with the weights.
        allow_pickle: load weights that are not safetensors.

    Raises:
        UserError: options that cannot be meant, or not together.

    Example:
        >>> DistillationModule("Qwen/Qwen3-0.6B", student_layers=14, kd_loss=KDLoss("reverse_kl")).components
        ['kd_loss', 'lm_loss']
    """

    def __init__(
        self,
        teacher: str,
        student: str | None = None,
        student_layers: int | list[int] | None = None,
        student_layers_by: Literal["even", "importance"] = "even",
        student_config: str | dict[str, Any] | None = None,
        lora: LoRA | None = None,
        kd_loss: KDLoss | None = KDLoss(),  # noqa: B008  (frozen)
        lm_loss: bool = True,
        routing: Routing | None = None,
        attention: AttentionTransfer | None = None,
        layerwise: Layerwise | None = None,
        contrastive: Contrastive | None = None,
        learning_rate: float = 1e-4,
        router_learning_rate: float | None = None,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.95),
        warmup_steps: int = 0,
        min_learning_rate_ratio: float = 0.01,
        teacher_top_k: int | Literal["native", "all"] = "native",
        teacher_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        teacher_quantization: Literal["int8"] | None = None,
        torch_compile: bool = False,
        gradient_checkpointing: bool = False,
        matmul_precision: Literal["highest", "high", "medium"] = "highest",
        chunk_size: int | None = None,
        trust_remote_code: bool = False,
        allow_pickle: bool = False,
    ) -> None:
        super().__init__()
        self.teacher_source = teacher
        self.student_sources: dict[str, Any] = {
            "student": student,
            "student_layers": student_layers,
            "student_config": student_config,
        }
        self.student_layers_by = student_layers_by
        self.lora = lora
        self.kd_loss = kd_loss
        self.routing = routing
        self.attention, self.layerwise, self.contrastive = attention, layerwise, contrastive
        self.learning_rate = learning_rate
        self.router_learning_rate = learning_rate if router_learning_rate is None else router_learning_rate
        self.weight_decay = weight_decay
        self.betas = betas
        self.warmup_steps = warmup_steps
        self.min_learning_rate_ratio = min_learning_rate_ratio
        self.teacher_top_k = teacher_top_k
        self.teacher_dtype = teacher_dtype
        self.teacher_quantization, self.torch_compile = teacher_quantization, torch_compile
        self.gradient_checkpointing = gradient_checkpointing
        self.matmul_precision = matmul_precision
        self.chunk_size = chunk_size
        self.load_options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}

        check_options(self, lm_loss)
        configured = {"kd_loss": kd_loss is not None, "lm_loss": lm_loss}
        configured |= dict.fromkeys(routing.components if routing else [], True)
        configured |= {loss.component: True for loss in self.features}
        self.components = [name for name in WEIGHT_KEY if configured.get(name)]
        self.curriculum = CurriculumState(0, 0.0, dict.fromkeys(WEIGHT_KEYS, 1.0), 1.0, None)
        self.step_is_read = False
        self.drop_nonfinite = False
        self.skipped_steps: int | None = None
        self.measure_inactive: frozenset[str] = frozenset()
        self.student: PreTrainedModel | None = None
        self.teacher: OnlineTeacher | None = None
        self.grad_norm: Tensor | None = None
        self._step_sums, self._throughput = StepSums(), Throughput()
        self._horizon = 0
        self._configured: list[dict[str, Any]] = []
        self._idle: IdleParameters | None = None
        self._anchored: list[nn.Parameter] = []
        self.metrics = DistillationMetrics()

    # Set-up

    def configure_callbacks(self) -> list[Callback]:
        """`ExactResume()`, where the trainer has none."""
        present: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        return [] if any(isinstance(callback, ExactResume) for callback in present) else [ExactResume()]

    @cached_property
    def max_context(self) -> int | None:
        """The shorter of the two models' contexts, in tokens; None = unlimited."""
        sources = [self.teacher_source, self.student_sources["student"] or self.student_sources["student_config"]]
        remote = self.load_options["trust_remote_code"]
        configs = [load.load_config(source, trust_remote_code=remote) for source in sources if source is not None]
        return min((length for config in configs if (length := load.max_context(config)) is not None), default=None)

    def configure_model(self) -> None:
        """Loads both models, once; the student is built here so that a strategy can place it."""
        if self.student is not None:
            return
        check_strategy(self.trainer.strategy)
        torch.set_float32_matmul_precision(self.matmul_precision)
        teacher, self.student = build_models(self)
        if self.routing is not None:
            self.routing.build(teacher, self.student.config)
        if self.attention is not None:
            self.attention.build(teacher, self.student)
        if self.layerwise is not None:
            self.layerwise.build(teacher, self.student)
        if self.contrastive is not None:
            rows = getattr(getattr(self.trainer, "datamodule", None), "per_device_batch_size", None)
            self.contrastive.build(teacher, self.student, rows)
            # All ranks write the same into the queue: DDP need not send it around before each forward pass.
            names = [f"contrastive.{name}" for name, _ in self.contrastive.named_buffers()]
            self._ddp_params_and_buffers_to_ignore = names
        self._idle = IdleParameters(self.student, self.auxiliaries)
        self.teacher = OnlineTeacher(teacher, self.teacher_top_k)
        if self.teacher_quantization is not None:
            quantize(teacher)
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            shard(self, teacher)
        if self.torch_compile:
            self.student.get_decoder().compile()
            teacher.get_decoder().compile()

    @property
    def features(self) -> list[AttentionTransfer | Layerwise | Contrastive]:
        """The configured losses on hidden states and attention, in listing order."""
        return [loss for loss in (self.attention, self.layerwise, self.contrastive) if loss is not None]

    @property
    def auxiliaries(self) -> list[Routing | Layerwise | Contrastive]:
        """The modules that are trained beside the student and thrown away after."""
        return [module for module in (self.routing, self.layerwise, self.contrastive) if module is not None]

    @property
    def num_experts(self) -> int | None:
        """Experts (or slices) of the teacher's routed layers, None without routing."""
        return self.routing.num_experts_ if self.routing is not None else None

    def on_fit_start(self) -> None:
        if not any(isinstance(callback, Curriculum) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            rank_zero_info("No Curriculum among the callbacks: every loss weighs 1 throughout, at temperature 1.")
        self._place_teacher()

    def on_validation_start(self) -> None:
        self._place_teacher()
        self._throughput.pause()

    def on_validation_end(self) -> None:
        self._throughput.resume()

    def on_test_start(self) -> None:
        self._place_teacher()

    def _place_teacher(self) -> None:
        assert self.teacher is not None
        self.teacher.to(self.device)

    # Losses

    def component_weights(self) -> dict[str, float]:
        """Configured component -> the curriculum's weight now, in listing order."""
        return {name: self.curriculum.weights[WEIGHT_KEY[name]] for name in self.components}

    def losses(
        self, batch: Mapping[str, Any], share: float, metrics: bool = False, components: list[str] | None = None
    ) -> Losses:
        """The objective of a batch with the curriculum's state now, of some components or all; see `objective`."""
        assert self.student is not None
        assert self.teacher is not None
        return objective(
            batch,
            self.student,
            self.teacher,
            self.components if components is None else components,
            self.curriculum,
            share,
            kd=self.kd_loss,
            routing=self.routing,
            features=self.features,
            chunk_size=self.chunk_size,
            measure_inactive=self.measure_inactive,
            metrics=metrics,
        )

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Loss and breakdown of a micro-batch, and of its whole optimizer step where somebody reads that.

        Returns:
            `loss` for Lightning, which divides it by the accumulation; `total`, the same before that; `breakdown` of
            this micro-batch; `step`, the breakdown of the whole optimizer step over all ranks, on a window's last
            micro-batch where a logger or a dump reads it, else None.
        """
        assert self._idle is not None
        accumulation = self.trainer.accumulate_grad_batches
        result = self.losses(batch, share=accumulation * self.trainer.world_size)
        total, breakdown = result.total, result.breakdown
        due = self.step_is_read or self._logs_this_step()
        self.step_is_read, self.measure_inactive = False, frozenset()
        self._anchored = []
        if isinstance(self.trainer.strategy, DDPStrategy) or not total.requires_grad:
            self._anchored = self._idle(self.component_weights(), total)
            total = total + sum((local_sum(p) for p in self._anchored), torch.zeros((), device=self.device)) * 0.0

        total = total * (1 + 0 * total.detach())  # where it is not finite, neither is any of its gradient

        if due:
            tokens, starts = len(batch["positions"]), batch_idx % accumulation == 0
            self._step_sums.add(breakdown, result.routing_stats, tokens, accumulation, starts)
        step = None
        if (batch_idx + 1) % accumulation == 0 or self.trainer.is_last_batch:
            self._throughput.add(batch["units"]["tokens"])
            if due:
                step, stats = self._step_sums.whole(breakdown, result.routing_stats)
                if self._logs_this_step():
                    self._log_step(step, stats)
        return {"loss": total, "total": total.detach(), "breakdown": breakdown, "step": step}

    def _logs_this_step(self) -> bool:
        """Whether loggers take what this optimizer step logs: every so many, and the last, which Lightning always does.

        The others do without: `log` costs most of a millisecond an entry.
        """
        every, step = self.trainer.log_every_n_steps, self.trainer.global_step + 1  # type: ignore[attr-defined]
        return step == self._horizon or (every > 0 and step % every == 0)

    def _log_step(self, step: LossBreakdown, stats: dict[str, Tensor]) -> None:
        """Logs the optimizer step under the names of the metrics table."""
        state = self.curriculum
        figures: dict[str, Any] = {"train/loss": step.total}
        figures |= {f"train/{name}": step.raw[name] for name in step.active}
        figures |= {f"train/{name}_scaled": value for name, value in step.scaled.items()}
        figures |= {f"curriculum/{WEIGHT_KEY[name]}": weight for name, weight in step.weights.items()}
        figures["curriculum/temperature"] = state.temperature
        if self.routing is not None:
            figures["curriculum/top_k_experts"] = float(state.top_k_experts or self.routing.native_k)
        figures["train/lr"] = self.trainer.optimizers[0].param_groups[0]["lr"]  # the student's, of this step
        figures["train/tokens_per_s"] = self._throughput.read()
        figures["train/peak_memory_gib"] = peak_memory(self.device) / 2**30
        figures |= {f"routing/{name}": value for name, value in stats.items()}
        if self.skipped_steps is not None:
            figures["train/skipped_steps"] = float(self.skipped_steps)
        self.log_dict(figures)
        self.log("loss", step.total, prog_bar=True, logger=False)

    # Validation

    def on_validation_epoch_start(self) -> None:
        self._sums = torch.zeros(2, len(self.components), dtype=torch.float64, device=self.device)
        self.metrics.reset()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Loss and breakdown of a batch with the weights, temperature and masks of the training step before it.

        Returns:
            `total` and `breakdown`, as the training step does.
        """
        result = self.losses(batch, share=1.0, metrics=True)
        assert result.token_stats is not None
        self.metrics.update(result.token_stats, batch["bytes"])
        breakdown = result.breakdown
        for index, name in enumerate(self.components):
            if name in breakdown.raw:
                count = batch["units"][UNIT[name]]
                self._sums[0, index] += breakdown.raw[name].double() * count
                self._sums[1, index] += count
        return {"total": result.total.detach(), "breakdown": breakdown}

    def on_validation_epoch_end(self) -> None:
        sums, counts = self.trainer.strategy.reduce(self._sums, reduce_op="sum")
        means = dict(zip(self.components, (sums / counts.clamp(min=1)).unbind(), strict=True))
        weights = self.component_weights()
        breakdown = LossBreakdown({name: means[name] for name in self.components if weights[name] > 0}, weights)
        figures = {"val/loss": breakdown.total}
        figures |= {f"val/{name}": value for name, value in breakdown.raw.items()}
        figures |= {f"val/{name}": value for name, value in self.metrics.compute().items()}
        self.log_dict(figures)

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    # Optimisation

    def configure_optimizers(self) -> Any:
        """Fused AdamW with warm-up and cosine over optimizer steps."""
        assert self.student is not None
        horizon = horizon_of(self.trainer)
        if self.warmup_steps >= horizon:
            rank_zero_warn(f"model.warmup_steps: {self.warmup_steps} outlasts the run of {horizon} steps.")
        optimizer = adamw(
            [(self.student, self.learning_rate), *((m, self.router_learning_rate) for m in self.auxiliaries)],
            weight_decay=self.weight_decay,
            betas=self.betas,
            fused=self.trainer.precision != "16-mixed",
        )
        self._horizon = horizon
        self._configured = [{key: group[key] for key in CONFIGURED} for group in optimizer.param_groups]
        schedule = warmup_cosine(optimizer, self.warmup_steps, horizon, self.min_learning_rate_ratio)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """Puts right what Lightning restores otherwise than one should expect of a resumed run."""
        trainer = self.trainer
        # Asking for the horizon has made the loaders before their state was restored: hand it to them now.
        trainer.fit_loop._load_combined_loader_states()
        for optimizer, scheduler in zip(trainer.optimizers, trainer.lr_scheduler_configs, strict=True):
            configuration_wins(optimizer, scheduler.scheduler, self._configured)
        validate_between_steps(trainer)
        self._throughput = Throughput()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Asks for a validation after the last step, which Lightning omits where the run ends between two of them."""
        if self.trainer.global_step >= self._horizon:
            self.trainer.should_stop = True

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for parameter in self._anchored:
            parameter.grad = None

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by norm or value; the norm before clipping is logged as `train/grad_norm` and read by the audit."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = whole_norm(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        self.grad_norm = norm.to(self.device)  # that of no gradients is on the CPU
        if self.drop_nonfinite:
            optimizer.found_inf = (~self.grad_norm.isfinite()).float()  # type: ignore[attr-defined]  # of fused AdamW
        if self._logs_this_step():
            self.log("train/grad_norm", self.grad_norm)
        if gradient_clip_val and gradient_clip_algorithm == "value":
            nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        elif gradient_clip_val:
            nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, self.grad_norm)

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["distill"] = contents.describe(contents.settings_of(self)) | contents.record(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        contents.check(checkpoint, contents.settings_of(self), self.state_dict())

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Not offered: a checkpoint has no teacher.

        Raises:
            UserError: says what loads the student, and what goes on with a run.
        """
        raise UserError(
            f"load_from_checkpoint: {checkpoint_path} has no teacher to go on with; distill.load_student(path).model "
            "is its student, and trainer.fit(module, data, ckpt_path=path) goes on with its run"
        )
