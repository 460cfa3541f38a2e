"""One whole training step under bf16-mixed on a CUDA device, for gpu.py: bare parts, distill and TRL's GKD trainer.

A Llama of random weights teaches a student of some of its layers on packed rows of Python's documentation, with forward
KL alone, clipping and fused AdamW. The bare parts are what no trainer can leave out: the teacher's decoder forward, the
student's forward and backward, the products of both heads, clipping and the optimizer. The teacher is in bf16 for all.

    python benchmarks/gpu_step.py make MODEL FOLDER && python benchmarks/gpu_step.py bare|distill|trl MODEL FOLDER
"""

import json
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch import Tensor

# Sizes, the student's layers, rows and length of a micro-batch, steps to warm up and to measure.
MODELS: dict[str, tuple[dict[str, Any], int, int, int, int, int]] = {
    "SmolLM2-135M": (
        {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
        | {"num_key_value_heads": 3, "vocab_size": 49_152},
        10, 16, 512, 4, 10,
    ),
    "Llama-0.8B": (
        {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 12, "num_attention_heads": 32}
        | {"num_key_value_heads": 8, "vocab_size": 128_256},
        6, 16, 512, 4, 10,
    ),
    "tiny": (
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
        | {"num_key_value_heads": 2, "vocab_size": 4096},
        2, 2, 64, 1, 2,
    ),
}  # fmt: skip
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Meter:
    """Times steps after the warm ones, as a whole, so that nothing waits in between; counts the last one's waits."""

    def __init__(self, model: str) -> None:
        _, _, self.rows, self.length, self.warm, self.steps = MODELS[model]
        self.done = 0
        self.seconds = 0.0
        self.caught: list[warnings.WarningMessage] = []
        self.catcher = warnings.catch_warnings(record=True)

    def step(self) -> None:
        """Call after each of `total` steps."""
        self.done += 1
        if self.done == self.warm:
            synchronize()
            self.seconds = -time.perf_counter()
        if self.done == self.warm + self.steps:
            synchronize()
            self.seconds += time.perf_counter()
            self.caught = self.catcher.__enter__() or []
            warnings.simplefilter("always")
            if DEVICE == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
        if self.done == self.total and DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("default")

    @property
    def total(self) -> int:
        """Steps to take: those to warm up, those to measure and one to watch."""
        return self.warm + self.steps + 1

    def figures(self) -> dict[str, Any]:
        """ms and tokens_per_s of a step, peak gib, waits of one step by place."""
        self.catcher.__exit__(None, None, None)
        waits: dict[str, int] = {}
        for warning in self.caught:
            if "synchronizing CUDA operation" in str(warning.message):
                place = f"{'/'.join(Path(warning.filename).parts[-3:])}:{warning.lineno}"
                waits[place] = waits.get(place, 0) + 1
        seconds = self.seconds / self.steps
        peak = torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else 0.0
        tokens = self.rows * self.length
        return {"ms": 1000 * seconds, "tokens_per_s": tokens / seconds, "gib": peak, "waits": waits}


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def text() -> str:
    from pydoc_data import topics

    return "\n".join(topics.topics[key] for key in sorted(topics.topics))


def make(model: str, folder: Path) -> None:
    """The teacher in bf16 with a tokenizer of 4,096 ids, and the text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text()], trainer)
    torch.manual_seed(0)
    config = LlamaConfig(**MODELS[model][0], tie_word_embeddings=True, bos_token_id=None, eos_token_id=0)
    with torch.device(DEVICE):
        teacher = LlamaForCausalLM(config)
    teacher.to(torch.bfloat16).save_pretrained(folder / model)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    fast.save_pretrained(folder / model)
    (folder / "text.txt").write_text(text())


def through_distill(model: str, folder: Path) -> dict[str, Any]:
    """The step as `distill fit` takes it, with its default callbacks."""
    from lightning.pytorch.callbacks import Callback

    from distill.commands.quiet import quieten
    from distill.data.datamodule import DistillationDataModule
    from distill.losses.engine.divergence import KDLoss
    from distill.training.callbacks.audit import LossAudit
    from distill.training.callbacks.curriculum import Curriculum
    from distill.training.callbacks.step_dumps import CurriculumDump, KDLossDump
    from distill.training.callbacks.train_debug import TrainDebug
    from distill.training.module import DistillationModule
    from distill.training.trainer import DistillTrainer

    meter = Meter(model)

    class Metered(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            meter.step()

    quieten()
    _, layers, rows, length, _, _ = MODELS[model]
    dumps = [LossAudit(), TrainDebug(), CurriculumDump(), KDLossDump()]
    with tempfile.TemporaryDirectory() as root:
        trainer = DistillTrainer(
            default_root_dir=root,
            callbacks=[Curriculum(kd=1.0, feature=0.0, attention=0.0), *dumps, Metered()],
            max_steps=meter.total,
            limit_val_batches=0,
            gradient_clip_val=1.0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator=DEVICE,
            devices=1,
            precision="bf16-mixed",
        )
        module = DistillationModule(
            str(folder / model),
            student_layers=layers,
            student_fit=None,
            kd_loss=KDLoss(),
            lm_loss=False,
            learning_rate=1e-4,
        )
        data = DistillationDataModule(
            str(folder / "text.txt"), sequence_length=length, per_device_batch_size=rows, packing=True
        )
        trainer.fit(module, data)
    return meter.figures()


def models(model: str, folder: Path) -> tuple[Any, Any]:
    """Teacher in bf16 and student in fp32, on the device."""
    from distill.models.cut import cut_layers
    from distill.models.load import load_model

    teacher = load_model(str(folder / model), dtype=torch.float32).requires_grad_(False)
    student = cut_layers(teacher, MODELS[model][1])
    return teacher.to(torch.bfloat16).to(DEVICE), student.to(DEVICE)


def ids_of(model: str, folder: Path, steps: int) -> Tensor:
    """Token ids of enough rows for so many steps; the text is repeated where it is short."""
    from distill.models.load import load_tokenizer

    _, _, rows, length, _, _ = MODELS[model]
    ids = torch.tensor(load_tokenizer(str(folder / model))(text()).input_ids)
    wanted = steps * rows * length
    return ids.repeat(-(-wanted // len(ids)))[:wanted].view(-1, length)


def through_trl(model: str, folder: Path) -> dict[str, Any]:
    """The step as TRL's GKD trainer takes it on the same models, off-policy."""
    import datasets
    from transformers import TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    from distill.models.load import load_tokenizer

    teacher, student = models(model, folder)
    meter = Meter(model)

    class Metered(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            meter.step()

    def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids = torch.tensor([example["input_ids"] for example in examples])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}

    with tempfile.TemporaryDirectory() as root:
        arguments = GKDConfig(
            output_dir=root,
            per_device_train_batch_size=meter.rows,
            max_steps=meter.total,
            lmbda=0.0,
            beta=0.0,
            temperature=1.0,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            learning_rate=1e-4,
            bf16=True,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=DEVICE == "cpu",
        )
        trainer = GKDTrainer(
            model=student,
            teacher_model=teacher,
            args=arguments,
            train_dataset=datasets.Dataset.from_dict({"input_ids": ids_of(model, folder, meter.total).tolist()}),
            processing_class=load_tokenizer(str(folder / model)),
            data_collator=collate,
            callbacks=[Metered()],
        )
        trainer.train()
    return meter.figures()


def bare(model: str, folder: Path) -> dict[str, Any]:
    """The parts in a row, the products in the engine's chunks."""
    from distill.losses.engine.walk import sizes
    from distill.models.head import addmm_into, logits_dtype, mm_into

    teacher, student = models(model, folder)
    meter = Meter(model)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)
    weight = student.get_output_embeddings().weight
    teacher_weight = teacher.get_output_embeddings().weight
    tokens, vocab, low = meter.rows * meter.length, len(weight), torch.bfloat16
    chunk, _ = sizes([vocab, vocab], weight.detach()[:1].expand(tokens, -1), torch.float32, None)
    logits = torch.empty(chunk, vocab, device=DEVICE, dtype=logits_dtype(low, weight.device))
    gradient = torch.randn(chunk, vocab, device=DEVICE, dtype=low) * 1e-6
    for ids in ids_of(model, folder, meter.total).split(meter.rows):
        ids = ids.to(DEVICE)
        with torch.no_grad():
            teacher_hidden = teacher.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state.view(tokens, -1)
        with torch.autocast(DEVICE, dtype=low):
            hidden = student.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        with torch.no_grad():
            rows, low_weight = hidden.detach().view(tokens, -1).to(low), weight.detach().to(low)
            hidden_gradient, weight_gradient = torch.empty_like(rows, dtype=torch.float32), torch.zeros_like(weight)
            for start in range(0, tokens, chunk):
                part = slice(start, min(start + chunk, tokens))
                size = part.stop - part.start
                mm_into(logits[:size], teacher_hidden[part], teacher_weight.T)
                mm_into(logits[:size], rows[part], low_weight.T)
                mm_into(hidden_gradient[part], gradient[:size], low_weight)
                addmm_into(weight_gradient, gradient[:size].T, rows[part], 1.0)
            weight.grad = weight_gradient
        hidden.backward(hidden_gradient.view_as(hidden).to(hidden.dtype))
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        meter.step()
    return meter.figures()


def main() -> None:
    what, model, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    if what == "make":
        make(model, folder)
        return
    arms = {"bare": bare, "distill": through_distill, "trl": through_trl}
    print(json.dumps(arms[what](model, folder)))


if __name__ == "__main__":
    main()
