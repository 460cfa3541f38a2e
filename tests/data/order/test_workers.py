"""Data workers: their errors are the user's in one line, and they do not outlive the run that started them."""

import json
import multiprocessing
import os
import subprocess
import sys
from collections import deque
from itertools import islice
from pathlib import Path

import pytest

from distill.data.datamodule import DistillationDataModule
from distill.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")
TOLD = "its completion_mask holds other numbers than 0 and 1; repair or remove it"


@pytest.fixture
def late(tmp_path):
    """A stream whose last document is none, and one to validate on."""
    rows = [{"input_ids": [5, 6, 7 + i], "completion_mask": [0, 1, 1]} for i in range(30)]
    (tmp_path / "held_out.jsonl").write_text(json.dumps(rows[0]) + "\n")
    rows[29]["completion_mask"] = [0, 1, 2]
    path = tmp_path / "late.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_an_error_in_a_worker_is_one_line(late, assets, workers):
    data = DistillationDataModule(
        str(late),
        tokenizer=str(assets / "llama"),
        sequence_length=8,
        streaming=True,
        shuffle_buffer=6,
        num_workers=workers,
        packing=False,
        validation_split=str(late.with_name("held_out.jsonl")),
    )
    data.prepare_data()
    data.setup("fit")
    with pytest.raises(UserError, match=rf"^data.dataset: .*late.jsonl, the document \[5, 6, 36\]...: {TOLD}$"):
        deque(islice(data.train_dataloader(), 100), maxlen=0)
    for process in multiprocessing.active_children():  # which pytest's note of the error keeps alive
        process.kill()


PROGRAM = """
import time
import torch
from distill.stop_signals import end_workers_at_exit, leave_signals_to_the_run

class Slow(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield 1
        time.sleep(600)

loader = torch.utils.data.DataLoader(Slow(), num_workers=1, worker_init_fn=leave_signals_to_the_run)
kept = iter(loader)
end_workers_at_exit()
next(kept)
raise SystemExit(3)
"""


def test_workers_that_ignore_signals_end_with_their_run():
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3] / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, timeout=60, capture_output=True, check=False
    )
    assert done.returncode == 3, done.stderr
