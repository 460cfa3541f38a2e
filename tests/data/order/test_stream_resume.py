"""Streaming runs broken off anywhere go on with exactly the batches that were left, and end with the same bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from distill.errors import UserError
from helpers.broken_off import Break, noted_run

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path."),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty"),
]
STEPS = 9  # of two micro-batches of two rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three files of 12 documents: about four rounds of the run."""
    folder = tmp_path_factory.mktemp("documents")
    for part in range(3):
        rows = [{"prompt": f"{12 * part + i}:", "completion": " so" * (1 + i % 7)} for i in range(12)]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def run(assets, folder):
    def call(*callbacks, ckpt_path=None, data_options=None, **trainer_options):
        options = {"max_steps": STEPS} | trainer_options
        data = {
            "dataset": str(folder / "*.jsonl"),
            "tokenizer": str(assets / "llama"),
            "sequence_length": 32,
            "streaming": True,
            "shuffle_buffer": 5,
            "per_device_batch_size": 2,
        } | (data_options or {})
        return noted_run(data, callbacks, ckpt_path, **options)

    return call


def saved(run, tmp_path, **options):
    """A whole run that saves after every step, and its checkpoints by step."""
    saving = ModelCheckpoint(tmp_path / "steps", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = run(saving, **options)
    found = {int(path.stem.removeprefix("step=")): path for path in (tmp_path / "steps").glob("step=*.ckpt")}
    assert set(found) >= set(range(1, STEPS + 1))
    return whole, found


def tokens(batch: list[list[int]]) -> int:
    """Tokens of a batch whose rows are padded with the end-of-sequence id 0."""
    return sum(sum(token != 0 for token in row) for row in batch)


def test_windows_carry_their_own_counts(run):
    seen = run().seen
    assert len(seen) == 2 * STEPS
    for at in range(0, len(seen), 2):
        (_, units), (_, same) = seen[at : at + 2]
        assert units == same
        assert units["micro_batches"] == 2
        assert units["tokens"] >= units["queries"] > 0
    assert len({units["tokens"] for _, units in seen}) > 3


@pytest.mark.parametrize("workers", [0, 2])
def test_goes_on_from_every_step(run, tmp_path, workers):
    options = {"data_options": {"num_workers": workers}}
    whole, checkpoints = saved(run, tmp_path, **options)
    for step in (1, 4, 8) if workers else range(1, STEPS):
        rest = run(ckpt_path=checkpoints[step], **options)
        assert rest.seen == whole.seen[2 * step :], step
        assert torch.equal(rest.weight, whole.weight), step


@pytest.mark.parametrize("at", [2, 3, 5, 12])
def test_goes_on_after_an_exception(run, tmp_path, at):
    whole = run()
    broken = run(ModelCheckpoint(tmp_path / "broken", filename="last", save_on_exception=True), Break(at))
    assert broken.seen == whole.seen[:at]
    assert run(ckpt_path=tmp_path / "broken" / "last.ckpt").seen == whole.seen[at:]


def test_goes_on_through_epochs_of_limited_batches_and_validation(run, tmp_path):
    options = {"limit_train_batches": 5, "val_check_interval": 2, "max_steps": STEPS}
    whole, checkpoints = saved(run, tmp_path, **options)
    windows = [units["micro_batches"] for _, units in whole.seen]
    assert windows[:10] == [2, 2, 2, 2, 1] * 2
    ends = [2, 4, 5, 7, 9, 10, 12, 14, 15]
    for step in range(1, STEPS):
        assert run(ckpt_path=checkpoints[step], **options).seen == whole.seen[ends[step - 1] :], step


@pytest.mark.parametrize(
    ("data_options", "trainer_options", "told"),
    [
        ({"per_device_batch_size": 1}, {}, "data.per_device_batch_size: 1, but the checkpoint stands within a stream"),
        ({"num_workers": 1}, {}, "data.num_workers: 1"),
        ({"shuffle_buffer": 6}, {}, "data.shuffle_buffer: 6"),
        (
            {"sequence_length": 16},
            {},
            "data.sequence_length: 16, but .* a stream of rows made with data.seq.*: 32; resume",
        ),
        ({}, {"accumulate_grad_batches": 1}, "trainer.accumulate_grad_batches: 1"),
    ],
)
def test_a_place_in_another_stream_is_refused(run, tmp_path, data_options, trainer_options, told):
    run(ModelCheckpoint(tmp_path / "one", filename="one", every_n_train_steps=3), max_steps=3)
    with pytest.raises(UserError, match=told):
        run(ckpt_path=tmp_path / "one" / "one.ckpt", data_options=data_options, **trainer_options)


def test_a_stream_without_an_end_is_refused(run):
    with pytest.raises(UserError, match=r"data.streaming: true gives data without an end; set trainer.max_steps"):
        run(max_steps=-1, max_epochs=2)


def test_a_streaming_run_of_the_program_resumes_bit_for_bit(distill, config, folder):
    config["data"] |= {"dataset": str(folder / "*.jsonl"), "streaming": True, "shuffle_buffer": 5}
    config["data"]["per_device_batch_size"] = 2
    config["trainer"] |= {"max_steps": 8, "accumulate_grad_batches": 2, "val_check_interval": 6}
    config["checkpoint"] = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"monitor": None, "every_n_train_steps": 3, "save_top_k": -1, "filename": "at{step}"},
    }
    config["checkpoint"]["init_args"]["auto_insert_metric_name"] = False
    whole = distill("fit", config)
    assert whole.trainer.global_step == 8
    assert torch.isfinite(whole.trainer.callback_metrics["val/loss"])
    path = Path(whole.trainer.log_dir, "checkpoints", "at3.ckpt")
    rest = distill("fit", config, "--ckpt_path", str(path))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, rest.model.state_dict()[name]), name
    for name in ("val/loss", "val/kl_div_T1", "train/loss"):
        assert torch.equal(whole.trainer.callback_metrics[name], rest.trainer.callback_metrics[name]), name


PROGRAM = """
import json, sys, warnings
import torch
import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from distill.data import DistillationDataModule
warnings.simplefilter("ignore")
out, pattern, tokenizer, stop, ckpt = sys.argv[1:]

class Notes(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.seen = []
    def training_step(self, batch, batch_idx):
        valid = int((batch.student.labels[:, 1:] != -100).sum())
        self.seen.append((self.trainer.global_step, batch.student.input_ids.tolist(), valid, batch.units))
        return self.weight * batch.student.input_ids.float().mean() / 1000
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.1)

data = DistillationDataModule(pattern, tokenizer=tokenizer, sequence_length=32, streaming=True, shuffle_buffer=5,
                              per_device_batch_size=1, packing=False)
module = Notes()
trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", use_distributed_sampler=False, max_steps=int(stop),
                    accumulate_grad_batches=2, num_sanity_val_steps=0, limit_val_batches=0, logger=False,
                    enable_progress_bar=False, enable_model_summary=False,
                    callbacks=[ModelCheckpoint(out, filename="{step}", every_n_train_steps=1, save_top_k=-1)])
trainer.fit(module, data, ckpt_path=ckpt or None)
with open(f"{out}/rank{trainer.global_rank}.json", "w") as handle:
    json.dump([module.seen, module.weight.item()], handle)
"""


@pytest.mark.slow
def test_two_ranks_share_the_documents_count_together_and_resume(assets, folder, tmp_path):
    def ranks(name: str, stop: int, ckpt: str = "") -> list:
        (tmp_path / name).mkdir()
        (tmp_path / "program.py").write_text(PROGRAM)
        arguments = [tmp_path / name, folder / "*.jsonl", assets / "llama", stop, ckpt]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3] / "src"), "OMP_NUM_THREADS": "1"}
        environment["HF_DATASETS_CACHE"] = str(tmp_path / "cache")
        command = [sys.executable, tmp_path / "program.py", *map(str, arguments)]
        subprocess.run(command, env=environment, check=True, timeout=300, capture_output=True)
        return [json.loads((tmp_path / name / f"rank{rank}.json").read_text()) for rank in range(2)]

    whole = ranks("whole", 6)
    for step in range(6):
        window = [entry for seen, _ in whole for entry in seen if entry[0] == step]
        assert len(window) == 4
        valid = sum(entry[2] for entry in window)
        for *_, units in window:
            assert units == {"tokens": valid, "queries": units["queries"], "micro_batches": 4}
    batches = [str(entry[1]) for seen, _ in whole for entry in seen]
    assert len(set(batches)) == len(batches) == 24  # of about 34 documents, none twice
    ranks("cut", 3)
    rest = ranks("rest", 6, str(tmp_path / "cut" / "step=3.ckpt"))
    for (seen, weight), (left, other) in zip(whole, rest, strict=True):
        assert left == [entry for entry in seen if entry[0] >= 3]
        assert weight == other
