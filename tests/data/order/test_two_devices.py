"""Two processes under Lightning: the same steps as one, every row once, and a resumed run without repeats."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
PROGRAM = """
import json, sys, warnings
import lightning as L, torch
from lightning.pytorch.callbacks import ModelCheckpoint
from distill.data import DistillationDataModule

warnings.simplefilter("ignore")
folder, text, tokenizer, devices, batch, stop, ckpt = sys.argv[1:]

class Notes(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.seen, self.validated = [], []
    def training_step(self, batch, batch_idx):
        ids = batch.student.input_ids[batch.student.attention_mask[:, 0] == 1].tolist()
        self.seen.append((self.trainer.global_step, ids, batch.units))
        return self.weight * 1.0
    def validation_step(self, batch, batch_idx):
        self.validated += batch.student.input_ids[batch.student.attention_mask[:, 0] == 1].tolist()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

data = DistillationDataModule(text, tokenizer=tokenizer, sequence_length=32, per_device_batch_size=int(batch),
                              max_sequences=21, max_validation_sequences=5)
module = Notes()
trainer = L.Trainer(accelerator="cpu", devices=int(devices), strategy="ddp" if devices == "2" else "auto",
                    use_distributed_sampler=False, max_epochs=2, max_steps=int(stop), accumulate_grad_batches=2,
                    num_sanity_val_steps=0, logger=False, enable_progress_bar=False, enable_model_summary=False,
                    callbacks=[ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)])
trainer.fit(module, data, ckpt_path=ckpt or None)
with open(f"{folder}/rank{trainer.global_rank}.json", "w") as handle:
    json.dump([module.seen, module.validated], handle)
"""


@pytest.fixture
def run(assets, tmp_path):
    def call(name, devices, batch, stop=-1, ckpt=""):
        folder = tmp_path / name
        folder.mkdir()
        arguments = [folder, assets / "text.txt", assets / "llama", devices, batch, stop, ckpt]
        (tmp_path / "program.py").write_text(PROGRAM)
        environment = os.environ | {
            "HF_DATASETS_CACHE": str(tmp_path / "datasets_cache"),
            "PYTHONPATH": str(Path(__file__).parents[3] / "src"),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, tmp_path / "program.py", *map(str, arguments)]
        subprocess.run(command, env=environment, check=True, timeout=300, capture_output=True)
        ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(devices)]
        assert len({len(seen) for seen, _ in ranks}) == 1
        return ranks

    return call


def steps(ranks) -> dict[int, tuple[list, dict]]:
    """Step -> its rows, sorted, and the units that all its micro-batches agree on, but for their own number."""
    found: dict[int, tuple[list, dict]] = {}
    for seen, _ in ranks:
        for step, rows, units in seen:
            counts = {kind: count for kind, count in units.items() if kind != "micro_batches"}
            known = found.setdefault(step, ([], counts))
            assert known[1] == counts
            known[0].extend(rows)
    return {step: (sorted(rows), units) for step, (rows, units) in found.items()}


def test_two_devices_do_what_one_does(run, tmp_path):
    one, two = run("one", 1, 4), run("two", 2, 2)
    assert steps(two) == steps(one)
    assert len(steps(one)) == 6
    assert sorted(two[0][1] + two[1][1]) == sorted(one[0][1])
    run("cut", 2, 2, stop=2)
    rest = run("rest", 2, 2, ckpt=str(tmp_path / "cut" / "step=2.ckpt"))
    assert steps(rest) == {step: found for step, found in steps(one).items() if step >= 2}
