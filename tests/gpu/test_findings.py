"""What a review found that a first GPU would stop at or be slowed by, each held by a test that needs none."""

import pytest
import torch

from distill.models.load import load_model
from distill.models.precision import cast
from distill.preflight.checks import gpu_findings
from distill.teachers.experts import chunks
from distill.training.options import ModelOptions
from helpers.tiny import tiny_deepseek_v3, tiny_llama, tiny_qwen3_moe


def test_models_are_loaded_on_the_host(distill, config, monkeypatch):
    """Lightning sets the GPU as the default device; transformers then asks for accelerate, and a CPU build fails."""
    from lightning.pytorch.strategies import SingleDeviceStrategy

    monkeypatch.setattr("transformers.integrations.accelerate.is_accelerate_available", lambda *a: False)
    monkeypatch.setattr(SingleDeviceStrategy, "tensor_init_context", lambda self, *a: torch.device("meta"))
    config["trainer"] |= {"max_steps": 1, "limit_val_batches": 1, "num_sanity_val_steps": 0}
    cli = distill("fit", config)
    assert cli.model.student.device.type == cli.model.teacher.model.device.type == "cpu"


def sentences(precision, device="cuda", teacher=tiny_llama, **options):
    return gpu_findings(ModelOptions("teacher", student_layers=1, **options), precision, device, teacher())


def test_fp32_products_on_a_gpu_are_named():
    (found,) = sentences("32-true")
    assert found.startswith("trainer.precision: 32-true")
    assert "bf16-mixed" in found
    assert "ten times" in found
    assert sentences("32-true", "cpu") == sentences("bf16-mixed") == sentences("bf16-true") == []
    assert sentences("32-true", matmul_precision="high") == []


def test_heads_that_are_cast_or_rounded_are_named():
    (found,) = sentences("16-mixed")
    assert "casts the head of the teacher" in found
    (found,) = sentences("bf16-mixed", teacher_dtype="float32")
    assert found.startswith("model.teacher_dtype: float32 under bf16-mixed")


def test_experts_without_grouped_products_are_named():
    assert sentences("bf16-mixed", teacher=tiny_qwen3_moe) == []
    found = sentences("32-true", teacher=tiny_qwen3_moe, matmul_precision="high")
    assert len(found) == 1
    assert "experts" in found[0]


@pytest.mark.parametrize("make", [tiny_llama, tiny_deepseek_v3], ids=lambda make: make.__name__)
def test_a_teacher_is_cast_as_it_would_have_been_loaded(make, tmp_path):
    """Frequencies and DeepSeek's selection bias stay in fp32, so that `evaluate`, which loads, equals `validate`."""
    make().save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), dtype=torch.bfloat16)
    whole = load_model(str(tmp_path))
    cast(whole, torch.bfloat16)
    for tensors in ("named_parameters", "named_buffers"):
        expected = dict(getattr(loaded, tensors)())
        for name, tensor in getattr(whole, tensors)():
            assert tensor.dtype == expected[name].dtype, name
            assert torch.equal(tensor, expected[name]), name
    assert whole.get_decoder().rotary_emb.inv_freq.dtype == torch.float32


def test_a_teacher_that_is_cut_is_loaded_as_it_lies_on_disk(distill, config, assets, tmp_path, monkeypatch):
    """Not widened to fp32, which takes twice the memory for nothing."""
    import shutil

    from distill.training import build

    folder, dtypes = tmp_path / "teacher", []
    shutil.copytree(assets / "llama", folder)
    load_model(str(folder), dtype=torch.bfloat16).save_pretrained(folder)

    def start(teacher, *args, start=build.start_student):
        dtypes.append(teacher.dtype)
        return start(teacher, *args)

    monkeypatch.setattr(build, "start_student", start)
    config["model"] |= {"teacher": str(folder), "student_fit": None}
    config["trainer"] |= {"max_steps": 1, "limit_val_batches": 1, "num_sanity_val_steps": 0}
    cli = distill("fit", config)
    assert dtypes == [torch.bfloat16]
    assert cli.model.student.dtype == torch.float32


def test_experts_are_asked_in_few_blocks_on_a_device():
    """128 experts of width 2,048 on 4,096 tokens in bf16: 2 GiB of outputs, which blocks for a cache cut in 64."""
    row_bytes = 128 * 2048 * 2
    blocks = {device: len(list(chunks(4096, row_bytes, torch.device(device)))) for device in ("cpu", "cuda")}
    assert blocks == {"cpu": 64, "cuda": 4}


def test_a_cpu_run_leaves_a_gpu_of_the_machine_alone(monkeypatch):
    from distill.data.order.loader import Reader
    from distill.training.callbacks.resume import random_state

    def touched():
        raise AssertionError("asked the GPU")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", touched)
    assert random_state()["cuda"] is None
    assert not Reader(1, 0, 0).options()["pin_memory"]
    assert Reader(1, 0, 0, pin=True).options()["pin_memory"]


def test_workers_outlive_an_epoch(distill, config):
    config["data"] |= {"num_workers": 1, "max_sequences": 12}
    config["trainer"] |= {"max_steps": 8, "limit_val_batches": 1, "num_sanity_val_steps": 0}
    cli = distill("fit", config)
    assert cli.trainer.train_dataloader.persistent_workers
    assert cli.trainer.global_step == 8
