"""On a real CUDA device, where there is one: whole fits in each precision, what they wait for, and attention."""

import shutil
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from conftest import VOCABULARY
from distill.commands.quiet import quieten
from distill.data.datamodule import DistillationDataModule
from distill.losses.attention import AttentionTransfer
from distill.losses.contrastive import Contrastive
from distill.losses.layerwise import Layerwise
from distill.losses.routing import Routing
from distill.models.attention import NAME, settle_attention
from distill.models.experts import cast_experts
from distill.models.trace import decode
from distill.training.callbacks.audit import LossAudit
from distill.training.callbacks.curriculum import Curriculum
from distill.training.module import DistillationModule
from distill.training.trainer import DistillTrainer
from helpers.packed import make_batch, separate
from helpers.tiny import tiny_deepseek_v3, tiny_gemma, tiny_llama, tiny_qwen3_moe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
WATCHED = range(6, 10)  # optimizer steps, none of them logged


class Waits(Callback):
    """Counts, by file and line, what the host waits for in the watched steps; keeps the losses."""

    def __init__(self):
        self.found, self.losses, self.catcher = Counter(), [], warnings.catch_warnings(record=True)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(outputs["total"])
        self.device = module.student.device.type
        if trainer.global_step == WATCHED.start:
            self.caught = self.catcher.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        if trainer.global_step == WATCHED.stop:
            torch.cuda.set_sync_debug_mode("default")
            for warning in self.caught:
                if "synchronizing CUDA operation" in str(warning.message):
                    self.found[f"{'/'.join(Path(warning.filename).parts[-2:])}:{warning.lineno}"] += 1
            self.catcher.__exit__(None, None, None)


@pytest.fixture
def fit(assets, tmp_path):
    """Fits with all nine losses, or other options, on a device."""
    folder = tmp_path / "teacher"
    shutil.copytree(assets / "llama", folder, ignore=shutil.ignore_patterns("config.json", "*.safetensors"))

    def run(precision, accelerator="gpu", make=tiny_llama, **options):
        quieten()
        make(vocab_size=VOCABULARY, num_hidden_layers=4, hidden_size=64).save_pretrained(folder)
        losses = {
            "routing": Routing(teacher_layers=2, tau=1.0, num_experts=4), "attention": AttentionTransfer(),
            "layerwise": Layerwise(), "contrastive": Contrastive(queue_size=64),
        }  # fmt: skip
        module = DistillationModule(str(folder), student_layers=2, student_fit=None, **(losses | options))
        weights = dict.fromkeys(("kd", "feature", "attention", "layerwise", "contrastive", "lm"), 0.5)
        waits = Waits()
        trainer = DistillTrainer(
            logger=False, callbacks=[Curriculum(**weights), LossAudit(), waits], max_steps=WATCHED.stop + 2,
            log_every_n_steps=WATCHED.stop + 2, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, num_sanity_val_steps=0, gradient_clip_val=1.0, default_root_dir=tmp_path,
            accelerator=accelerator, devices=1, precision=precision,
        )  # fmt: skip
        data = DistillationDataModule(
            str(assets / "text.txt"), sequence_length=64, per_device_batch_size=4, max_validation_sequences=8
        )
        torch.manual_seed(0)
        trainer.fit(module, data)
        return module, waits, [float(loss) for loss in waits.losses]

    return run


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
def test_a_fit_learns_and_waits_for_nothing_of_ours(fit, precision):
    module, waits, losses = fit(precision)
    assert waits.device == "cuda"  # Lightning has brought the module back since
    assert module.student.get_decoder().config._attn_implementation == NAME
    assert all(torch.isfinite(torch.tensor(losses)))
    print(precision, dict(waits.found), losses[0], losses[-1])
    allowed = ["amp/grad_scaler.py"] if precision == "16-mixed" else []
    assert not [place for place in waits.found if place.split(":")[0] not in allowed], waits.found


def test_transformers_own_search_for_packed_rows_is_seen(fit):
    """Both that a wait would be noticed, and what `model.attn_implementation: sdpa` costs: one a model and step."""
    _, waits, _ = fit("bf16-mixed", attn_implementation="sdpa")
    print(dict(waits.found))
    assert sum(waits.found.values()) == 2 * len(WATCHED)
    assert all("masking_utils" in place for place in waits.found)


def test_a_fit_is_that_of_a_cpu(fit):
    _, _, there = fit("32-true")
    _, _, here = fit("32-true", "cpu")
    print(here, there)
    assert there == pytest.approx(here, rel=1e-3)


def test_experts_learn_in_bf16(fit):
    module, waits, losses = fit("bf16-mixed", make=tiny_qwen3_moe, routing=Routing(teacher_layers=2))
    print(dict(waits.found), losses[0], losses[-1])
    experts = [p for name, p in module.student.named_parameters() if "experts" in name]
    assert experts
    assert all(p.dtype == torch.float32 for p in experts)
    assert not waits.found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma, tiny_qwen3_moe, tiny_deepseek_v3], ids=lambda m: m.__name__)
def test_packed_rows_equal_their_documents(make, dtype):
    sizes = {} if make is tiny_deepseek_v3 else {"hidden_size": 64, "head_dim": 16}
    model = make(**sizes)
    settle_attention(model, "varlen", "cuda", "model.student")
    cast_experts(model)
    model.to("cuda", dtype)
    batch = make_batch([[50, 9, 3], [12, 40]], 64)
    there = batch.to("cuda").student
    packed_ND = there.valid(decode(model, there).last_hidden_state)
    alone = [one.to("cuda").student for one in separate(batch)]
    alone_ND = torch.cat([one.valid(decode(model, one).last_hidden_state) for one in alone])
    error = ((packed_ND - alone_ND).float().norm() / alone_ND.float().norm()).item()
    weight = model.get_input_embeddings().weight
    factors = torch.linspace(-1, 1, packed_ND.numel(), device="cuda").view_as(packed_ND)
    gradients = [torch.autograd.grad((x.float() * factors).sum(), weight)[0].float() for x in (packed_ND, alone_ND)]
    off = ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item()
    print(make.__name__, dtype, error, off)
    assert max(error, off) < (1e-5 if dtype == torch.float32 else 3e-2)
